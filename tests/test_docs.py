"""Every Python block of the README and of docs/ runs, in order, the blocks of one page in one namespace.

A block that cannot run is tagged `python no-run` and begins with a comment that says why: `# not run: it asks the hub`.
A page that begins with `import peftlite.as_peft` runs in a process of its own. Blocks inside `<!-- -->` run, and are
not shown: they make what a page takes for granted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import peftlite
from tests.ecosystem.programs import QUIET, needs_libraries
from tests.ecosystem.programs import run as run_python

ROOT = Path(__file__).parent.parent
STANDS_IN = "import peftlite.as_peft\n"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python[ \t]*(?P<tags>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
REASON = "# not run: "


@dataclass(frozen=True)
class Block:
    """One fenced block: its code, the line of the page on which the code begins, and whether it is to run."""

    code: str
    line: int
    runs: bool


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        tags, code, line = match["tags"].strip(), match["code"], text.count("\n", 0, match.start("code")) + 1
        assert tags in ("", "no-run"), f"line {line - 1}: a Python block is tagged `no-run` or nothing, not `{tags}`"
        reason = code.partition("\n")[0].removeprefix(REASON).strip()
        assert not tags or (code.startswith(REASON) and reason), f"line {line}: say why: `{REASON}...`"
        found.append(Block(code, line, runs=not tags))
    return found


def run(page: Path) -> None:
    """Run the page's blocks; a traceback points at the line of the page."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.runs:
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True), namespace)


def runs_today(page: Path) -> bool:
    """Pages with code wait for the last of the public names that they use."""
    return "save_adapter" in peftlite.__all__ or not blocks(page.read_text(encoding="utf-8"))


def script(page: Path) -> str:
    """The page's blocks as one program, each on its own lines."""
    lines: list[str] = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.runs:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


def stands_in(page: Path) -> bool:
    """Whether peftlite stands in for `peft` on this page, which cannot be undone in a process."""
    return next((block.code for block in blocks(page.read_text(encoding="utf-8"))), "").startswith(STANDS_IN)


HERE = [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if runs_today(p) and not stands_in(p)]
APART = [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if stands_in(p)]


@needs_libraries
@pytest.mark.parametrize("page", APART)
def test_the_code_of_a_page_runs_in_the_stand_in(page: Path, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text(script(page), encoding="utf-8")
    run_python([*QUIET, str(program)], cwd=tmp_path)


@pytest.mark.parametrize("page", HERE)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)


def test_blocks_share_a_namespace_and_errors_name_the_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\nx = 1\n```\n\n```sh\nnot python\n```\n\n```python\nx += 1\nassert x == 3\n```\n"
    )
    with pytest.raises(AssertionError) as caught:
        run(page)
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 13)


@pytest.mark.parametrize(
    "block", ["```python no-run\nx = 1\n```\n", "```python no-run\n# not run:\n```\n", "```python skip\n```\n"]
)
def test_a_block_is_not_left_out_without_a_reason(block: str) -> None:
    with pytest.raises(AssertionError, match=r"no-run|say why"):
        blocks(block)


def test_a_block_with_a_reason_is_left_out() -> None:
    assert [b.runs for b in blocks("```python no-run\n# not run: it asks the hub\nx\n```\n")] == [False]
