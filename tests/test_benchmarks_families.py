"""docs/families.md is what the registry says."""

from __future__ import annotations

from pathlib import Path

from tiny import run_python


def test_the_page_is_current() -> None:
    """In a fresh process: other tests register families of their own."""
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    assert run_python("from benchmarks.families import table; print(table(), end='')") == page
