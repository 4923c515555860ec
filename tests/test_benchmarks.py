"""The benchmarks run, compare both implementations before they time anything, and write what they found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, page, resident
from benchmarks.harness import Checked, Curve, Goal, Row, Settings, Spread, amounts

pytestmark = pytest.mark.filterwarnings("ignore")
COMPARED = [theme for theme in command.THEMES if theme != "imports"]  # which imports one in a process


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """The smallest sizes, one round."""
    before = Settings.quick, Settings.timed
    Settings.quick = True
    with torch.random.fork_rng(devices=[]):
        yield
    Settings.quick, Settings.timed = before


class TimedFirstError(Exception):
    """Something was timed before it was compared."""


@pytest.mark.parametrize("theme", COMPARED)
def test_a_theme_runs_and_measures_both(theme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "of_an_adapter", lambda library, first, more: 1.0)  # one such process is enough
    found = command.measure(theme)
    assert any(isinstance(thing, Row) for thing in found)
    for thing in found:
        both = {"peftlite"} if thing.measure.startswith("resident") else {"peft", "peftlite"}
        assert both <= set(thing.found), thing.measure
        if isinstance(thing, Row) and thing.checked is not None:
            errors = [*thing.checked.outputs.values(), *thing.checked.gradients.values()]
            assert all(0 <= error < 0.1 for error in errors), (thing.measure, thing.checked)
    names = [thing.measure for thing in found if isinstance(thing, Row)]
    assert page.table([thing for thing in found if isinstance(thing, Row)]).count("\n") == len(names) + 1


@pytest.mark.parametrize("theme", [theme for theme in COMPARED if theme != "graphs"])  # which times nothing
def test_nothing_is_timed_where_the_two_differ(theme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*arguments: Any) -> NoReturn:
        raise TimedFirstError

    def differ(agreed: bool, why: str) -> None:
        raise AssertionError("they differ")

    monkeypatch.setattr(harness, "_alternate", timed)
    for module in (harness, __import__(f"benchmarks.{theme}", fromlist=["agree"])):
        if hasattr(module, "agree"):
            monkeypatch.setattr(module, "agree", differ)
    with pytest.raises(AssertionError, match="they differ"):
        command.measure(theme)


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 100.0], [1.0, 100.5], True),  # in units of the largest number
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0, 2.0], [1.0, float("nan")], False),
        ([1.0, 1.0], [1.0], False),
    ],
)
def test_outputs_that_differ_are_refused(one: list[float], other: list[float], agree: bool) -> None:
    if agree:
        truth = torch.tensor(one, dtype=torch.float64)
        checked = harness.same(torch.tensor(one), torch.tensor(other), 1e-2, truth)
        assert checked.outputs["peft"] == 0
        assert checked.outputs["peftlite"] == pytest.approx((truth - torch.tensor(other)).norm() / truth.norm())
    else:
        with pytest.raises((AssertionError, RuntimeError), match="do not do the same"):
            harness.same(torch.tensor(one), torch.tensor(other), 1e-2)


def test_imports_are_measured_in_other_processes() -> None:
    (row,) = command.measure("imports")
    assert row.found["peftlite"].median > 0  # type: ignore[union-attr]


def test_one_implementation_alone(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["merging", "--quick", "--impl", "peftlite"])
    printed = capsys.readouterr().out
    assert "| peftlite |" in printed
    assert "| PEFT |" not in printed


@pytest.mark.parametrize("arguments", [["nothing"], ["--impl", "other"], ["--impl", ""]])
def test_what_there_is_not_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "of peft,peftlite" in capsys.readouterr().err or arguments == ["nothing"]


# ---- goals and the page
def spread(value: float) -> Spread:
    return Spread(value, 0.9 * value, 1.1 * value, value)


FOUND = {
    "calls": [
        Row("fast", "ms", {"peft": spread(2e-3), "peftlite": spread(1e-3)}, (Goal(0.5),), Checked({"peft": 1e-7})),
        Row("slow", "MiB", amounts({"peft": 2**20, "floor": 2**20, "peftlite": 3 * 2**20}), (Goal(2.0, "floor"),)),
    ],
    "growth": [Curve("load", "adapters", "ms", {"peft": {1: spread(1), 10: spread(9)}, "peftlite": {1: spread(1)}})],
}


def test_a_goal_is_for_the_ratio_the_floor_or_the_thing_itself() -> None:
    row = Row("", "", amounts({"peft": 4, "floor": 2, "peftlite": 3}))
    for goal, met in (
        (Goal(0.75), True),
        (Goal(0.74), False),
        (Goal(1.5, "floor"), True),
        (Goal(1.4, "floor"), False),
        (Goal(3, ""), True),
        (Goal(2.9, ""), False),
    ):
        assert dataclasses.replace(row, goals=(goal,)).met is met, goal
    assert dataclasses.replace(row, goals=(Goal(0.75), Goal(1.4, "floor"))).met is False
    assert Row("", "", amounts({"peftlite": 3}), (Goal(1),)).met is None


def test_the_page_has_each_row_and_no_paths_and_is_the_same_twice(tmp_path: Path) -> None:
    written = []
    for place in (tmp_path / "a", tmp_path / "b"):
        place.mkdir()
        command.write(FOUND, place / "performance.md")
        files = sorted(file for file in place.rglob("*") if file.is_file())
        written.append({str(file.relative_to(place)): file.read_bytes() for file in files})
    assert written[0] == written[1]
    assert set(written[0]) == {"performance.md", "performance/growth.svg", "performance/ratios.svg"}
    text = written[0]["performance.md"].decode()
    assert "| fast | 2 ms (1.8 to 2.2) |  | 1 ms (0.9 to 1.1) | 0.5 | 0.5 | <= 0.5 | yes | outputs 1.0e-07 |" in text
    assert "| slow | 1 MiB | 1 MiB | 3 MiB | 3 |  | <= 2 x floor | **no** |" in text
    assert "| 10 | 9000 ms (8100 to 9900) |  |" in text
    assert str(Path.cwd()) not in text
    assert torch.__version__ in text
