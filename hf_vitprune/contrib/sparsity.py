"""2:4 semi-structured sparsity: of every four weights along a Linear's inputs at most two are not zero.

Sizes, config and files stay those of any other model. On top of NViT's models it is the paper's (arXiv 2110.04869).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from ..errors import InvalidConfigError, SparsityError, UnsupportedDeviceError, UnsupportedModelError
from .own_layers import own_layers

#: weights a group, and how many of them stay
GROUP, KEPT = 4, 2


def sparse_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Name -> every Linear that is made sparse: q, k, v, output projection and MLP of all layers.

    Raises:
        UnsupportedModelError: not a plain transformers model of a registered family, or a bigger one around it.
        InvalidConfigError: a Linear reads a number of channels that four does not divide.
    """
    if not isinstance(model, PreTrainedModel) or getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            f"2:4 sparsity is for plain models, not for a {type(model).__name__}: export() a PruningModel and "
            "merge_and_unload() adapters first"
        )
    found: dict[str, nn.Linear] = {}
    for paths, shape in own_layers(model):
        names = [paths.q, paths.k, paths.v, paths.o] if shape.mixer == "attention" else []
        for name in (*names, *((*paths.fc1, paths.fc2) if shape.mlp else ())):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            if linear.in_features % GROUP:
                raise InvalidConfigError(
                    f"{name} reads {linear.in_features} channels, which are no groups of {GROUP}: prune in multiples "
                    f"of {GROUP} (round_to, group_sizes)"
                )
            found[name] = linear
    return found


def sparsity_mask(weight: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) booleans: the two largest magnitudes of every four; ties go to the first."""
    groups = weight.detach().abs().unflatten(1, (-1, GROUP))
    order = torch.argsort(groups, dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :KEPT], True).flatten(1)


@torch.no_grad()
def sparsify(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Set the two smaller of every four weights to zero, in place; name of every sparse Linear -> its mask.

    Raises:
        UnsupportedModelError, InvalidConfigError: as :func:`sparse_linears`.
    """
    linears = sparse_linears(model)
    masks = {name: sparsity_mask(linear.weight) for name, linear in linears.items()}
    for name, mask in masks.items():
        linears[name].weight.mul_(mask)
    return masks


def check_sparsity(model: PreTrainedModel) -> int:
    """How many weights are stored, of a model no four of which have more than two that are not zero.

    Raises:
        SparsityError: a group of four has more; the message names the Linear.
    """
    stored = 0
    for name, linear in sparse_linears(model).items():
        over = int(((linear.weight.unflatten(1, (-1, GROUP)) != 0).sum(-1) > KEPT).sum())
        if over:
            raise SparsityError(
                f"{name} is not 2:4 sparse: {over} groups of {GROUP} have more than {KEPT} weights. Call sparsify, "
                "and tune with SparsityCallback"
            )
        stored += linear.weight.numel() * KEPT // GROUP
    return stored


class SparsityCallback(TrainerCallback):
    """Makes the model 2:4 sparse when a training begins, and keeps it so after every step of the optimizer.

    Which weights stay is chosen once, by magnitude; a training that is resumed finds its choice in the weights.

    Raises:
        UnsupportedModelError, InvalidConfigError: when training begins, as :func:`sparse_linears`.
    """

    def __init__(self) -> None:
        self._masks: list[tuple[nn.Parameter, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        masks = sparsify(model)
        self._masks = [(model.get_submodule(name).weight, mask) for name, mask in masks.items()]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for weight, mask in self._masks:
            weight.mul_(mask)


def use_sparse_kernels(model: PreTrainedModel) -> list[str]:
    """Store the weights in torch's semi-structured form, in place, for sparse kernels; the names of those Linears.

    For inference; save the model before. Linears whose sizes the kernels do not take stay dense.

    Raises:
        UnsupportedDeviceError: the model is not on a GPU with sparse tensor cores.
        InvalidConfigError: it is not in half precision, which the kernels want.
        SparsityError: it is not 2:4 sparse, or none of its Linears has sizes that the kernels take.
    """
    linears = sparse_linears(model)
    weight = next(iter(linears.values())).weight
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise UnsupportedDeviceError(
            f"2:4 kernels need a CUDA GPU with sparse tensor cores (compute capability 8.0 or later), the model is on "
            f"{weight.device}. Its zeros cost nothing elsewhere, and save nothing"
        )
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise InvalidConfigError(f"2:4 kernels take float16 and bfloat16, the model is in {weight.dtype}")
    check_sparsity(model)
    converted, reason = [], ""
    for name, linear in linears.items():
        try:
            stored = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        except (RuntimeError, ValueError) as error:  # sizes that are no multiples of the kernels' tiles
            reason = str(error)
            continue
        linear.weight = nn.Parameter(stored, requires_grad=False)
        converted.append(name)
    if not converted:
        raise SparsityError(f"no Linear has sizes that the sparse kernels take: {reason}")
    return converted
