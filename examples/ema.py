"""A running average of the weights while a model trains, kept through checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vitprune.errors import InvalidConfigError, ResumeError

FILE = "ema.safetensors"


class EmaCallback(TrainerCallback):
    """``average = decay * average + (1 - decay) * weights`` after every optimizer step (DeiT: 0.99996).

    Args:
        decay: in (0, 1).

    Raises:
        InvalidConfigError: another decay.
        ResumeError: when training begins, the checkpoint has no average.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise InvalidConfigError(f"the decay of an average lies in (0, 1), not {decay!r}")
        self.decay = decay
        self.average: AveragedModel | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if not state.global_step:
            return
        path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FILE
        if not path.is_file():
            raise ResumeError(f"{path} is missing: the interrupted run kept no average. Leave it out, or start anew")
        _fill(self.average.module, load_file(path))
        self.average.n_averaged.fill_(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.average is not None
        self.average.update_parameters(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and self.average is not None and folder.is_dir():
            tensors = {n: p.detach().contiguous().clone() for n, p in self.average.module.named_parameters()}
            save_file(tensors, folder / FILE)

    @contextmanager
    def averaged(self, model: Any) -> Iterator[None]:
        """While it is open, ``model`` has the average for its parameters."""
        assert self.average is not None
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        _fill(model, dict(self.average.module.named_parameters()))
        try:
            yield
        finally:
            _fill(model, own)

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """What ``trainer.evaluate()`` says of the average."""
        with self.averaged(trainer.model):
            metrics: dict[str, float] = trainer.evaluate()
        return metrics


@torch.no_grad()
def _fill(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
