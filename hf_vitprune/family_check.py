"""A family proves itself before it is registered: on a tiny random model, everything that pruning relies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .cost import count
from .errors import UnsupportedModelError, VitPruneError
from .families import UNITS, Family
from .modeling import registry
from .modeling.structure import layer_paths
from .plan.plan import PruningPlan
from .pruning import mask, prune
from .surgery.cuts import side_by_side

#: of a tiny config, where the family gives no other: four heads of eight, 2 x 2 patches
TINY = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
#: largest difference between two ways to compute the same, relative to the largest value
TOLERANCE = 1e-5


def register_family(family: Family) -> None:
    """Add one's own family: its facts for the engine, and pruned classes for its transformers classes.

    Before, the family must pass :func:`check_family`, which takes a second or two.

    Raises:
        ValueError: the model type is taken.
        UnsupportedModelError: it did not pass; the message says what is wrong.
    """
    registry.register_family(family)
    try:
        check_family(family)
    except Exception:
        registry.forget_family(family)
        raise


def check_family(family: Family) -> None:
    """Tests of a registered family on a tiny random model; UnsupportedModelError with the first that failed, and why.

    Norms stand where it says. The uncut twin computes what the stock model does. Each unit that it claims can be cut,
    with the result of a mask. Counts are those of the modules; a fresh model of the small config takes the weights.
    """
    model = tiny_model(family)
    inputs = family.inputs(model.config, task=registry.pruned_model_class(type(model)).pruning_task)  # type: ignore
    with torch.no_grad():
        dense = _step(family, "the description of its layers", lambda: PruningPlan.dense(model))
        _step(family, "the place of its norms", lambda: _check_norms(family, model, dense, inputs))
        _step(family, "the count of its cost", lambda: _check_count(model, inputs))
        _step(family, "the uncut twin", lambda: _check_plan(model, dense, inputs, changes=False))
        for unit in (unit for unit in UNITS if unit in dense.source.units):
            _step(
                family,
                f"the unit {unit!r}",
                lambda unit=unit: _check_plan(
                    model, PruningPlan.random(model, 0.5, (unit,), round_to=1, seed=0), inputs
                ),
            )


class _Failed(Exception):
    """A test of a family that did not hold."""


#: what a wrong description of a family can make code raise
_ERRORS = (_Failed, VitPruneError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _step(family: Family, what: str, run: Any) -> Any:
    try:
        return run()
    except _ERRORS as e:
        cure = ": leave it out of the family's units, or mend its description" if what.startswith("the unit") else ""
        raise UnsupportedModelError(f"the family {family.model_type!r} is refused; {what}: {e}{cure}") from e


def tiny_model(family: Family) -> PreTrainedModel:
    """A random model of the family, with weights large enough for a wrong slice to show."""
    config_class = CONFIG_MAPPING[family.model_type]
    sizes = {name: value for name, value in TINY.items() if family.sub_config or hasattr(config_class, name)}
    fields = {**sizes, **family.tiny}
    config = config_class(**({family.sub_config: fields} if family.sub_config else fields))
    config._attn_implementation = "eager"
    classes = registry.stock_classes(family)
    if not classes:
        raise UnsupportedModelError(f"no Auto class maps a model for {config_class.__name__}: register one first")
    model = min(classes, key=lambda stock: not stock.__name__.endswith("ForImageClassification"))(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if parameter.ndim == 1 and name.endswith(("weight", "lambda1")) else noise)
    return model.eval()


def _check_count(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    cost, real = count(model), sum(parameter.numel() for parameter in model.parameters())
    if cost.params != real:
        raise _Failed(f"it has {real} parameters, and {cost.params} are counted")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels are not counted
        model(**inputs)
    if cost.macs != counter.get_total_flops() // 2:
        raise _Failed(f"{counter.get_total_flops() // 2} multiply-adds are executed, and {cost.macs} counted")


def _check_norms(family: Family, model: PreTrainedModel, dense: PruningPlan, inputs: dict[str, Any]) -> None:
    """Whether the norms run before the branches or after: a mask must silence what writes into the stream."""
    calls: list[str] = []
    paths = layer_paths(model, dense.source)[0]
    parts = {"norm1": paths.norm1, "attention": paths.attention, "norm2": paths.norm2, "fc1": paths.fc1[0]}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for name, path in parts.items()
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    for norm, branch in (("norm1", "attention"), ("norm2", "fc1")):
        if (calls.index(branch) < calls.index(norm)) != family.post_norm:
            where = "in front of" if family.post_norm else "behind"
            raise _Failed(f"{norm} stands {where} the branch: say post_norm={not family.post_norm}")


def _check_plan(model: PreTrainedModel, plan: PruningPlan, inputs: dict[str, Any], changes: bool = True) -> None:
    small = prune(model, plan, allow_unchanged=True, stock=False)
    before, ours, masked = (dict(tensors_of(m(**inputs))) for m in (model, small, mask(model, plan)))
    worst = max(difference(ours[name], masked[name], plan) for name in ours)
    if not worst < TOLERANCE:
        raise _Failed(f"the pruned model and the masked one differ by {worst:.1e}")
    change = max(difference(masked[name], before[name], plan) for name in before)
    if changes and not change > TOLERANCE:
        raise _Failed("to switch it off changes nothing in the model's output")
    if not changes and not change < TOLERANCE:
        raise _Failed(f"it differs from the stock model by {change:.1e}")
    real = sum(parameter.numel() for parameter in small.parameters())
    if count(small).params != real:
        raise _Failed(f"the pruned model has {real} parameters, and {count(small).params} are counted")
    fresh: nn.Module = type(small)(small.config).eval()
    fresh.load_state_dict(small.state_dict(), strict=True)
    if any(not torch.equal(tensor, ours[name]) for name, tensor in tensors_of(fresh(**inputs))):
        raise _Failed("a fresh model of the pruned one's config and weights computes something else")


def tensors_of(output: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every floating tensor of an output, those in tuples numbered."""
    for key, value in output.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield key, value
        elif isinstance(value, (tuple, list)):
            yield from ((f"{key}.{i}", one) for i, one in enumerate(value) if isinstance(one, torch.Tensor))


def difference(ours: torch.Tensor, theirs: torch.Tensor, plan: PruningPlan) -> float:
    """Largest difference, relative to the largest value; of the kept residual channels, where there are fewer."""
    if ours.shape != theirs.shape and plan.embedding is not None:
        axis = next(i for i, (a, b) in enumerate(zip(ours.shape, theirs.shape, strict=True)) if a != b)
        kept = side_by_side(torch.tensor(plan.embedding), plan.source.hidden_size, theirs.shape[axis])
        theirs = theirs.index_select(axis, kept)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))
