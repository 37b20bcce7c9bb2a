"""The running average of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ema import FILE, EmaCallback
from hf_vitprune.errors import InvalidConfigError, ResumeError
from pruning_runs import VIT, gated, trainer
from tiny import make


class Weights(TrainerCallback):
    """Notes a weight after every step."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(model.named_parameters())[NAME[type(model).__name__ == "PruningModel"]].detach().clone())


NAME = ("classifier.weight", "model.classifier.weight")


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_average_by_hand_resumed_and_put_back(wrapped: bool, tmp_path: Path) -> None:
    """It starts at the weights after the first step; w <- .8 w + .2 new after each further one."""
    weights, average = Weights(), EmaCallback(0.8)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    model = gated() if wrapped else make(VIT)
    run = trainer(model, tmp_path, callbacks=[weights, average], **settings)
    run.train()
    expected = weights.rows[0]
    for row in weights.rows[1:]:
        expected = 0.8 * expected + 0.2 * row
    name = NAME[wrapped]
    own = dict(model.named_parameters())[name]
    trained = own.detach().clone()
    with average.averaged(model):
        torch.testing.assert_close(own, expected)
    assert torch.equal(own, trained)
    assert {"eval_loss"} <= average.evaluated(run).keys() and torch.equal(own, trained)
    again = EmaCallback(0.8)
    resumed = trainer(gated() if wrapped else make(VIT), tmp_path, callbacks=[again], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.average is not None
    torch.testing.assert_close(dict(again.average.module.named_parameters())[name], expected)
    (tmp_path / "checkpoint-2" / FILE).unlink()
    resumed = trainer(gated() if wrapped else make(VIT), tmp_path, callbacks=[EmaCallback(0.8)], **settings)
    with pytest.raises(ResumeError, match="kept no average"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_impossible_decay() -> None:
    with pytest.raises(InvalidConfigError, match=r"in \(0, 1\)"):
        EmaCallback(1.0)
