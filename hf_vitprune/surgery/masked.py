"""The full-size model that computes what the small one computes: a copy, or what the model's own tensors make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.blocks import RemovedAttention
from ..modeling.outer import mask_norm
from ..modeling.peft_twin import whole_shadow
from ..modeling.structure import finish_mixers, layer_paths, put_mixer, replace_mixer
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from ..utils.hooks import strip_gates
from ..utils.modules import deep_copy, set_tensor
from ..utils.offload import StateDict, device_of
from .cuts import Cut, find_cuts, new_weights
from .transplant import check_fits, outer_of, resized_copy, tie, unshare_


def mask_plain(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """``pruning.mask`` of a model without adapters."""
    masked = _MaskedTensors(model, plan)
    full = deep_copy(model)
    strip_gates(full)
    unshare_(full, layer_paths(full, plan.source))
    for name, tensor in masked.items():
        set_tensor(full, name, tensor)  # which it may share with a name that is not masked
    masked.finish(full)
    tie(full, model, {})
    return full


class MaskedState(StateDict):
    """What :func:`mask_plain` gives, without a copy: tensors that the plan changes are made when they are asked for.

    ``model`` is a shadow of the model, without gates; what is made is on the meta device in it.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self._masked = _MaskedTensors(model, plan)
        self.device = device_of(model, "following a masked model")
        full = whole_shadow(model)
        replaced = self._masked.finish(full)
        there = full.state_dict()
        self._made = [name for name in self._masked if name in there and not name.startswith(replaced)]
        for name in self._made:
            set_tensor(full, name, there[name].to("meta"))
        super().__init__(full)
        self.model = full

    def waiting(self) -> list[str]:
        return self._made

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._masked[name] if self._tensors[name].is_meta else super().__getitem__(name)


class _MaskedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a model that a plan changes, at full size: zeros in the place of what goes."""

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        check_fits(model, plan, allow_unchanged=True)
        self._model, self._plan = model, plan
        self._outer = outer_of(model, plan.source, plan.architecture.hidden_size)
        self._small = resized_copy(model, plan, self._outer)
        cuts = find_cuts(model, self._small, plan)
        self._new = new_weights(model, self._small, plan, cuts)
        self._dense = StateDict(model)
        zero = tuple(_removed_branches(model, plan))
        self._cuts: dict[str, tuple[str, Cut] | None] = {}  # name -> where it comes from; None: zeros
        for name, cut in cuts.items():
            dense = self._dense[cut.source]  # an index buffer of the small model has no place here
            if dense.is_floating_point() and (name in self._new or cut.changes(dense.shape)):
                self._cuts[cut.source] = name, cut
        self._cuts |= dict.fromkeys(name for name in self._dense if name.startswith(zero))

    def __getitem__(self, name: str) -> torch.Tensor:
        dense, found = self._dense[name].detach(), self._cuts[name]
        if found is None:
            return torch.zeros_like(dense)
        small, cut = found
        tensor = self._new[small] if small in self._new else cut.take(dense)
        return cut.scatter(tensor, dense.shape).to(dense.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)

    def finish(self, full: PreTrainedModel) -> tuple[str, ...]:
        """Put the mixers that the plan makes and norms over kept channels into a full-size model, in place.

        What is returned are prefixes of the tensors of mixers that are not the model's.
        """
        plan = self._plan
        replaced = self._replace_mixers(full)
        if plan.embedding is not None:
            kept = torch.tensor(plan.embedding, device=next(self._model.parameters()).device)
            custom = [full.get_submodule(path) for path in self._outer.norms] if self._outer is not None else []
            for norm in residual_norms(full, plan.source) + custom:
                mask_norm(norm, kept)
        return tuple(replaced)

    def _replace_mixers(self, full: PreTrainedModel) -> list[str]:
        """Mixers that the plan makes, or that zeros cannot silence."""
        plan, source, family = self._plan, self._plan.source, self._plan.source.family
        small = layer_paths(self._small, plan.architecture)
        kept = {e.index: (e, new.attention) for e, new in zip(plan.layers, small, strict=True)}
        replaced = []
        for i, (paths, shape) in enumerate(zip(layer_paths(full, source), source.layers, strict=True)):
            entry, prefix = kept.get(i, (None, ""))
            if entry is None or entry.mixer == "none":
                if shape.mixer in ("attention", "none"):  # special tokens pass others, whatever their weights
                    continue
                put_mixer(full, paths, RemovedAttention())
            elif entry.replaces_mixer(shape):
                replace_mixer(full, family, source.config, paths, entry.shape(shape), source.width(i))
                mixer = full.get_submodule(paths.attention)
                weights = {name: self._new[f"{prefix}.{name}"] for name in mixer.state_dict()}
                for name, tensor in mixer.state_dict().items():
                    if weights[name].shape != tensor.shape:  # at the places of the kept residual channels
                        cut = Cut(name, {1 if name == "conv.weight" else 0: torch.tensor(plan.embedding)})
                        weights[name] = cut.scatter(weights[name], tensor.shape)
                mixer.load_state_dict(weights, assign=True)
                mixer.train(full.training)
            else:
                continue
            replaced.append(f"{paths.attention}.")
        finish_mixers(full, family)
        return replaced


def _removed_branches(model: PreTrainedModel, plan: PruningPlan) -> list[str]:
    """Prefixes of the parameters that write a removed branch into the residual stream."""
    kept = {entry.index: entry for entry in plan.layers}
    prefixes, post = [], plan.source.family.post_norm
    for i, (path, shape) in enumerate(zip(layer_paths(model, plan.source), plan.source.layers, strict=True)):
        entry = kept.get(i)
        written = shape.mixer == "attention" or (post and shape.mixer != "none")
        if written and (entry is None or entry.mixer == "none"):
            prefixes.append(f"{path.norm1 if post else path.o}.")
        if shape.mlp and (entry is None or not entry.mlp):
            prefixes.append(f"{path.norm2 if post else path.fc2}.")
    return prefixes


def residual_norms(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """Every norm that runs over the residual stream."""
    names = architecture.family.stream_norms(model)
    for paths, shape in zip(layer_paths(model, architecture), architecture.layers, strict=True):  # type: ignore[arg-type]
        names += [paths.norm1] if shape.mixer != "none" else []
        names += [paths.norm2] if shape.mlp else []
    norms = [model.get_submodule(name) for name in names]
    return [norm for norm in norms if not isinstance(norm, nn.Identity)]  # somebody may have taken one out
