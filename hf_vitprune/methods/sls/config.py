"""Settings of SLS."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ...errors import InvalidConfigError
from ...utils.settings import check_count, check_flags, check_number, check_one_of, check_open_interval, check_positive
from ..base import PruningConfig

INITS = ("pca", "random")
POOLINGS = ("auto", "cls", "mean")
#: fewest steps that scikit-learn's t-SNE takes: the length of its early exaggeration
MIN_ITERATIONS = 250
#: settings of every method that say nothing here
_UNUSED = tuple(field.name for field in fields(PruningConfig) if field.name != "image_size")


@dataclass
class SLSConfig(PruningConfig):
    """Straightforward layer-wise pruning (arXiv 2407.14330): keep the bottom layers whose features suffice.

    The depth follows from ``alpha`` and the data, so there is no ``target``: ``TruncationConfig(target=...)`` takes
    one. The defaults of the t-SNE are scikit-learn's, and so are its results.

    Attributes:
        alpha: the threshold is this times the score of the last layer, in (0, 1); more keeps more layers.
        perplexity: of t-SNE; never more than (images - 1) / 3.
        iterations: of t-SNE, at least 250.
        seed: of t-SNE.
        init: how t-SNE starts: ``pca``, as in the paper; or ``random``, which with several seeds shows how much of a
            score is the map's own.
        pooling: the feature of an image: ``cls`` (its class token), ``mean`` (mean over patch tokens), or ``auto``:
            the class token where the model has one.
        min_layers: never keep fewer layers.
        stages: of a model with stages (Swin), how many of the last ones can lose layers. As in the authors' code, the
            last can lose all of them, and keeps its patch merging; of the first that is cut, one layer stays.
        max_samples: score with at most this many images, evenly spaced over the data; None: all.
        batch_size: images a forward pass.
        fast: let a cheap t-SNE judge the layers that are far from the threshold; the last layer and those near it
            are scored in full. Decides as without, unless a cheap score is off by more than the margin. For up to
            3000 images; with more, it changes nothing.
        margin: with ``fast``: a cheap score counts when it is further from the threshold than this. Scores lie in
            [-1, 1], and cheap ones err by as much where all are low as where all are high.
        threads: threads of t-SNE, which its last digits (and so the decision, when it is close) depend on. None:
            what scikit-learn uses, but two at most, since with more the digits change from run to run.
    """

    takes_target: ClassVar[bool] = False
    alpha: float = 0.3
    perplexity: float = 30.0
    iterations: int = 1000
    seed: int = 0
    init: str = "pca"
    pooling: str = "auto"
    min_layers: int = 1
    stages: int = 2
    max_samples: int | None = None
    batch_size: int = 64
    fast: bool = False
    margin: float = 0.15
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None:
            raise InvalidConfigError(
                "SLS takes no target: the number of layers follows from alpha and the data. Change alpha, or use "
                "TruncationConfig(target=...), which keeps as many layers as fit"
            )
        for name in _UNUSED:
            if getattr(self, name) != getattr(PruningConfig, name):
                raise InvalidConfigError(f"SLS has no gates and no target: leave {name} out")
        check_open_interval("alpha", self.alpha)
        check_positive("perplexity", self.perplexity)
        check_number("margin", self.margin)
        for name, lowest in (
            ("iterations", MIN_ITERATIONS),
            ("seed", 0),
            ("min_layers", 1),
            ("stages", 1),
            ("batch_size", 1),
            ("max_samples", 2),
            ("threads", 1),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("max_samples", "threads"):
                check_count(name, value, lowest)
        check_one_of(self, "init", INITS)
        check_one_of(self, "pooling", POOLINGS)
        check_flags(self, "fast")

    def to_dict(self) -> dict[str, Any]:
        """Without what every method has and this one refuses."""
        return {name: value for name, value in super().to_dict().items() if name not in _UNUSED}
