"""What stands beside the engine works on towers by themselves; a bigger model is refused, and the cure works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_vitprune import PruningPlan
from hf_vitprune.contrib.augment import AugmentedTrainer, depths
from hf_vitprune.contrib.drop_path import attach_drop_path
from hf_vitprune.contrib.fuse import fuse_bn
from hf_vitprune.contrib.sparsity import check_sparsity, sparsify
from hf_vitprune.contrib.spvit_start import released_start
from hf_vitprune.errors import InvalidPlanError, UnsupportedModelError
from pruning_runs import arguments
from tiny_composites import dual, llava


@pytest.mark.parametrize(("make", "path"), [(dual("CLIP"), "vision_model"), (llava, "model.vision_tower")])
def test_a_bigger_model_is_refused_and_its_tower_taken(make: Callable[[], Any], path: str, tmp_path: Path) -> None:
    model = make()[0]
    plan = PruningPlan.random(model, 0.4, units=["mlp"], part="vision")
    for wrong in (
        lambda: attach_drop_path(model, 0.5),
        lambda: sparsify(model),
        lambda: fuse_bn(model),
        lambda: depths(model),
        lambda: released_start(model, plan),
        lambda: AugmentedTrainer(model, arguments(tmp_path), layer_decay=0.5),
    ):
        with pytest.raises(UnsupportedModelError, match="is a bigger model") as raised:
            wrong()
        assert f"model.get_submodule('{path}')" in str(raised.value)
    tower = model.get_submodule(path)
    layers = tower.config.num_hidden_layers
    assert max(depths(tower).values()) == layers + 1
    masks = sparsify(tower)
    assert check_sparsity(tower) == sum(mask.numel() for mask in masks.values()) // 2
    assert len(attach_drop_path(tower, 0.5)) == 2 * (layers - 1)
    with pytest.raises(InvalidPlanError, match="no convolution mixer"):
        fuse_bn(tower)
    AugmentedTrainer(tower, arguments(tmp_path), layer_decay=0.5)
