"""Training a truncated model again: the rates of the three schedules, and the weights that they start from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_vitprune import truncate
from hf_vitprune.contrib.retraining import fresh_adapters, retrain, retraining_arguments
from hf_vitprune.errors import AdapterError, InvalidConfigError
from pruning_runs import DROPOUT, VIT, Patterns, arguments, lora_model, state_of
from tiny import assert_same, make, run


class Rates(TrainerCallback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def retrained(model: Any, folder: Path, schedule: str, **changes: Any) -> tuple[Any, list[float]]:
    """(model, learning rates) of 20 steps with a peak of 0.1."""
    rates = Rates()
    args = arguments(folder, max_steps=-1, num_train_epochs=3, learning_rate=0.1, logging_strategy="no")
    made = retrain(model, args, schedule, train_dataset=Patterns(), callbacks=[rates], **{"epochs": 4, **changes})
    assert args.learning_rate == 0.1 and args.num_train_epochs == 3  # the caller's are left alone
    return made.model, rates.seen


@pytest.mark.parametrize("schedule", ["CLR", "TFS"])
def test_cyclic_restarts_warm_up_to_the_peak_and_decay(schedule: str, tmp_path: Path) -> None:
    _, rates = retrained(truncate(lora_model(), 2), tmp_path, schedule)
    assert len(rates) == 20 and rates[:3] == pytest.approx([0.0, 0.05, 0.1])  # a tenth of the steps
    half = 2 + 9
    assert rates[half] == pytest.approx(0.05) and all(a > b for a, b in pairwise(rates[2:]))
    assert rates[-1] < 0.001


def test_a_lowest_rate_stays(tmp_path: Path) -> None:
    """Cosine from 0.1 at step 2 of 20 to 0.02: at step 11, half of the way, 0.06; fine-tuning has none."""
    floor = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.02}}
    args = arguments(tmp_path, max_steps=20, learning_rate=0.1, logging_strategy="no", **floor)
    rates = Rates()
    retrain(truncate(lora_model(), 2), args, "CLR", train_dataset=Patterns(), callbacks=[rates])
    assert rates.seen[2] == pytest.approx(0.1) and rates.seen[11] == pytest.approx(0.06) and min(rates.seen[3:]) > 0.02
    assert retraining_arguments(args, "FT").lr_scheduler_kwargs in (None, {})


def test_fine_tuning_is_at_one_small_rate(tmp_path: Path) -> None:
    assert retrained(truncate(lora_model(), 2), tmp_path, "FT")[1] == pytest.approx([0.001] * 20)
    assert retrained(make(VIT), tmp_path, "FT", share=0.5)[1] == pytest.approx([0.05] * 20)


@pytest.mark.parametrize("schedule", ["CLR", "FT", "TFS"])
def test_what_a_schedule_starts_from(schedule: str, tmp_path: Path) -> None:
    small = truncate(lora_model(), 2)
    before = state_of(small)
    model, _ = retrained(small, tmp_path, schedule)
    now = state_of(model)
    assert now.keys() == before.keys() and (model is small) == (schedule != "TFS")
    frozen = {name for name in before if "lora_" not in name and "modules_to_save" not in name}
    frozen = {name for name in frozen if "original_module" not in name or schedule != "TFS"}
    assert frozen and all(torch.equal(now[name], before[name]) for name in frozen)
    moved = {name for name in set(before) - frozen if not torch.equal(now[name], before[name])}
    assert any("lora_B" in name for name in moved) and any("modules_to_save" in name for name in moved)


def test_fresh_adapters_do_nothing_yet_and_the_head_is_new() -> None:
    full = lora_model()
    small = truncate(full, 2)
    before = state_of(small)
    fresh = fresh_adapters(small, seed=1)
    plain = truncate(make(VIT, **DROPOUT), 2)
    hidden = [run(model.eval(), output_hidden_states=True)["hidden_states.2"] for model in (fresh, plain)]
    assert torch.equal(hidden[0], hidden[1])  # LoRA starts at zero
    heads = [model.get_base_model().classifier.modules_to_save["default"].weight for model in (fresh, small)]
    assert not torch.equal(*heads) and heads[0].std() < 0.05 < heads[1].std()
    assert_same(state_of(fresh_adapters(small, seed=1)), state_of(fresh))
    assert any(not torch.equal(t, state_of(fresh)[n]) for n, t in state_of(fresh_adapters(small, seed=2)).items())
    assert_same(state_of(small), before)  # the old model is left alone
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in small.named_parameters()
    }
    assert fresh.peft_config["default"].peft_type == small.peft_config["default"].peft_type


def test_training_from_scratch_needs_the_pretrained_layers(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="no adapters"):
        retrained(truncate(make(VIT), 2), tmp_path, "TFS")
    changed = get_peft_model(make(VIT), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="pissa.*changed them"):
        fresh_adapters(changed)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "clr"}, "one of CLR, FT, TFS"), ({"warm_up": 1.0}, "warm_up"), ({"warm_up": -0.1}, "warm_up"),
        ({"schedule": "FT", "share": 0}, "share"), ({"schedule": "FT", "share": 2}, "share"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match=words):
        retraining_arguments(arguments(tmp_path), **settings)
