"""What a pruning method is: a config, and a module that decides which units stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from ..cost.meter import ClosedFormMeter, CostMeter
from ..errors import InvalidConfigError
from ..latency.table import LatencyTable
from ..spec.architecture import Architecture
from ..utils.settings import (
    check_counts,
    check_flags,
    check_image_size,
    check_one_of,
    check_open_interval,
    check_positive,
)

#: what a target can count
METRICS = ("macs", "params", "latency")
#: settings that there are no more, or not in records, with what holds now: checkpoints that say so go on
RETIRED: dict[str, Any] = dict.fromkeys(
    ("target", "gate_learning_rate", "latency_table", "latency_batch_size", "mixing_temperature")
)
RETIRED |= {"init": "pca", "pooling": "auto", "margin": 0.15, "min_layers": 1}
RETIRED |= {"initial_score": 1.5, "tolerance": 0.02}


@dataclass
class PruningConfig:
    """Settings that every method has.

    Attributes:
        target: fraction of the dense model's cost that may remain, in (0, 1); None where the method has its own goal.
        target_metric: what ``target`` counts: ``macs``, ``params`` or ``latency``.
        image_size: side (or height and width) in pixels at which MACs are counted and latency was measured; the
            model's own by default.
        latency_table: for the metric ``latency``: a LatencyTable, or the file of one.
        latency_batch_size: images a forward pass that the pruned model is for; a table of another batch is refused.
            None: whatever the table has.
        allow_other_device: the table was measured on another device than this machine's, where the model is to run.
        gate_learning_rate: learning rate of gates; None uses the optimizer's.
        takes_target: a target is all that the method needs to be told.
        unused: which of these say nothing to the method, and why: they are refused, and left out of records.
    """

    takes_target: ClassVar[bool] = True
    unused: ClassVar[Mapping[str, str]] = {}
    target: float | None = None
    target_metric: str = "macs"
    image_size: int | tuple[int, int] | None = None
    gate_learning_rate: float | None = None
    latency_table: str | Path | LatencyTable | None = None
    latency_batch_size: int | None = None
    allow_other_device: bool = False

    def __post_init__(self) -> None:
        for name, reason in self.unused.items():
            if getattr(self, name) != getattr(PruningConfig, name):
                raise InvalidConfigError(f"{reason}: leave {name} out")
        if self.target is not None:
            check_open_interval("target", self.target)
        check_one_of(self, "target_metric", METRICS)
        if self.gate_learning_rate is not None:
            check_positive("gate_learning_rate", self.gate_learning_rate)
        check_image_size(self.image_size)
        check_counts(self, "latency_batch_size", optional=True)
        check_flags(self, "allow_other_device")
        table = self.latency_table
        if (self.target_metric == "latency") != (table is not None):
            raise InvalidConfigError(
                "target_metric='latency' and latency_table go together: make a table with LatencyTable.measure or "
                f"hf-vitprune latency; got {self.target_metric!r} and {table!r}"
            )
        if isinstance(table, (str, Path)) and Path(table).is_file():
            table = LatencyTable.load(table)
        if not isinstance(table, LatencyTable | None):
            raise InvalidConfigError(f"latency_table is a LatencyTable or a file, not {table!r}")
        self._table = table

    def meter(self, reference: Architecture) -> CostMeter:
        """What ``target`` counts, for models pruned from ``reference``.

        Raises:
            LatencyTableError: the table is of another model, input, batch or device, or its grid does not cover the
                reference.
        """
        if self._table is None:
            return ClosedFormMeter(self.target_metric, reference, self.image_size)
        return self._table.meter(reference, self.image_size, self.latency_batch_size, self.allow_other_device)

    @classmethod
    def from_goal(
        cls,
        target: float | None,
        target_metric: str = "macs",
        latency_table: str | Path | LatencyTable | None = None,
        *,
        round_to: int | None = None,
        **settings: Any,
    ) -> Self:
        """Settings for a goal: for callers that know nothing else of the method, such as the command line.

        Args:
            target, target_metric, latency_table: as the attributes.
            round_to: kept channels and neurons are to be a multiple of this, where the method has a say in it; None:
                as it does by itself.
            settings: of the method; they go before what it would choose.

        Raises:
            InvalidConfigError: an impossible setting, or one that the method does not have.
        """
        known = {field.name for field in fields(cls)}
        if settings.keys() - known:
            unknown = ", ".join(sorted(settings.keys() - known))
            raise InvalidConfigError(f"{cls.__name__} has no {unknown}; it has {', '.join(sorted(known))}")
        goal = {"target": target, "target_metric": target_metric, "latency_table": latency_table}
        own = {} if round_to is None else cls.rounded_to(round_to)
        return cls(**{**goal, **{name: value for name, value in own.items() if name in known}, **settings})

    @classmethod
    def rounded_to(cls, multiple: int) -> dict[str, Any]:
        """The settings under which kept channels and neurons are a multiple of this."""
        return {"round_to": multiple}

    @property
    def method_name(self) -> str:
        return type(self).__name__.removesuffix("Config")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; of a latency table, where and when it was made, and a digest."""
        table = {} if self._table is None else {"latency_table": self._table.summary()}
        return {"method": self.method_name, **{k: v for k, v in asdict(self).items() if k not in self.unused}, **table}
