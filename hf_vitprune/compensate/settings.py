"""What is compensated, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InvalidConfigError

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
        ridge: damping of every least-squares fit, in units of the mean variance of its features. It is raised where
            there are fewer than 20 tokens for each feature.
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
        names = tuple(self.parts) if isinstance(self.parts, (list, tuple)) else ()
        if not names or any(name not in PARTS for name in names) or len(set(names)) < len(names):
            raise InvalidConfigError(f"parts is a non-empty choice of {', '.join(PARTS)}, not {self.parts!r}")
        object.__setattr__(self, "parts", names)
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not 0 < self.ridge < math.inf:
            raise InvalidConfigError(f"ridge is a positive number, not {self.ridge!r}")
        share = self.token_share
        if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1):
            raise InvalidConfigError(f"token_share lies strictly between 0 and 1 or is None, not {share!r}")
        for name in ("images", "batch_size", "views", "local_steps"):
            value, least = getattr(self, name), int(name != "local_steps")
            if not (value is None and name == "images") and (type(value) is not int or value < least):
                raise InvalidConfigError(f"{name} is a whole number of at least {least}, not {value!r}")
        if not isinstance(self.reselect, bool):
            raise InvalidConfigError(f"reselect is True or False, not {self.reselect!r}")

    @classmethod
    def of(cls, choice: Any) -> Compensation | None:
        """Settings for what users write: ``"auto"`` or True, ``"none"`` or False, names of parts, or settings.

        Returns:
            None for ``"none"`` and False.

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
