"""Recovery: without labels, the best weights stay, the start among them; bad input at the door."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState

from hf_vitprune import DistillationConfig, PruningPlan, prune
from hf_vitprune.errors import InvalidConfigError, InvalidDataError
from hf_vitprune.losses.features import feature_loss, token_weights
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.training.keep_best import KeepBest
from hf_vitprune.training.recovery import Recovery, hold_out, recover
from pruning_runs import VIT, Images, state_of
from tiny import assert_same, images, make, run

QUICK = {"steps": 8, "checks": 4, "batch_size": 4, "held_out": 0.25}


def pair(name: str, *units: str) -> tuple[Any, Any, PruningPlan]:
    dense = make(name)
    plan = PruningPlan.random(dense, 0.5, units or ("mlp",))
    return dense, prune(dense, plan), plan


def held_out_loss(small: Any, dense: Any, pixels: torch.Tensor) -> float:
    mine, theirs = (run(m, pixels)["last_hidden_state"] for m in (small, dense))
    weights = token_weights(Architecture.of(dense), mine.shape[1], mine.device)
    return float(feature_loss(mine, theirs, "standardised", weights).mean())


def test_it_ends_with_the_weights_that_were_best_on_held_out_images() -> None:
    dense, small, _ = pair("ViTModel")
    pixels, before = images(16), state_of(dense)
    done = recover(small, dense, pixels, Recovery(learning_rate=1e-3, **QUICK))
    assert sorted(done.losses) == [0, 2, 4, 6, 8] and done.held_out == 4
    assert done.losses[done.best] == min(done.losses.values()) < done.losses[0]
    found = held_out_loss(small, dense, pixels[[0, 4, 8, 12]])
    assert found == pytest.approx(done.losses[done.best], rel=1e-4)
    assert f"step {done.best} of 8 stay" in done.one_line and not small.training
    assert_same(dense.state_dict(), before)


def test_a_training_that_only_harms_leaves_the_start() -> None:
    dense, small, _ = pair("ViTModel")
    before = state_of(small)
    done = recover(small, dense, images(16), Recovery(learning_rate=10.0, **QUICK))
    assert done.best == 0 and "whose weights stay" in done.one_line
    assert_same(small.state_dict(), before)


def test_random_parts_of_images_are_trained_on_and_whole_ones_judged() -> None:
    pixels = images(16)
    found = {}
    for crops in (None, 0.3):
        dense, small, _ = pair("ViTModel")
        done = recover(small, dense, pixels, Recovery(learning_rate=1e-3, crops=crops, **QUICK))
        assert held_out_loss(small, dense, pixels[[0, 4, 8, 12]]) == pytest.approx(done.losses[done.best], rel=1e-4)
        found[crops] = done.losses
    assert found[None][0] == found[0.3][0] and found[None][8] != found[0.3][8]


def test_bfloat16_leaves_weights_in_their_own_type() -> None:
    dense, small, _ = pair("ViTModel")
    done = recover(small, dense, images(16), Recovery(learning_rate=1e-3, bf16=True, **QUICK))
    assert done.losses[done.best] < done.losses[0]
    assert {p.dtype for p in small.parameters()} == {torch.float32}


def test_images_to_choose_by_may_be_given() -> None:
    dense, small, _ = pair("ViTModel")
    held_out = images(3, seed=1)
    done = recover(small, dense, images(8), Recovery(learning_rate=1e-3, **QUICK), held_out=held_out)
    assert done.held_out == 3
    assert held_out_loss(small, dense, held_out) == pytest.approx(done.losses[done.best], rel=1e-4)


def test_labels_and_heads_are_not_looked_at() -> None:
    dense, small, _ = pair(VIT)
    head = small.classifier.weight.clone()
    recover(small, dense, Images(8), Recovery(learning_rate=1e-3, **QUICK))
    assert torch.equal(small.classifier.weight, head)


def test_a_narrow_stream_needs_its_plan() -> None:
    dense, small, plan = pair("Dinov2Model", "embedding")
    with pytest.raises(InvalidConfigError, match="nothing says which channels"):
        recover(small, dense, images(8), Recovery(**QUICK))
    done = recover(small, dense, images(32), Recovery(learning_rate=1e-3, **{**QUICK, "steps": 24}), plan=plan)
    assert done.losses[done.best] < done.losses[0]


def test_bad_input() -> None:
    dense, small, _ = pair("ViTModel")
    for data, changes, message in (
        (images(1), {}, "one image"),
        (images(2), {"held_out": 0.9}, "none is left to train on"),
        (images(4, size=24), {}, "its own size is 16"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            recover(small, dense, data, Recovery(**{**QUICK, **changes}))
    for changes, message in (
        ({"steps": 0}, "steps"),
        ({"held_out": 1.0}, "held_out"),
        ({"warmup": 2}, "warmup"),
        ({"crops": 0}, "crops"),
    ):
        with pytest.raises(InvalidConfigError, match=message):
            Recovery(**changes)
    with pytest.raises(InvalidConfigError, match="by features"):
        recover(small, dense, images(4), distillation=DistillationConfig("soft"))


class Dies(TrainerCallback):
    """Ends a training in the middle."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("dies", [1, 5, 7])
