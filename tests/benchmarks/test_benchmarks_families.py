"""docs/families.md is what the registry says, and what trials of every family give."""

from __future__ import annotations

import pytest

from processes import ROOT, run_python

PAGE = ROOT / "docs" / "families.md"


@pytest.mark.slow
def test_the_page_is_current() -> None:
    """In a fresh process: other tests register families of their own."""
    assert run_python("from benchmarks.families import table; print(table(), end='')") == PAGE.read_text()


@pytest.mark.slow
def test_every_family_is_on_the_page_with_its_classes_and_units() -> None:
    said = "from benchmarks.families import all_families, facts; print(*map(facts, all_families()), sep='\\n')"
    facts = [eval(line) for line in run_python(said).splitlines()]
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `") and "model_type" not in line]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[: len(fact)] for row, fact in zip(rows, facts, strict=True)] == facts
