"""Hidden states of all calibration images at one point of the dense model and of the pruned one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from .settings import Compensation
from .walk import Walk


class Streams:
    """The two residual streams. The dense one runs ahead to where the pruned one is to be brought.

    A *position* counts the branches of the dense model: 2 i is before the attention of its layer i, 2 i + 1 before
    its MLP. At the first layer of a stage, the position comes before what leads there from the stage below.

    Attributes:
        dense, small: residual streams, one tensor (images, tokens, width) a batch of this process.
    """

    def __init__(
        self,
        dense: Walk,
        small: Walk,
        plan: PruningPlan,
        batches: Iterable[dict[str, Any]],
        settings: Compensation,
    ) -> None:
        self.plan, self.settings = plan, settings
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
        self._enter(layer, 0)
        self._enter(layer, 1)

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
            layer, shape = self.dense_walk.layers[index], self.plan.source.layers[index]
            self._enter(index, 0)
            if "layers" in self.settings.parts or self.position in self.branches:
                with layer.present():
                    if is_mlp and shape.mlp:
                        self.dense[:] = [layer.after_mlp(hidden) for hidden in self.dense]
                    elif not is_mlp and shape.mixer != "none":
                        self.dense[:] = [layer.after_attention(hidden) for hidden in self.dense]
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
        """Branches are removed between this kept one and where the streams meet again."""
        removed = range(branch + 1, self.next_position(branch))
        return any(self._exists(position) for position in removed)

    def unreached(self) -> list[int]:
        """Removed branches that no kept one of their stage comes before: nothing can take them over."""
        stages = self.plan.source.stages
        lost = []
        for position in range(2 * len(stages)):
            first = next((b for b in self.branches if stages[b // 2] == stages[position // 2]), None)
            if self._exists(position) and (first is None or position < first):
                lost.append(position)
        return lost

    def _exists(self, position: int) -> bool:
        shape = self.plan.source.layers[position // 2]
        return bool(shape.mlp) if position % 2 else shape.mixer != "none"

    # ------------------------------------------------------------------ rows of statistics
    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(pruned, dense) streams of every batch, the dense one on the residual channels that stay."""
        for small, dense in zip(self.small, self.dense, strict=True):
            yield small, dense if self.kept is None else dense[..., self.kept]

    def token_weights(self, hidden: torch.Tensor) -> torch.Tensor:
        """(images * tokens,) weight of every row, one on average."""
        return token_weights(self.plan.source, self.settings.token_share, hidden)


def token_weights(architecture: Architecture, share: float | None, hidden: torch.Tensor) -> torch.Tensor:
    """(images * tokens,) weight of every row of ``hidden``, one on average: special tokens together have ``share``."""
    images, tokens = hidden.shape[:2]
    weights = torch.ones(tokens, device=hidden.device)
    special = architecture.family.extra_tokens_of(architecture.config)
    if share is not None and 0 < special < tokens:
        weights[:special] = tokens * share / special
        weights[special:] = tokens * (1 - share) / (tokens - special)
    return weights.repeat(images)
