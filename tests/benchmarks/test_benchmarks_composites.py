"""The benchmarks of bigger models run, and measure what they say."""

from __future__ import annotations

import json
import re

import pytest

from processes import run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("more", [(), ("--adapters",)], ids=["plain", "adapters"])
def test_the_language_model_is_not_copied(more: tuple[str, ...]) -> None:
    """Pruning takes the memory of the small tower, and some for names and code; not that of the language model."""
    printed = run("-m", "benchmarks.composite_memory", "--here", "--parameters", "3e8", "--dtype", "float32", *more)
    found = json.loads(printed.splitlines()[-1])
    assert found["language model, MB"] > 800
    assert found["peak while pruning, MB more"] < found["small tower, MB"] + 100


def test_the_loss_of_a_language_model() -> None:
    printed = run("-m", "benchmarks.llava_loss", "--steps", "2", "--images", "32", "--test-images", "100")
    first, *pruned = printed.splitlines()
    dense, without_unread = (float(number) for number in re.findall(r"\d\.\d{4}", first))
    assert dense == without_unread and len(pruned) == 3
    shares = [int(line.partition("%")[0]) / 100 for line in pruned]
    assert all(0.9 * t < s <= t for s, t in zip(shares, (0.75, 0.5, 0.35), strict=True))
