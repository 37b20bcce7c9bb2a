"""docs/families.md is what the registry says."""

from __future__ import annotations

from processes import ROOT, run_python


def test_the_page_is_current() -> None:
    """In a fresh process: other tests register families of their own."""
    page = (ROOT / "docs" / "families.md").read_text()
    assert run_python("from benchmarks.families import table; print(table(), end='')") == page
