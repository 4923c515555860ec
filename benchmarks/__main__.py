"""Run the benchmarks and write `docs/performance.md` with its pictures: `python -m benchmarks [theme ...]`."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import page
from benchmarks.harness import IMPLEMENTATIONS, Curve, Row, Settings

THEMES = ("imports", "injection", "files", "calls", "training", "variants", "merging", "mixed", "graphs", "growth")
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def measure(theme: str) -> list[Row | Curve]:
    """What a theme finds, of the implementations that are timed; the random numbers are the same each time."""
    torch.manual_seed(0)
    found: list[Row | Curve] = []
    for thing in importlib.import_module(f"benchmarks.{theme}").rows(Settings.quick):
        wanted = {n: v for n, v in thing.found.items() if n in Settings.timed or n not in IMPLEMENTATIONS}
        found.append(replace(thing, found=wanted))
    return found


def write(found: page.Found, to: Path) -> None:
    """The page, and the pictures beside it; without those where there is no matplotlib."""
    try:
        page.draw(found, to.with_suffix(""))
        pictures = True
    except ImportError as missing:
        print(f"no pictures: {missing}", file=sys.stderr)
        pictures = False
    to.write_text(page.page(found, pictures), encoding="utf-8")


def implementations(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not names or set(names) - set(IMPLEMENTATIONS):
        raise argparse.ArgumentTypeError(f"`{text}`: of {','.join(IMPLEMENTATIONS)}")
    return names


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("themes", nargs="*", metavar="theme", help=f"of {', '.join(THEMES)}; default: all")
    parser.add_argument("--impl", type=implementations, default=IMPLEMENTATIONS, help="which to time: peft,peftlite")
    parser.add_argument("--quick", action="store_true", help="only see whether everything runs; writes nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.themes) - set(THEMES):
        parser.error(f"no theme {', '.join(sorted(unknown))}; there are {', '.join(THEMES)}")
    Settings.quick, Settings.timed = options.quick, options.impl
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, list[Row | Curve]] = {}
    for theme in [theme for theme in THEMES if not options.themes or theme in options.themes]:
        start = time.perf_counter()
        found[theme] = measure(theme)
        rows = [thing for thing in found[theme] if isinstance(thing, Row)]
        print(f"{theme}, {time.perf_counter() - start:.0f} s\n\n{page.table(rows)}\n", flush=True)
    if not options.quick and set(found) == set(THEMES) and set(options.impl) == set(IMPLEMENTATIONS):
        write(found, PAGE)
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
