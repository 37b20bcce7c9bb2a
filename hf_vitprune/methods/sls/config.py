"""Settings of SLS."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from ...utils.settings import check_count, check_counts, check_flags, check_open_interval, check_positive
from ..base import PruningConfig

#: fewest steps that scikit-learn's t-SNE takes: the length of its early exaggeration
MIN_ITERATIONS = 250


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
        stages: of a model with stages (Swin), how many of the last ones can lose layers. As in the authors' code, the
            last can lose all of them, and keeps its patch merging; of the first that is cut, one layer stays.
        max_samples: score with at most this many images, evenly spaced over the data; None: all.
        batch_size: images a forward pass.
        fast: let a cheap t-SNE judge the layers that are far from the threshold; the last layer and those near it
            are scored in full. Decides as without, unless a cheap score is off by more than 0.15. For up to 3000
            images; with more, it changes nothing.
        threads: threads of t-SNE, which its last digits (and so the decision, when it is close) depend on. None:
            what scikit-learn uses, but two at most, since with more the digits change from run to run.
    """

    takes_target: ClassVar[bool] = False
    unused: ClassVar = {
        field.name: "SLS has no gates and no target" for field in fields(PruningConfig) if field.name != "image_size"
    } | {
        "target": "SLS takes no target: the number of layers follows from alpha and the data. Change alpha, or use "
        "TruncationConfig(target=...), which keeps as many layers as fit"
    }
    alpha: float = 0.3
    perplexity: float = 30.0
    iterations: int = 1000
    seed: int = 0
    stages: int = 2
    max_samples: int | None = None
    batch_size: int = 64
    fast: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_open_interval("alpha", self.alpha)
        check_positive("perplexity", self.perplexity)
        check_count("iterations", self.iterations, MIN_ITERATIONS)
        check_count("seed", self.seed, 0)
        check_counts(self, "stages", "batch_size")
        check_counts(self, "max_samples", "threads", optional=True)
        check_flags(self, "fast")
