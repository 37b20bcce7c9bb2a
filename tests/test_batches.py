"""ImageBatches: any source of images, in batches of one fixed order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils.batches import ImageBatches

PIXELS = torch.arange(10 * 12, dtype=torch.float32).reshape(10, 3, 2, 2)
EXAMPLES = [{"pixel_values": image, "labels": i} for i, image in enumerate(PIXELS)]


def together(batches: ImageBatches) -> torch.Tensor:
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize(
    "data",
    [PIXELS, EXAMPLES, list(zip(PIXELS, range(10), strict=True)), DataLoader(EXAMPLES, shuffle=True)],  # type: ignore[arg-type]
    ids=["tensor", "examples", "pairs", "loader"],
)
def test_every_source_gives_every_image_in_order(data: Any) -> None:
    batches = ImageBatches(data, batch_size=4)
    for _ in range(2):
        assert torch.equal(together(batches), PIXELS)
    assert len(batches) == len(list(batches)) == 3 and batches.images == 10
    labelled = [batch["labels"] for batch in batches if "labels" in batch]
    assert isinstance(data, torch.Tensor) or torch.equal(torch.cat(labelled), torch.arange(10))


def test_a_limit_spreads_over_sorted_data() -> None:
    assert torch.equal(together(ImageBatches(PIXELS, limit=5)), PIXELS[::2])
    assert torch.equal(together(ImageBatches(ImageBatches(PIXELS), limit=20)), PIXELS)


def test_shards_are_disjoint_and_complete() -> None:
    shards = [ImageBatches(PIXELS, batch_size=3, shard=(rank, 2)) for rank in (0, 1)]
    assert [len(shard) for shard in shards] == [2, 2]
    assert torch.equal(torch.cat([together(shard) for shard in shards]), PIXELS[[0, 1, 2, 6, 7, 8, 3, 4, 5, 9]])


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(EXAMPLES)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (PIXELS[0], r"\(images, channels, height, width\)"),
        (PIXELS[:0], "empty"),
        (_Stream(), "read several times"),
        ([{"image": 1}], "image processor"),
        ([{"pixel_values": PIXELS[0, 0]}], "got"),
        (torch.full((2, 3, 2, 2), torch.nan), "not finite"),
    ],
)
def test_what_cannot_be_read_is_refused(data: Any, words: str) -> None:
    with pytest.raises(InvalidDataError, match=words):
        list(ImageBatches(data))
