"""ImageBatches: any source of images, in batches of one fixed order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils.batches import ImageBatches, run_images
from tiny import make

PIXELS = torch.arange(10 * 12, dtype=torch.float32).reshape(10, 3, 2, 2) / 8
EXAMPLES = [{"pixel_values": image, "labels": i} for i, image in enumerate(PIXELS)]


def together(batches: ImageBatches) -> torch.Tensor:
    return torch.cat([batch["pixel_values"] for batch in batches])


@pytest.mark.parametrize(
    "data",
    [
        PIXELS,
        EXAMPLES,
        list(zip(PIXELS, range(10), strict=True)),
        DataLoader(EXAMPLES, shuffle=True),  # type: ignore[arg-type]
        {"pixel_values": PIXELS, "labels": list(range(10))},
    ],
    ids=["tensor", "examples", "pairs", "loader", "columns"],
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
        ({"train": EXAMPLES, "test": EXAMPLES}, "it has train, test .of several splits"),
        ({"pixel_values": PIXELS, "labels": [1, 2]}, "labels has 2 rows, and there are 10 images"),
    ],
)
def test_what_cannot_be_read_is_refused(data: Any, words: str) -> None:
    with pytest.raises(InvalidDataError, match=words):
        list(ImageBatches(data))


def test_a_sampler_of_some_images_leaves_the_others_out() -> None:
    sampler = SubsetRandomSampler([7, 2, 5])
    for loader in (
        DataLoader(EXAMPLES, batch_size=2, sampler=sampler),  # type: ignore[arg-type]
        DataLoader(EXAMPLES, batch_sampler=BatchSampler(sampler, 2, False)),  # type: ignore[arg-type]
    ):
        pixels = together(ImageBatches(ImageBatches(loader), batch_size=2))
        assert torch.equal(pixels, PIXELS[[2, 5, 7]])


def test_other_columns_stay_in_their_batches() -> None:
    masks = torch.arange(40).view(10, 4) % 3 == 0
    columns = {"pixel_values": PIXELS, "bool_masked_pos": masks, "interpolate_pos_encoding": True}
    for data in (columns, ImageBatches(columns), ImageBatches(columns, limit=10)):
        batches = list(ImageBatches(data, batch_size=4))
        assert torch.equal(torch.cat([batch["bool_masked_pos"] for batch in batches]), masks)
        assert [batch["interpolate_pos_encoding"] for batch in batches] == [True] * 3
    rows = [{**columns, "pixel_values": PIXELS[i : i + 5], "bool_masked_pos": masks[i : i + 5]} for i in (0, 5)]
    single = [{"pixel_values": x, "interpolate_pos_encoding": True, "labels": True} for x in PIXELS]
    for several in (rows, single):
        assert [batch["interpolate_pos_encoding"] for batch in ImageBatches(several, batch_size=4)] == [True] * 3
    assert next(iter(ImageBatches(single, 4)))["labels"].shape == (4,)
    rows[1]["interpolate_pos_encoding"] = False
    with pytest.raises(InvalidDataError, match="interpolate_pos_encoding is True and False"):
        ImageBatches(rows)
    thinned = list(ImageBatches(columns, limit=5))
    assert torch.equal(thinned[0]["bool_masked_pos"], masks[::2]) and thinned[0]["interpolate_pos_encoding"] is True


# ---------------------------------------------------------------------- running a model
#: with position embeddings that are interpolated where that is asked for; CLIP's classifier takes that as a keyword
INTERPOLATING = [
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "CLIPForImageClassification",
    "CLIPVisionModelWithProjection",
    "SiglipForImageClassification",
]


@pytest.mark.parametrize("case", INTERPOLATING)
def test_a_model_gets_what_it_takes_of_a_batch(case: str) -> None:
    model = make(case)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = model(pixel_values=images, interpolate_pos_encoding=True)[0]
        batch = {"pixel_values": images, "labels": torch.tensor([0, 1]), "name": "first", "weight": torch.ones(2)}
        assert torch.equal(run_images(model, {**batch, "interpolate_pos_encoding": True})[0], expected)
        with pytest.raises(
            InvalidDataError, match=r"does not take images of shape \(3, 24, 24\).*interpolate_pos_enc"
        ):
            run_images(model, batch)


def test_the_cure_is_named_only_where_it_is_one() -> None:
    with pytest.raises(InvalidDataError, match="does not take images") as info:
        run_images(make("Dinov2ForImageClassification"), {"pixel_values": torch.randn(2, 1, 16, 16)})
    assert "interpolate_pos_encoding" not in str(info.value)  # it interpolates always


def test_a_subclass_that_hands_keywords_on() -> None:
    class Own(type(make("ViTForImageClassification"))):  # type: ignore[misc]
        def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
            return super().forward(pixel_values, **kwargs)

    model = Own(make("ViTForImageClassification").config).eval()
    batch = {"pixel_values": torch.randn(1, 3, 24, 24), "interpolate_pos_encoding": True, "name": "first"}
    assert run_images(model, batch).logits.shape[0] == 1


def test_masks_reach_the_model_on_its_device_and_the_images_have_its_dtype() -> None:
    model = make("ViTForMaskedImageModeling").to(torch.bfloat16)
    images, masks = torch.randn(2, 3, 16, 16), torch.tensor([[True, False, True, False]] * 2)
    with torch.no_grad():
        expected = model(pixel_values=images.bfloat16(), bool_masked_pos=masks)
        got = run_images(model, {"pixel_values": images, "bool_masked_pos": masks})
    assert torch.equal(got.reconstruction, expected.reconstruction)
