"""Exact resume for Trainer checkpoints of stock models.

``save_pretrained`` writes tensors under their names on the Hub, which for many vision models are not those of the
modules any more (``vit.encoder.layer.0.attention.attention.query.weight``, ``vit.layers.0.attention.q_proj.weight``).
``from_pretrained`` translates; ``Trainer``, on ``resume_from_checkpoint`` and ``load_best_model_at_end``, calls
``load_state_dict(..., strict=False)`` and leaves those tensors as they are, with only a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from ..errors import ResumeError

#: a name in a checkpoint that speaks of a repeated layer, whatever the family calls the list ("layers.3.", "layer.3.")
_IN_A_LAYER = re.compile(r"(?:^|\.)\d+\.")
#: what PEFT calls the original module inside its wrappers; everything beside it belongs to an adapter
_WRAPPED_BY_PEFT = ("base_layer", "original_module")


def enable_exact_resume(model: PreTrainedModel) -> None:
    """Make ``load_state_dict`` accept what ``save_pretrained`` wrote, and refuse to restore the layers only in part.

    A hook in front of it applies the conversions of ``from_pretrained`` (renamed, split and fused tensors). It looks
    at the repeated layers only, and tells a failed restore from a partial one that was meant:

    - Nothing of the layers may be loaded: a new head, the weights of PEFT adapters (with the biases that they train).
    - Some tensors of the layers under their right names, and no foreign ones, may be one shard of several. Until later
      calls have brought the rest, ``forward`` raises ``ResumeError``: so is a checkpoint with fewer layers found out.
    - Tensors of the layers that are missing, while the checkpoint has layer tensors that nothing in the model is
      called after, are a ``ResumeError`` before a single tensor is copied.
    - Tensors too many, with none missing, are left to PyTorch's and the Trainer's own reporting.
    """
    hooks = model._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _before_load for hook in hooks):
        # a plain function, not a closure over the model: copies and pickles of the model keep a hook of their own
        model.register_load_state_dict_pre_hook(_before_load)


def convert_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names (and in the pieces) that ``model.state_dict()`` uses.

    A tensor with no place in the model keeps its name. Nothing is copied except what a conversion splits or fuses.
    """
    own = set(model.state_dict(keep_vars=True))
    converted, rest = _apply(get_model_conversion_mapping(model), state_dict, own, model)
    # what a ``key_mapping`` renamed in ``from_pretrained`` is written back under its old name: only the model knows it
    remembered = getattr(model, "_weight_conversions", None)
    if rest and remembered:
        more, rest = _apply(remembered, rest, own, model)
        _merge(converted, more.items())
    _merge(converted, rest.items())
    return converted


def _apply(
    transforms: list[WeightTransform], state_dict: Mapping[str, Tensor], own: set[str], model: PreTrainedModel
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run transformers' own conversions; return the tensors that found their place, and those that did not."""
    transforms = deepcopy(transforms)  # they collect state while they work
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    operations: dict[str, WeightConverter] = {}
    for key in sorted(state_dict, key=dot_natural_key):  # the order that the conversions are written for
        name, pattern = rename_source_key(key, renamings, converters)
        if name not in own:
            name, pattern = key, None
        if pattern is not None:
            operation = operations.setdefault(name, deepcopy(by_pattern[pattern]))
            # typed for lazily read tensors; plain ones are what transformers' own saving hands over
            operation.add_tensor(name, key, pattern, cast(Any, state_dict[key]))
        else:
            _merge(found if name in own else rest, [(name, state_dict[key])])
    for name, operation in operations.items():
        try:
            pieces = operation.convert(name, model=model, config=model.config)
        except Exception as error:
            raise ResumeError(f"The checkpoint's tensors for {name!r} could not be converted: {error}") from error
        _merge(found, ((k, v[0] if isinstance(v, list) else v) for k, v in pieces.items()))
    return found, rest


def _merge(into: dict[str, Tensor], items: Iterable[tuple[str, Tensor]]) -> None:
    """Add tensors, but never choose silently between two of the same name."""
    for name, tensor in items:
        if name in into:
            raise ResumeError(f"The checkpoint holds {name!r} twice, under an old and a new name: which one is meant?")
        into[name] = tensor


def _before_load(module: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The pre-hook. It converts in place: PyTorch hands over a copy, not the caller's dict."""
    incoming = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    converted = convert_state_dict(module, incoming)
    _check_layers(module, converted)
    for key in incoming:
        del state_dict[prefix + key]
    state_dict.update({prefix + key: value for key, value in converted.items()})


def _check_layers(model: PreTrainedModel, converted: Mapping[str, Tensor]) -> None:
    """Refuse, accept, or accept for the time being: see :func:`enable_exact_resume`."""
    own = model.state_dict(keep_vars=True)
    lists = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList))
    wrappers = [name for name, m in model.named_modules() if any(part in m._modules for part in _WRAPPED_BY_PEFT)]
    layers = {name for name in own if name.startswith(lists) and not _of_an_adapter(name, wrappers)}
    arrived = {id(own[name]) for name in converted if name in own}  # by identity: tied tensors are saved once
    restored = {name for name in layers if id(own[name]) in arrived}
    missing = layers - restored
    touched = any(not (wrappers and name.endswith("bias")) for name in restored)
    foreign = sorted(name for name in converted if name not in own and _IN_A_LAYER.search(name))
    if missing and foreign and (touched or not wrappers):
        raise ResumeError(
            f"This checkpoint would restore only {len(restored)} of the {len(layers)} tensors in the layers of "
            f"{type(model).__name__}. Missing: {_some(missing)}. Not understood: {_some(foreign)}. "
            "Build the model from the checkpoint (from_pretrained) or resume from one that this model wrote."
        )
    waiting = next((h for h in model._forward_pre_hooks.values() if isinstance(h, _IncompleteLoad)), None)
    if waiting is not None and (touched or not missing):
        missing &= waiting.missing
        waiting.handle.remove()
    if missing and touched:
        _IncompleteLoad(model, missing)


def _of_an_adapter(name: str, wrappers: list[str]) -> bool:
    """Whether a tensor was added by PEFT: it lies in a wrapped module, but not in the original inside."""
    inside = [w for w in wrappers if name.startswith(f"{w}.")]
    return any(name[len(w) + 1 :].partition(".")[0] not in _WRAPPED_BY_PEFT for w in inside)


class _IncompleteLoad:
    """Stands in front of ``forward`` while the shards loaded so far leave tensors of the layers unrestored."""

    def __init__(self, model: nn.Module, missing: set[str]) -> None:
        self.missing = missing
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        raise ResumeError(
            f"The last checkpoint restored the layers of {type(module).__name__} only in part: {len(self.missing)} "
            f"tensors are missing ({_some(self.missing)}). It has fewer layers than the model, or a shard is missing."
        )


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
