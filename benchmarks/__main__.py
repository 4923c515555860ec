"""Run the benchmarks and write `docs/performance.md` with its plots: `python -m benchmarks [theme ...] [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.harness import Row, table

THEMES = ("imports", "life", "layer", "merge", "mixed", "graphs")
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def run(themes: tuple[str, ...] = THEMES, quick: bool = False) -> list[Row]:
    """The rows of these themes; `quick` measures next to nothing and is for finding out whether they run."""
    found: list[Row] = []
    harness.QUICK = quick
    for theme in themes:
        for row in importlib.import_module(f"benchmarks.{theme}").rows(quick):
            print(table([row]).splitlines()[-1], flush=True)
            found.append(row)
    return found


def write(rows: list[Row], page: Path) -> None:
    """The page with the table, and a picture of the ratios beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [row for row in rows if row.ratio is not None]
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(compared) + 1))
    axes.barh([row.measure for row in compared], [row.ratio for row in compared], color="#3b6ea5")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("peftlite / PEFT (shorter is better)")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(page.with_name("performance.png"), dpi=110)
    page.write_text(
        "# Performance\n\n"
        "Measured by `make bench`: peftlite beside PEFT 0.21.2 in one process, on the same weights, outputs compared "
        "before timing; one thread, medians of thread-CPU time over alternating runs. The floor is the base model "
        "without adapters (for mixed batches: one adapter for all rows).\n\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}.\n\n"
        f"{table(rows)}\n\n![ratios](performance.png)\n",
        encoding="utf-8",
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("themes", nargs="*", default=THEMES, help=f"of {', '.join(THEMES)}")
    parser.add_argument("--quick", action="store_true", help="only see whether everything runs; writes nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = run(tuple(options.themes), options.quick)
    if not options.quick and set(options.themes) == set(THEMES):
        write(rows, PAGE)
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
