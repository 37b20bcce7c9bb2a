"""Mixers of a layer: which are read at a draw of the gates, what they give together, and what learns from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from operator import and_
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ...families import LayerPaths
from ...modeling.conv_mixer import split_tokens
from ...plan.plan import PruningPlan
from ...spec.layer_shape import KERNELS
from .branches import Attention, Branches, Grid
from .gates import LEVELS, MixerGates, nested


class Role(NamedTuple):
    """What mixers do for the output of a layer in one pass: which one makes it, which are read, and factors of these.

    Read is what counts, or enters the gradient of a gate. Factors are ones and zeros; None where no gate learns.
    """

    taken: str
    read: tuple[str, ...]
    shares: torch.Tensor | None = None


class Mixing:
    """What a layer may mix its tokens with; ``special`` of them are in front of the grid."""

    def __init__(self, branches: Branches, attention: Attention, special: int) -> None:
        self.branches, self.attention, self.special = branches, attention, special
        self._role: Role | None = None
        self._unlearned: list[torch.Tensor] = []

    def role(self) -> Role:
        """What is read in the pass that begins."""
        raise NotImplementedError

    def attend(self, run: Callable[[], Any], tokens: torch.Tensor, others: Iterable[Any]) -> Any:
        """What attention gives in this pass, as far as it is read; of its input, ``tokens`` and ``others``.

        Times zero, nothing is remembered of it for a backward pass.
        """
        role = self._begin(others)
        if role.taken == "attention":
            return run()
        if "attention" not in role.read:
            return tokens, None
        with torch.no_grad():
            return run()

    def _begin(self, others: Iterable[Any] = ()) -> Role:
        self._role = role = self.role()
        beside = [*self.attention.parameters(), *(t for t in others if isinstance(t, torch.Tensor))]
        self._unlearned = [] if role.taken == "attention" else beside
        return role

    def mix(self, attended: torch.Tensor, tokens: torch.Tensor, grid: Grid, as_attended: Any = None) -> torch.Tensor:
        """What the layer mixes its tokens to: g3 MSA + g2 (1 - g3) Conv3 + g1 (1 - g2) (1 - g3) Conv1.

        One of these factors is one, or none: what it belongs to is the output. Mixers that the gates alone learn from
        leave nothing for a backward pass but their output.

        Args:
            attended: what :meth:`attend` gave.
            tokens: (B, special + rows * columns, C), the layer's normalised input.
            as_attended: brings (B, rows * columns, C) into the order of ``attended``; None: it is the same.
        """
        taken, read, shares = self._role or self._begin()
        unlearned, self._role, self._unlearned = self._unlearned, None, []
        outputs = {"attention": attended}
        for kind in read:
            if kind in KERNELS:
                learns = torch.is_grad_enabled() and kind == taken
                with torch.set_grad_enabled(learns):
                    mixed = self._convolved(kind, tokens, grid)
                    mixed = mixed if as_attended is None else as_attended(mixed)
                    outputs[kind] = mixed.to(attended.dtype)
                unlearned += [] if learns else self.branches.own(kind)
        output = torch.zeros_like(attended) if taken == "none" else outputs[taken]
        if shares is None or not torch.is_grad_enabled():
            return output
        unlearned += [tokens] if taken == "none" else []  # or the norm in front would get no gradient at all
        learned = [tensor for tensor in unlearned if tensor.requires_grad]
        return _Taken.apply(output, shares, [outputs[kind].detach() for kind in read], *learned)

    def _convolved(self, kind: str, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Output of a convolution; special tokens pass it as they are."""
        special, patches = split_tokens(tokens, self.special, grid)
        mixed = self.branches.convolve(kind, patches, grid, self.attention)
        return torch.cat([special.to(mixed.dtype), mixed], dim=1) if self.special else mixed


class _Taken(torch.autograd.Function):
    """``output``, as the sum of what mixers give times their shares, one of which is one, or none.

    Its gradient for a share is that of the sum. Parameters of mixers that are times zero get gradients of zero.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, shares: torch.Tensor, read: list[torch.Tensor], *unlearned: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*read)
        ctx.likes = shares.new_empty(0), [(t.shape, {"dtype": t.dtype, "device": t.device}) for t in unlearned]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        like, unlearned = ctx.likes
        precise = torch.promote_types(grad.dtype, torch.float32)
        of_shares = torch.stack([(grad * part).sum(dtype=precise) for part in ctx.saved_tensors]).to(like)
        return grad, of_shares, None, *(torch.zeros(shape, **kind) for shape, kind in unlearned)


class FixedMixer(Mixing):
    """One kind, decided."""

    def __init__(self, kind: str, branches: Branches, attention: Attention, special: int) -> None:
        super().__init__(branches, attention, special)
        self.kind = kind

    def role(self) -> Role:
        return Role(self.kind, (self.kind,))


class MixerSearch(Mixing):
    """All kinds, and how much of each counts now; ``gradients`` as of ``gates.nested``."""

    def __init__(
        self, gates: MixerGates, branches: Branches, attention: Attention, special: int, gradients: str
    ) -> None:
        super().__init__(branches, attention, special)
        self.gates, self.gradients = gates, gradients

    def role(self) -> Role:
        """What the gates say, or draw in training."""
        if not self.gates.training or self.gates.decided:
            taken = LEVELS[self.gates.level()]
            return Role(taken, (taken,))
        drawn = self.gates.sample()
        ones = [value > 0.5 for value in drawn.tolist()]
        taken = LEVELS[sum(accumulate(ones, and_))]
        if not torch.is_grad_enabled():
            return Role(taken, (taken,))
        simple, middle, attention = nested(drawn, self.gradients)
        shares = {
            "attention": attention,
            "conv3x3": middle * (1 - attention),
            "conv1x1": simple * (1 - middle) * (1 - attention),
        }
        read = _read(*ones)
        return Role(taken, read, torch.stack([shares[kind] for kind in read]))


def _read(simple: bool, middle: bool, attention: bool) -> tuple[str, ...]:
    """Mixers whose output counts, or enters the gradient of a gate that gets one, at this draw."""
    read = {
        "attention": simple + middle + attention > 1,
        "conv3x3": simple or middle,
        "conv1x1": not (simple and middle and attention),
    }
    return tuple(kind for kind, there in read.items() if there)


@torch.no_grad()
def with_convolutions(
    plan: PruningPlan, mixings: Mapping[int, Mixing], paths: list[LayerPaths], model: PreTrainedModel | None = None
) -> PruningPlan:
    """A plan that keeps every layer, with the weights of its convolutions by their names in the small model.

    They are made of the layers' attention, or of that of another model of the same shape.
    """
    weights: dict[str, torch.Tensor] = {}
    for i, mixing in mixings.items():
        kind = plan.layers[i].mixer
        if kind in KERNELS:
            attention = mixing.attention if model is None else Attention.of(model, plan.source, i, paths[i])
            made = mixing.branches.weights(kind, attention)
            weights |= {f"{paths[i].attention}.{name}": tensor for name, tensor in made.items()}
    return replace(plan, weights=weights).validated()
