"""The documentation says what the contract tests."""

from __future__ import annotations

from pathlib import Path

from tests.contract.render import page


def test_the_page_of_what_is_supported_is_the_contracts_table() -> None:
    written = Path(__file__).parents[2] / "docs" / "supported.md"
    assert written.read_text(encoding="utf-8") == page(), "run: python -m tests.contract.render > docs/supported.md"
