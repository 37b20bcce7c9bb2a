"""Augmentation of batches: sizes, labels, Mixup and CutMix by hand, the repeated order, what training sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vitprune.contrib.augment import Augmentation, AugmentationConfig, AugmentedTrainer, RandomCrop, RepeatedSampler
from hf_vitprune.errors import InvalidConfigError, MissingExtraError
from hf_vitprune.utils import extras
from pruning_runs import VIT, gated, state_of, trainer
from tiny import SIZE, make

NOTHING: dict[str, Any] = {"rand_augment": (0, 0), "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    """Image i has the value i everywhere, and class i."""
    numbers = torch.arange(float(count))
    return {"pixel_values": numbers.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone(), "labels": numbers.long()}


def made(**settings: Any) -> Augmentation:
    return Augmentation(AugmentationConfig(**{**NOTHING, **settings}), MEAN, STD, 6)


def test_labels_are_smoothed() -> None:
    out = made(smoothing=0.12)(batch())
    expected = torch.full((6, 6), 0.02) + 0.88 * torch.eye(6)
    torch.testing.assert_close(out["labels"], expected)
    assert torch.equal(out["pixel_values"], batch()["pixel_values"])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_an_image_is_mixed_as_its_label_says(kind: str) -> None:
    """The mean of a mixed image is the mean of its classes' values, by the shares in its label."""
    shares = set()
    for seed in range(6):
        torch.manual_seed(seed)
        out = made(**{kind: 0.8})(batch())
        labels, pixels = out["labels"], out["pixel_values"]
        torch.testing.assert_close(labels.sum(1), torch.ones(6))
        torch.testing.assert_close(labels @ torch.arange(6.0), pixels.mean((1, 2, 3)), rtol=1e-5, atol=1e-5)
        assert (labels > 0).sum(1).max() <= 2 and torch.diagonal(labels).min() > 0
        values = {len(image.unique()) for image in pixels}
        assert values == {1} if kind == "mixup" else values <= {1, 2}  # all pixels alike, or a rectangle
        shares |= {round(value, 4) for value in labels.max(1).values.tolist() if value < 1}
    assert len(shares) > 3  # drawn anew for every batch, one for all images of it


def test_the_choice_between_both_and_erasing() -> None:
    torch.manual_seed(0)
    both = made(mixup=0.8, cutmix=1.0)
    kinds = [{len(image.unique()) for image in both(batch())["pixel_values"]} == {1} for _ in range(60)]
    assert 15 < sum(kinds) < 50
    erased = made(erasing=1.0)(batch())["pixel_values"]
    lost = (erased[1:] == 0).float().mean((1, 2, 3))
    assert ((lost > 0.01) & (lost < 0.5)).all()


def test_rand_augment_works_on_the_pictures_themselves() -> None:
    """Between undoing and doing the normalisation: what comes out are pictures of 0 to 1."""
    pictures = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    torch.manual_seed(1)
    out = made(rand_augment=(2, 9))({"pixel_values": (pictures - mean) / std, "labels": torch.arange(8) % 6})
    back = out["pixel_values"] * std + mean
    assert back.shape == pictures.shape and back.min() > -1e-5 and back.max() < 1 + 1e-5
    assert not torch.allclose(back, pictures, atol=1e-2)


def test_crops() -> None:
    image = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    torch.manual_seed(0)
    crops = [RandomCrop(16)(image) for _ in range(3)]
    assert {crop.shape for crop in crops} == {(16, 16, 3)} and {crop.dtype for crop in crops} == {np.dtype(np.uint8)}
    assert not np.array_equal(crops[0], crops[1])


def test_the_repeated_order() -> None:
    sampler = RepeatedSampler(10, 3, seed=5)
    first = list(sampler)
    assert len(sampler) == len(first) == 10 and first[0] == first[1] == first[2] != first[3] and len(set(first)) == 4
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_the_order_follows_from_the_seed_of_the_data_zero_too(tmp_path: Path) -> None:
    augmentation = Augmentation(AugmentationConfig(repeats=2), MEAN, STD, 5)
    for settings, seed in (({"seed": 3}, 3), ({"seed": 3, "data_seed": 0}, 0), ({"seed": 3, "data_seed": 7}, 7)):
        one = trainer(
            make(VIT), tmp_path, AugmentedTrainer, train_dataset=_Classes(), augmentation=augmentation, **settings
        )
        assert list(one._get_train_sampler()) == list(RepeatedSampler(16, 2, seed))


@pytest.mark.parametrize("wrapped", [False, True])
def test_training_with_it_resumes_exactly(wrapped: bool, tmp_path: Path) -> None:
    def run(resume: str | None = None) -> Any:
        model = gated() if wrapped else make(VIT)
        augmentation = Augmentation(AugmentationConfig(repeats=2), MEAN, STD, 5)
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps"}
        one = trainer(model, tmp_path, AugmentedTrainer, train_dataset=_Classes(), augmentation=augmentation, **steps)
        one.train(resume_from_checkpoint=resume)
        return one

    whole = run()
    before = make(VIT).state_dict()["classifier.weight"]
    assert not torch.equal(
        state_of(whole.model)["model.classifier.weight" if wrapped else "classifier.weight"], before
    )
    # the mean loss of soft labels, whatever the number of classes
    assert whole.state.log_history[0]["loss"] == pytest.approx(1.7, abs=0.5)
    expected = state_of(whole.model)
    again = run(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


class _Classes(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": pixels, "labels": i % 5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"erasing": 2}, "erasing is a share"),
        ({"smoothing": -0.1}, "smoothing is a share"),
        ({"mixup": -1}, "mixup is the alpha"),
        ({"cutmix": float("nan")}, "cutmix is the alpha"),
        ({"repeats": 0}, "repeats is a whole number"),
        ({"rand_augment": (2, 31)}, "rand_augment is"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        AugmentationConfig(**settings)


def test_without_kornia_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"hf_vitprune\[augment\]"):
        made()
