"""What compensation works on: hidden states of all calibration images in both models, and one layer of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..plan.layer_plan import PAD, LayerPlan
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from ..utils.processes import from_first
from .algebra import obs
from .fits import Branch, Fit
from .layer import Layer
from .moments import Moments, Statistics, precise_device
from .settings import Compensation
from .walk import Walk

#: bytes of a branch's inputs that are kept from when they are measured to when its new last Linear reads them
HELD = 2**29


@dataclass
class Ledger:
    """What was done, for the plan."""

    lossy: bool = False  # something was lost so far, so that the two streams differ
    rows: list[dict[str, Any]] = field(default_factory=list)  # what was fitted, with errors before and after
    notes: list[str] = field(default_factory=list)  # what could not be made up for, and why

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class Streams:
    """The two residual streams. The dense one runs ahead to where the pruned one is to be brought.

    A *position* counts the branches of the dense model: 2 i is before the attention of its layer i, 2 i + 1 before
    its MLP. At the first layer of a stage, the position comes before what leads there from the stage below.

    Attributes:
        dense, small: residual streams, one tensor (images, tokens, width) a batch of this process.
    """

    def __init__(
        self, dense: Walk, small: Walk, plan: PruningPlan, batches: Iterable[dict[str, Any]], settings: Compensation
    ) -> None:
        self.plan, self.settings = plan, settings
        self.ledger = Ledger(lossy=plan.embedding is not None)
        self.dense_walk, self.small_walk = dense, small
        self.dense: list[torch.Tensor] = []
        self.small: list[torch.Tensor] = []
        for batch in batches:
            self.dense.append(dense.start(batch))
            self.small.append(self.dense[-1] if plan.embedding is None else small.start(batch))
        self.device = dense.device
        self.kept = None if plan.embedding is None else torch.tensor(plan.embedding, device=self.device)
        self.position = 0
        self._stage = [0, 0]
        self.branches = [
            position
            for entry in plan.layers
            for position, there in ((2 * entry.index, entry.mixer != "none"), (2 * entry.index + 1, bool(entry.mlp)))
            if there
        ]

    # ------------------------------------------------------------------ going on
    def enter(self, layer: int) -> None:
        """Bring both streams into the stage of a layer of the dense model (nothing, without stages)."""
        for which in (0, 1):
            self._enter(layer, which)

    def _enter(self, layer: int, which: int) -> None:
        stage = self.plan.source.stages[layer]
        walk, states = ((self.dense_walk, self.dense), (self.small_walk, self.small))[which]
        for below in range(self._stage[which], stage):
            states[:] = [walk.bridge(below, hidden) for hidden in states]
        self._stage[which] = stage

    def advance(self, position: int) -> None:
        """Run the dense stream on to a position; branches that the plan removes only where they are made up for."""
        while self.position < position:
            index, is_mlp = divmod(self.position, 2)
            self._enter(index, 0)
            followed = "layers" in self.settings.parts or self.position in self.branches
            if followed and self._exists(self.position):
                layer = self.dense_walk.layers[index]
                with layer.present():
                    run = layer.after_mlp if is_mlp else layer.after_attention
                    self.dense[:] = [run(hidden) for hidden in self.dense]
            self.position += 1

    def next_position(self, branch: int) -> int:
        """Where the pruned stream meets the dense one again after a kept branch: before the next one of the stage."""
        stages = self.plan.source.stages
        stage = stages[branch // 2]
        later = next((b for b in self.branches if b > branch), None)
        if later is not None and stages[later // 2] == stage:
            return later
        return 2 * (len(stages) - stages[::-1].index(stage))

    def takes_over(self, branch: int) -> bool:
        """Branches are removed between this kept one and where the streams meet again, and made up for."""
        removed = range(branch + 1, self.next_position(branch))
        return "layers" in self.settings.parts and any(self._exists(position) for position in removed)

    def unreached(self) -> list[int]:
        """Removed branches that no kept one of their stage comes before: nothing can take them over."""
        stages = self.plan.source.stages
        first: dict[int, int] = {}
        for branch in self.branches:
            first.setdefault(stages[branch // 2], branch)
        end = 2 * len(stages)
        return [p for p in range(end) if self._exists(p) and p < first.get(stages[p // 2], end)]

    def _exists(self, position: int) -> bool:
        shape = self.plan.source.layers[position // 2]
        return bool(shape.mlp) if position % 2 else shape.mixer != "none"

    # ------------------------------------------------------------------ rows of statistics
    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(pruned, dense) streams of every batch, the dense one on the residual channels that stay."""
        for small, dense in zip(self.small, self.dense, strict=True):
            yield small, dense if self.kept is None else dense[..., self.kept]

    def token_weights(self, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Weight of every token of a batch, one on average; of ``rows`` made of them: all alike in windows."""
        if rows is not None and rows.shape[:2] != hidden.shape[:2]:
            return rows.new_ones(rows.shape[:2].numel())
        return token_weights(self.plan.source, self.settings.token_share, hidden)


def token_weights(architecture: Architecture, share: float | None, hidden: torch.Tensor) -> torch.Tensor:
    """(images * tokens,) weight of every row of ``hidden``, one on average: special tokens together have ``share``."""
    images, tokens = hidden.shape[:2]
    weights = torch.ones(tokens, dtype=torch.float32, device=hidden.device)
    special = architecture.family.extra_tokens_of(architecture.config)
    if share is not None and 0 < special < tokens:
        weights[:special] = tokens * share / special
        weights[special:] = tokens * (1 - share) / (tokens - special)
    return weights.repeat(images)


@dataclass
class Site:
    """A kept layer: as it is kept and as it was, its part of the plan (which reselection changes), its dense sizes.

    ``inputs``: map (dense inputs, kept inputs) and constant (dense inputs,) by which the branch that is worked on has
    its dense inputs from those that stay; None where they are the same.
    """

    streams: Streams
    small: Layer
    dense: Layer
    entry: LayerPlan
    source: LayerShape
    inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def settings(self) -> Compensation:
        return self.streams.settings

    @property
    def ledger(self) -> Ledger:
        return self.streams.ledger

    @property
    def device(self) -> torch.device:
        return self.streams.device

    # ------------------------------------------------------------------ what stays
    def head_rows(self, size: int) -> torch.Tensor:
        """Rows of q, k or v (or columns of o) of the kept heads, all ``size`` channels of each."""
        at = precise_device(self.device)
        return torch.tensor([h * size + c for h in self.entry.heads for c in range(size)], device=at)

    def kept_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """The rows of residual channels that stay."""
        kept = self.streams.kept
        return matrix if kept is None else matrix[kept.to(matrix.device)]

    def loses(self, used: torch.Tensor, kept: torch.Tensor, every_head: bool) -> bool:
        """Some channel that is ``used``, of every head or only of those that stay, is not in their ``kept``."""
        lost = used.view(-1, kept.shape[-1]).clone()
        heads = list(self.entry.heads)
        lost[heads] &= kept.sum(1) == 0
        return bool((lost if every_head else lost[heads]).any())

    def used(self, part: str) -> torch.Tensor:
        """Outputs of a dense Linear that are not always zero."""
        weight, bias = self.dense.weights(part)
        return (weight != 0).any(1) | (bias != 0)

    def reselected(self, branch: Branch, keep: int, group: int = 1) -> tuple[int, ...]:
        """As many groups of a branch's inputs as stay, leaving out those that the others can best make up for."""
        gone = from_first(obs(branch.effect, branch.stats.xx, keep, group, self.settings.ridge)[0])
        return tuple(sorted({*range(len(branch.stats.xx) // group)} - {*gone.tolist()}))

    # ------------------------------------------------------------------ statistics
    def measured(
        self, last: str, read: Callable[[torch.Tensor], torch.Tensor], size: int, targets: int
    ) -> tuple[Statistics, list[torch.Tensor] | None]:
        """Moments of what the last Linear of a branch reads, with what it should add to the stream as targets.

        ``read`` gives its inputs, of ``size`` channels, for the stream before the branch; they are given back, too, up
        to ``HELD`` bytes. ``targets``: width of the stream; 0: none.
        """
        moments = Moments(size, targets, self.device)  # this process may have no images
        held: list[torch.Tensor] | None = []
        for small, dense in self.streams.pairs():
            inputs = read(small)
            moments.add(inputs, (dense - small)[..., :targets], self.streams.token_weights(small))
            if held is not None:
                held = [*held, inputs] if (len(held) + 1) * inputs.nbytes <= HELD else None
        return moments.total(self.small.part(last).bias is not None), held

    def branch(self, last: str, stats: Statistics) -> Branch:
        """The end of a branch as it was, on the residual channels that stay."""
        return Branch(stats, self.kept_rows(self.dense.weights(last)[0]), self.small.scale(last), together=True)

    # ------------------------------------------------------------------ weights
    def weights(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a dense Linear on the inputs that stay, all its outputs."""
        weight, bias = self.dense.weights(part)
        if self.inputs is None:
            return weight, bias
        return weight @ self.inputs[0], bias + weight @ self.inputs[1]

    def write(self, part: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Put new weights into a Linear of the small model."""
        linear = self.small.part(part)
        linear.weight.data.copy_(weight)
        if linear.bias is not None:
            linear.bias.data.copy_(bias)

    def write_fit(self, last: str, part: str, fit: Fit) -> None:
        """Put a fit into the last Linear of a branch, and a line into the report."""
        self.write(last, fit.weight, fit.bias)
        more = {"ridge": fit.ridge} if fit.ridge > self.settings.ridge else {}
        if fit.starved:
            self.ledger.note("there are fewer tokens than features: fits are damped strongly; more images would help")
        self.record(part, fit.before, fit.after, **more)

    def record(self, part: str, before: float, after: float, **more: float) -> None:
        """One line of the report: relative errors of plain slices and of the new weights."""
        row = {"layer": self.entry.index, "part": part, "before": before, "after": after, **more}
        self.ledger.rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})


def real(row: tuple[int, ...]) -> list[int]:
    """Positions in a row of channels that are no padding."""
    return [j for j, channel in enumerate(row) if channel != PAD]


def selection(rows: tuple[tuple[int, ...], ...], size: int, device: torch.device) -> torch.Tensor:
    """(heads, kept channels, size) of zeros and ones: the channels of every head that stay; padding is zero."""
    chosen = torch.zeros(len(rows), len(rows[0]), size, dtype=torch.float64, device=device)
    for head, row in enumerate(rows):
        there = real(row)
        chosen[head, there, [row[position] for position in there]] = 1
    return chosen
