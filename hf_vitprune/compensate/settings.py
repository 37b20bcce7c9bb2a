"""What is compensated, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidConfigError
from ..utils.settings import check_count, check_counts, check_flags, check_open_interval, check_positive, choice_of

#: what can be compensated, in the order of a layer: a fit each, and no unit each (that of v makes up for heads, too)
PARTS = ("embedding", "inputs", "qk", "v", "mlp", "layers")


@dataclass(frozen=True)
class Compensation:
    """How the loss of removed units is made up for, from unlabelled images and without gradients.

    Attributes:
        parts: any of ``embedding`` (removed residual channels: what reads the stream, and the classifier), ``inputs``
            (channels that attention or MLP no longer read), ``qk`` (best low rank), ``v`` (best low rank a head, and
            the output projection, for removed heads too), ``mlp`` (fc2) and ``layers`` (removed layers, attentions
            and MLPs: what comes before them takes over).
        ridge: damping of every least-squares fit, in units of the mean variance of its features; larger where there
            are fewer than 20 tokens for each feature.
        images: at most this many, evenly spaced over the data; None takes all.
        batch_size: images a forward pass.
        token_share: share of the statistics that special tokens (CLS, distillation, registers) have together, in
            (0, 1): most classifiers read them, and patches outnumber them. None: as many as they are.
        reselect: choose the kept heads and hidden neurons anew, as many as the plan keeps, by what can be made up for
            (OBS); the plan's own choice otherwise.
        views: of every image: itself, and random parts of it, of at least half of its area, half of them mirrored.
        local_steps: after its fits, every layer is trained for so many steps of Adam (16 images or views each) to
            bring the stream to where the dense one is; 0: no gradients at all.
    """

    parts: tuple[str, ...] = PARTS
    ridge: float = 1e-3
    images: int | None = 256
    batch_size: int = 8
    token_share: float | None = 0.3
    reselect: bool = False
    views: int = 1
    local_steps: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", choice_of(self, "parts", PARTS))
        check_positive("ridge", self.ridge)
        if self.token_share is not None:
            check_open_interval("token_share", self.token_share)
        check_counts(self, "images", optional=True)
        check_counts(self, "batch_size", "views")
        check_count("local_steps", self.local_steps, 0)
        check_flags(self, "reselect")

    @classmethod
    def of(cls, choice: Any) -> Compensation | None:
        """Settings for what users write: ``"auto"`` or True, names of parts, settings; None for ``"none"`` or False.

        Raises:
            InvalidConfigError: anything else.
        """
        if isinstance(choice, Compensation):
            return choice
        if choice is True or choice == "auto":
            return cls()
        if choice is False or choice == "none":
            return None
        if isinstance(choice, (list, tuple)):
            return cls(parts=tuple(choice))
        raise InvalidConfigError(
            f'compensate is "auto", "none", a choice of {", ".join(PARTS)}, or a Compensation, not {choice!r}'
        )

    def replace(self, **changes: Any) -> Compensation:
        return replace(self, **changes)
