"""A Trainer whose PruningModel may be spread over processes, by FSDP2 or ZeRO: gates stay whole."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from ..errors import InvalidConfigError
from ..utils.processes import broadcast, mean_gradients
from ..utils.sharding import is_sharded, whole_state
from .callback import PruningCallback
from .model import PruningModel
from .zero import SteppingEngine, keep_whole, take_type_of


class ShardedTraining(Trainer):
    """What a ``Trainer`` leaves out for a model that is spread over processes.

    A model that was sharded when it was loaded (``DistributedConfig(fsdp_size=N)``): its checkpoints hold whole
    tensors. A Trainer does not resume from them. One that accelerate shards (``fsdp_version: 2``): gates and masks
    are left out, their gradients averaged once a step; its checkpoints are accelerate's, and resumable. DeepSpeed
    (ZeRO): the method looks at the gradients before the engine steps; checkpoints are DeepSpeed's, and resumable.
    """

    model: Any

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As the parent's. A method's parameters, masks and scores are not to be sharded."""
        if getattr(self.args, "deepspeed_plugin", None) is not None and not self.is_deepspeed_enabled:
            raise InvalidConfigError(
                "accelerate runs this training without DeepSpeed, as it does on CPUs under ACCELERATE_USE_CPU: leave "
                "that out, or deepspeed"
            )
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not spread or not isinstance(self.model, PruningModel):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        model, method = self.model, self.model.method
        callback = next(c for c in self.callback_handler.callbacks if isinstance(c, PruningCallback))
        callback.check_images(train_dataloader, model)
        callback.checked = True  # once sharded, no pass may begin inside of the model
        if self.is_deepspeed_enabled:
            take_type_of(model.model, method.parameters())
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            gates = list(method.parameters())
            keep_whole(self.deepspeed, gates)
            engine = SteppingEngine(self.deepspeed, lambda: callback.before_step(model, self.state), gates)
            self.accelerator.deepspeed_engine_wrapped = engine
            callback.by_engine = True
            return prepared
        plugin = self.accelerator.state.fsdp_plugin
        plugin.ignored_modules = [*(plugin.ignored_modules or []), method]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._sync_replicated_trainable_parameters(self.model)
        return prepared

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """As the parent's, but for the method's: those are averaged below, also where some got no gradient."""
        if isinstance(model, PruningModel):
            broadcast(model.method)
            model = model.model
        super()._sync_replicated_trainable_parameters(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; after the last micro-batch of an update the method's gradients are averaged."""
        loss = super().training_step(*args, **kwargs)
        gated = isinstance(self.model, PruningModel) and not self.is_deepspeed_enabled
        if gated and self.accelerator.sync_gradients and is_sharded(self.model.parameters()):
            mean_gradients(self.model.method.parameters())
        return loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled and isinstance(self.model, PruningModel):
            _complete(self.optimizer)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        loaded_sharded = self.is_distributed_loading_by_transformers and isinstance(self.model, PruningModel)
        if state_dict is None and loaded_sharded:
            state_dict = whole_state(self.model)
        super()._save(output_dir, state_dict)


def _complete(optimizer: Any) -> None:
    """Zeros for what the optimizer remembers of parameters that got no gradient so far: as if it had begun with them.

    A sharded checkpoint is only read where it has the state of all.
    """
    state = optimizer.state
    for group in optimizer.param_groups:
        known: dict[str, Any] = next((state[p] for p in group["params"] if state.get(p)), {})
        for parameter in group["params"]:
            if known and parameter.requires_grad and not state.get(parameter):
                state[parameter] = {
                    name: torch.zeros_like(value if value.ndim == 0 else parameter)
                    for name, value in known.items()
                    if isinstance(value, torch.Tensor)
                }
