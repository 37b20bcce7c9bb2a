"""scikit-learn's 1797 handwritten digits in the shape of a VTAB-1k task: 800 + 200 images to train on, 797 to test."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_vitprune.utils import data
from hf_vitprune.utils.sources import built_in_digits

from .hub import ColumnReader
from .images import Images
from .tasks import DIGITS, TEST, TRAIN, VALIDATION


def read_digits() -> dict[str, Images]:
    """train800, val200 and test; the classes are in the same shares in each, and the split is always the same."""
    everything = DIGITS.test_images + 1000
    loaded = data.load_images(data.DIGITS, eval_share=DIGITS.test_images / everything, seed=0, parts=built_in_digits())
    parts = loaded.train.train_test_split(test_size=200, seed=0, stratify_by_column=loaded.label_column)
    splits = {TRAIN: parts["train"], VALIDATION: parts["test"], TEST: loaded.evaluation}

    def images(dataset: Any) -> Images:
        labels = np.asarray(dataset[loaded.label_column][:], dtype=np.int64)
        return Images(labels, ColumnReader(dataset, loaded.image_column))

    return {split: images(dataset) for split, dataset in splits.items()}
