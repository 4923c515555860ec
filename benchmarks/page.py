"""What was measured, as Markdown tables and pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import UNITS, Curve, Row, Spread

Found = Mapping[str, Sequence["Row | Curve"]]  # by theme
COLUMNS: Mapping[str, str] = {
    "peft": "PEFT",
    "floor": "floor",
    "merged": "merged",
    "by hand": "by hand",
    "peftlite": "peftlite",
    "base dtype": "base dtype",
}
COLOURS = {"peft": "#c44e52", "peftlite": "#3b6ea5", "floor": "#999999", "by hand": "#dd8452", "merged": "#55a868"}
TITLES = {
    "imports": "Importing",
    "injection": "Giving a model adapters",
    "files": "Files and switching, Llama-3.2-1B shapes",
    "calls": "Calls without gradients",
    "training": "Training a Llama block",
    "variants": "Other methods",
    "merging": "Merging",
    "mixed": "Rows of different adapters in one batch",
    "graphs": "torch.compile",
    "growth": "Growth",
}
INTRODUCTION = """\
# Performance

Written by `make bench`. peftlite is measured beside PEFT {peft}, in one process and on the same weights, after the
outputs of both were compared; nothing is timed before that.

- Times are medians of one thread's CPU time over alternating runs, with the quartiles in brackets; *by wall* is the
  ratio of the medians by the wall clock. Ratios are peftlite to PEFT, so smaller is better. Differences under 5 % are
  noise.
- The floor is the same work without adapters, if the table does not say otherwise. *By hand* is LoRA written in six
  lines of plain PyTorch, *merged* the model with the adapter merged into its weights. *Base dtype* is peftlite with
  `LoraRuntimeConfig(compute_dtype="base")`, an option, which no ratio and no goal is about.
- Errors are relative to the same formulas in float64: the norm of the difference by the norm of the result. Those of
  gradients are the median over the input's and all parameters', without dropout.
- Bytes are of tensors, counted in PyTorch, where the table does not say resident memory.

Measured with torch {torch}, transformers {transformers}, Python {python} on {machine}, {cpus} CPUs, of which one
thread was used.

To repeat it: `make bench`, on a machine that does nothing else. `make bench ARGS="training mixed"` measures some
themes, and `ARGS="--impl peftlite"` times one side only; both print tables and leave this page alone. `ARGS=--quick`
only sees whether it runs.

![Ratios of all rows](performance/ratios.svg)
"""


def page(found: Found, pictures: bool) -> str:
    """The page of all themes."""
    import peft
    import transformers

    parts = [
        INTRODUCTION.format(
            peft=peft.__version__,
            torch=torch.__version__,
            transformers=transformers.__version__,
            python=platform.python_version(),
            machine=platform.machine(),
            cpus=os.cpu_count(),
        )
    ]
    if not pictures:
        parts[0] = parts[0].partition("![")[0].rstrip() + "\n"
    for theme, things in found.items():
        parts.append(f"## {TITLES[theme]}\n")
        rows = [thing for thing in things if isinstance(thing, Row)]
        curves = [thing for thing in things if isinstance(thing, Curve)]
        if rows:
            parts.append(table(rows) + "\n")
        if curves and pictures:
            parts.append("![How costs grow](performance/growth.svg)\n")
        parts.extend(f"{curve.measure}:\n\n{curve_table(curve)}\n" for curve in curves)
    return "\n".join(parts)


# ---- tables
def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, without the columns that none of them has."""
    columns: dict[str, Callable[[Row], str]] = {
        "measure": lambda row: row.measure + (f" ({row.note})" if row.note else "")
    }
    columns |= {title: (lambda row, n=name: shown(row.found.get(n), row.unit)) for name, title in COLUMNS.items()}  # type: ignore[misc]
    columns |= {
        "ratio": lambda row: number(row.ratio),
        "by wall": lambda row: number(row.wall_ratio),
        "goal": lambda row: ", ".join(map(str, row.goals)),
        "met": lambda row: {None: "", True: "yes", False: "**no**"}[row.met],
        "errors, PEFT": lambda row: errors(row, "peft"),
        "errors, peftlite": lambda row: errors(row, "peftlite"),
        "errors, base dtype": lambda row: errors(row, "base dtype"),
    }
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    return markdown({title: column for title, column in cells.items() if any(column)})


