"""DeepSpeed's ZeRO: what a method does between backward pass and step, which the engine would take in one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn

from ..errors import InvalidConfigError

#: settings of ZeRO that put tensors where a method cannot reach them, or that are not tried: name -> harmless values
_UNTRIED = {
    "zero_hpz_partition_size": (1,), "mics_shard_size": (-1,), "zero_quantized_weights": (False,),
    "zero_quantized_gradients": (False,), "zero_quantized_nontrainable_weights": (False,), "zenflow": (None,),
}  # fmt: skip


def check_zero(plugin: Any, model: Any) -> None:
    """Refuse a DeepSpeed plugin (accelerate's) whose stage or settings the method of a PruningModel cannot use."""
    config = plugin.hf_ds_config
    stage = config.get_value("zero_optimization.stage", 0)
    if stage not in (1, 2, 3):
        raise InvalidConfigError(f"DeepSpeed without ZeRO (stage {stage}) is DDP: leave deepspeed out")
    model.method.check_sharded(f"zero{stage}")
    for section in ("optimizer", "scheduler"):
        if section in config.config:
            raise InvalidConfigError(
                f"gates have their own learning rate, and DeepSpeed's {section} knows one: leave {section!r} out of "
                "its config; the Trainer makes one of its arguments"
            )
    for what in ("optimizer", "param"):
        device = config.get_value(f"zero_optimization.offload_{what}.device", "none")
        if device not in (None, "none"):
            raise InvalidConfigError(f"gates stay on the device: leave offload_{what} ({device}) out of ZeRO's config")
    for name, harmless in _UNTRIED.items():
        value = config.get_value(f"zero_optimization.{name}", harmless[0])
        if value not in harmless:
            raise InvalidConfigError(f"pruning does not work with {name}={value!r}: leave it out of ZeRO's config")
    if config.get_value("fp16.enabled") is True:
        raise InvalidConfigError("under DeepSpeed, fp16 scales what a method scores by: use bf16, or full precision")
    if (config.get_value("tensor_parallel.autotp_size") or 1) > 1:
        raise InvalidConfigError("units would be spread over processes by tensor parallelism: leave autotp_size out")


def keep_whole(engine: Any, parameters: Collection[Any]) -> None:
    """Let ZeRO-3 leave parameters whole on every process, as it does with small ones."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    for parameter in parameters:
        if hasattr(parameter, "ds_id") and not parameter.ds_persist:
            parameter.ds_persist = True
            offload.persistent_parameters.append(parameter)
    gather(parameters)


def gather(parameters: Iterable[Any]) -> None:
    """Make parameters that ZeRO-3 leaves whole so, where they are not yet: it keeps nothing before its first step."""
    cut = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if cut:
        cut[0].all_gather(cut)


def take_type_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Give parameters the type of a model's that ZeRO-3 has cut to pieces already: it wants one type of all."""
    types = {p.dtype for p in model.parameters() if hasattr(p, "ds_id")}
    for parameter in parameters:
        for kind in types:
            parameter.data = parameter.data.to(kind)


@torch.no_grad()
def restore_precision(parameters: Iterable[nn.Parameter]) -> None:
    """After a training in half precision, on every process: what the optimizer has stepped, in single precision."""
    from deepspeed.utils import safe_get_full_fp32_param

    for parameter in parameters:
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = safe_get_full_fp32_param(parameter).to(parameter.device)


class SteppingEngine(DeepSpeedEngineWrapper):
    """accelerate's wrapper, that lets somebody look at the gradients before the engine steps.

    What is added to gradients then counts as it is: DeepSpeed has clipped them by that time.

    Args:
        engine: DeepSpeed's.
        before_step: called after the last backward pass of an update; gives the gradients to add.
        whole: parameters that it reads, which :func:`keep_whole` has had.
    """

    def __init__(
        self,
        engine: Any,
        before_step: Callable[[], list[tuple[nn.Parameter, torch.Tensor]]],
        whole: Collection[nn.Parameter] = (),
    ) -> None:
        super().__init__(engine)
        self._before_step, self._whole = before_step, whole
        self._added: list[tuple[torch.Tensor, int, torch.Tensor]] = []
        engine.optimizer.optimizer.register_step_pre_hook(self._add)

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """As the parent's."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            gather(self._whole)
            self._added = [self._place(parameter, grad.flatten()) for parameter, grad in self._before_step()]
            self.engine.step()

    def _place(self, parameter: Any, grad: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        """(flat tensor that this process steps, first element in it, what to add from there)."""
        zero = self.engine.optimizer
        if hasattr(parameter, "ds_id"):
            group, first, _ = zero.grad_position[zero.get_param_id(parameter)]
            size = parameter.ds_tensor.numel()
            mine = grad[size * parameter.ds_zero_partition_rank :][:size]
            return zero.fp32_partitioned_groups_flat[group], first, mine
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.empty(0), 0, grad[:0]
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        address = mapping.lp_fragment_address
        return flat, mapping.hp_fragment_address.start, grad[address.start : address.start + address.numel]

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for flat, first, grad in self._added:
            if id(flat) in stepped and flat.grad is not None:
                flat.grad[first : first + len(grad)].add_(grad)