def test_cut_off_and_resumed_is_as_if_never_cut_off(dies: int, tmp_path: Path) -> None:
    settings = Recovery(learning_rate=3e-3, crops=0.3, **QUICK)
    dense, small, _ = pair("ViTModel")
    start, pixels = state_of(small), images(16)
    done = recover(small, dense, pixels, settings)
    again = copy.deepcopy(small)
    again.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        recover(again, dense, pixels, settings, folder=tmp_path, callbacks=[Dies(dies)])
    again.load_state_dict(start)
    resumed = recover(again, dense, pixels, settings, folder=tmp_path)
    assert resumed == done
    assert_same(again.state_dict(), small.state_dict())


def test_the_best_weights_are_found_again(tmp_path: Path) -> None:
    """The best is the start, which the checkpoint that a training goes on from has not got."""
    settings = Recovery(learning_rate=10.0, **QUICK)
    dense, small, _ = pair("ViTModel")
    before, pixels = state_of(small), images(16)
    with pytest.raises(KeyboardInterrupt):
        recover(small, dense, pixels, settings, folder=tmp_path, callbacks=[Dies(7)])
    done = recover(small, dense, pixels, settings, folder=tmp_path)
    assert done.best == 0
    assert_same(small.state_dict(), before)


def test_several_processes_keep_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None sees another's file before it is whole, and a file that another has removed already is not missed."""
    model, one, other = torch.nn.Linear(2, 2), KeepBest(folder=tmp_path), KeepBest(folder=tmp_path)
    seen: list[list[Path]] = []

    def halting(tensors: dict[str, torch.Tensor], path: Path) -> None:
        seen.append(list(tmp_path.glob("best-*.safetensors")))
        save_file(tensors, path)

    monkeypatch.setattr("hf_vitprune.training.keep_best.save_file", halting)
    for step, loss in ((1, 0.5), (2, 0.25)):
        for callback in (one, other):
            state = TrainerState(global_step=step)
            callback.on_evaluate(None, state, None, model=model, metrics={"eval_loss": loss})
    assert seen[0] == [] and sorted(path.name for path in seen[2]) == ["best-1.safetensors"]
    files = list(tmp_path.glob("best-*.safetensors"))
    one.on_save(None, TrainerState(), None)  # type: ignore[arg-type]
    monkeypatch.setattr(Path, "glob", lambda *_: iter(files))
    other.on_save(None, TrainerState(), None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["best-2.safetensors"]


def test_images_are_held_out_of_as_many_as_there_are() -> None:
    """Evenly spaced; and the time grows with their number, not with its square (minutes, for these)."""
    assert hold_out(10, 0.25) == ([1, 2, 3, 4, 6, 7, 8, 9], [0, 5])
    begun = time.process_time()
    rest, apart = hold_out(300_000, 0.1)
    assert len(apart) == 30_000 and len(rest) == 270_000 and time.process_time() - begun < 10