def curve_table(curve: Curve) -> str:
    """One line for each place of the axis."""
    places = sorted({place for spreads in curve.found.values() for place in spreads})
    cells = {curve.axis: [str(place) for place in places]}
    for name, title in COLUMNS.items():
        if name in curve.found:
            cells[title] = [shown(curve.found[name].get(place), curve.unit) for place in places]
    if {"peft", "peftlite"} <= set(curve.found):
        rows = [
            Row("", "", {name: spreads[place] for name, spreads in curve.found.items() if place in spreads})
            for place in places
        ]
        cells["ratio"] = [number(row.ratio) for row in rows]
    return markdown(cells)


def markdown(cells: Mapping[str, Sequence[str]]) -> str:
    lines = [list(cells), ["---"] * len(cells), *map(list, zip(*cells.values(), strict=True))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def errors(row: Row, name: str) -> str:
    if row.checked is None:
        return ""
    taken = (row.checked.outputs.get(name), row.checked.gradients.get(name))
    kinds = zip(("outputs", "gradients"), taken, strict=True)
    return ", ".join(f"{kind} {value:.1e}" for kind, value in kinds if value is not None)


def shown(spread: Spread | None, unit: str) -> str:
    if spread is None:
        return ""
    median, low, high = (number(value * UNITS[unit]) for value in (spread.median, spread.low, spread.high))
    return f"{median} {unit}".strip() + (f" ({low} to {high})" if low != high else "")


def number(value: float | None) -> str:
    """Three digits, never with an exponent."""
    if value is None:
        return ""
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-4 or not value else f"{value:.6f}"
    )


# ---- pictures
def draw(found: Found, folder: Path) -> None:
    """`ratios.svg` and `growth.svg`, the same bytes for the same numbers. Raises: ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "peftlite", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(exist_ok=True)
    things = [thing for theme in found.values() for thing in theme]
    bars([thing for thing in things if isinstance(thing, Row)], folder / "ratios.svg")
    growth([thing for thing in things if isinstance(thing, Curve)], folder / "growth.svg")


def bars(rows: Iterable[Row], path: Path) -> None:
    from matplotlib import pyplot

    compared = [(row.measure, row.ratio, row.met) for row in rows if row.ratio is not None and row.ratio > 0]
    figure, axes = pyplot.subplots(figsize=(11, 0.26 * len(compared) + 1))
    colours = [{True: "#3b6ea5", None: "#8fb0d3", False: "#dd8452"}[met] for *_, met in compared]
    axes.barh([measure for measure, *_ in compared], [ratio for _, ratio, _ in compared], color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("peftlite / PEFT: shorter is better; orange: the goal is not met")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    save(figure, path)


def growth(curves: Sequence[Curve], path: Path) -> None:
    from matplotlib import pyplot

    across = 2
    figure, grid = pyplot.subplots((len(curves) + across - 1) // across, across, figsize=(11, 3 * len(curves) / across))
    for axes, curve in zip(grid.flat, curves, strict=False):
        for name, spreads in curve.found.items():
            places = sorted(spreads)
            scale, at = UNITS[curve.unit], [spreads[place] for place in places]
            axes.plot(places, [s.median * scale for s in at], "o-", ms=3, color=COLOURS[name], label=COLUMNS[name])
            axes.fill_between(
                places, [s.low * scale for s in at], [s.high * scale for s in at], color=COLOURS[name], alpha=0.2
            )
        axes.set(title=curve.measure, xlabel=curve.axis, ylabel=curve.unit, xscale="log", yscale="log")
        axes.legend()
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))  # as editors leave it
    pyplot.close(figure)
