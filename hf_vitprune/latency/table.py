"""Predicted seconds of any shape of one model, from times measured once on a device."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..cost.meter import CostMeter
from ..errors import LatencyTableError
from ..families.base import pair
from ..modeling import build
from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from ..utils.settings import check_count
from .blocks import TimedModel, covered_model, time_blocks
from .grid import READING, SampledGrid, check_complete, stage_axes
from .measure import PartialFile, device_name, environment

FORMAT_VERSION = 1


class LatencyTable:
    """How long a forward pass of a batch takes, block by block, for every shape that a grid spans.

    Blocks are timed with nothing in them (``none``), with attention and no MLP (``attention``) or another mixer and
    no MLP (by its name), and with an MLP and no mixer (``mlp``); one with both takes ``attention + mlp - none``. The
    model around its blocks (``model``: patch embedding, final norm, head) is timed with an empty one a stage.

    Attributes:
        provenance: device, threads, dtype, batch and image size, versions, date; JSON-ready.
        covers: the dense model that the times are of, as :func:`covered_model` describes it.
        model: seconds of the model with one empty block a stage, by ``embedding``.
        stages: for every stage, the grids by name. Axes: ``embedding``, ``heads``, ``qk``, ``v``, ``mlp``;
            ``inputs`` in ``attention_reading`` and ``mlp_reading`` (parts that read only some residual channels);
            ``shifted`` (0, 1) for windows; ``channels`` and ``batch_norm`` (0, 1) of convolution mixers.
        monotone: times are read from a fit that never falls when a size grows; the measured ones are kept.
    """

    def __init__(
        self,
        provenance: Mapping[str, Any],
        covers: Mapping[str, Any],
        model: SampledGrid,
        stages: list[dict[str, SampledGrid]],
        monotone: bool = False,
    ) -> None:
        check_complete(provenance, covers, model, stages)
        self.provenance, self.covers = dict(provenance), dict(covers)
        self.model, self.stages, self.monotone = model, stages, monotone
        self._model = model.monotone() if monotone else model
        self._stages = [{k: g.monotone() for k, g in row.items()} if monotone else row for row in stages]

    @classmethod
    def measure(
        cls,
        model_or_config: Any,
        batch_size: int = 8,
        image_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        grid: str | Mapping[str, Sequence[int]] = "coarse",
        rounds: int = 5,
        monotone: bool = True,
        partial: str | Path | None = None,
        progress: bool = True,
        beside: Mapping[str, Any] | None = None,
    ) -> LatencyTable:
        """Time the blocks of a model in every shape of a grid, on this machine.

        All shapes take turns, round after round, in an order that changes; a time is the median over the rounds. The
        dense model takes turns with them: ``provenance["dense_seconds"]`` against ``predict`` of it says how far the
        table is to be trusted.

        Args:
            model_or_config: a model, a config (of an image classifier) or an Architecture. Weights play no part; of a
            pruned
                one, the dense model behind it is meant.
            image_size: side, or (height, width), in pixels; the config's by default.
            dtype, device: the model's by default (float32 and cpu for configs).
            grid: ``"coarse"`` (minutes on two cores for a ViT-S or ViT-B), ``"fine"``, or sizes by axis; see
                :func:`~hf_vitprune.latency.grid.stage_axes`.
            rounds: times every shape is timed.
            monotone: read times from a fit that never falls when a size grows.
            partial: file for the finished rounds: a measurement that was cut off goes on from it.
            beside: further models that take turns with the blocks, by name; ``provenance["beside_seconds"]`` has their
            times. A
                machine's speed drifts: only what was timed in one run can be compared closely.

        Raises:
            InvalidConfigError: an impossible number or grid.
            LatencyTableError: ``partial`` is damaged, or of another measurement.
            UnsupportedModelError: no family is registered for the model.
        """
        check_count("batch_size", batch_size)
        check_count("rounds", rounds)
        started = time.monotonic()
        timed = TimedModel(model_or_config, batch_size, image_size, dtype, device)
        stages = stage_axes(timed.dense, grid)
        models: dict[str, Any] = {"": build(timed.dense.config, timed.dense), **(beside or {})}
        wholes = [model.to(timed.device, timed.dtype).eval() for model in models.values()]
        covers = covered_model(timed.dense, timed.image_size)
        kind, attention = str(timed.dtype).removeprefix("torch."), wholes[0].config._attn_implementation
        record = {**environment(timed.device), "dtype": kind, "batch_size": batch_size}
        record |= {"image_size": list(timed.image_size), "attention": attention, "rounds": rounds}
        kept = None
        if partial is not None:
            axes = [{axis: list(sizes) for axis, sizes in row.items()} for row in stages]
            kept = PartialFile(Path(partial), {**record, **covers, "axes": axes, "beside": list(models)[1:]})
        whole, grids, others = time_blocks(timed, stages, rounds, wholes, kept, progress)
        record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        record["minutes"] = round((time.monotonic() - started) / 60, 1)
        record["dense_seconds"] = others[0]
        if beside:
            record["beside_seconds"] = dict(zip(beside, others[1:], strict=True))
        return cls(record, covers, whole, grids, monotone)

    # ------------------------------------------------------------------ predicting
    def predict(self, architecture: Architecture) -> float:
        """Seconds of one forward pass of the table's batch, with embedding and head; errors as of :meth:`meter`."""
        self.check(architecture)
        return LatencyMeter(self, architecture).total(architecture)

    def layer_seconds(self, shape: LayerShape, width: int, stage: int = 0) -> float:
        """Seconds of one block of a stage at a residual width.

        Raises:
            LatencyTableError: a size lies outside the grid, or the block's mixer was not timed.
        """
        grids = self._stages[stage]
        place = {"embedding": width, "shifted": int(bool(shape.shifted))}
        if shape.mixer == "attention":
            sizes = {**place, "heads": shape.heads, "qk": shape.qk_dim, "v": shape.v_dim}
            seconds = self._read(stage, "attention", shape.attention_in, sizes)
        elif shape.mixer in grids:
            conv = {"channels": shape.conv_channels or 0, "batch_norm": int(bool(shape.batch_norm))}
            seconds = grids[shape.mixer].at(**place, **conv)
        else:
            raise LatencyTableError(f"the table has no times of the mixer {shape.mixer!r}")
        if shape.mlp:
            place["shifted"] = 0
            seconds += self._read(stage, "mlp", shape.mlp_in, {**place, "mlp": shape.mlp}) - grids["none"].at(**place)
        return seconds

    def _read(self, stage: int, name: str, inputs: int | None, sizes: dict[str, int]) -> float:
        grids = self._stages[stage]
        if inputs is None:
            return grids[name].at(**sizes)
        if name + READING not in grids:
            raise LatencyTableError(
                f"the table has no times of blocks that read only some of their inputs ({name}_in {inputs}); measure "
                "one with inputs in its grid"
            )
        return grids[name + READING].at(**sizes, inputs=inputs)

    def outer_seconds(self, hidden_size: int) -> float:
        """Seconds of everything outside the blocks at a residual width; errors as of :meth:`layer_seconds`."""
        stages = zip(self._stages, self.covers["width_factors"], strict=True)
        empty = (grids["none"].at(embedding=hidden_size * factor, shifted=0) for grids, factor in stages)
        return self._model.at(embedding=hidden_size) - sum(empty)

    # ------------------------------------------------------------------ use
    def check(
        self,
        architecture: Architecture,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Refuse another dense model, or other images or batches (None: not stated) than those of the table.

        Raises:
            LatencyTableError: what differs, and what the table has.
        """
        theirs = covered_model(architecture, tuple(self.provenance["image_size"]))
        differing = [f"{k} {theirs.get(k)!r}, the table {v!r}" for k, v in self.covers.items() if theirs.get(k) != v]
        if image_size is not None and list(pair(image_size)) != list(self.provenance["image_size"]):
            differing.append(f"images of {pair(image_size)}, the table {tuple(self.provenance['image_size'])}")
        if batch_size is not None and batch_size != self.provenance["batch_size"]:
            differing.append(f"batches of {batch_size}, the table {self.provenance['batch_size']}")
        if differing:
            raise LatencyTableError(
                f"the latency table is of another model or input: the model has {'; '.join(differing)}. Measure a "
                "table for this one (hf-vitprune latency)"
            )

    def check_device(self) -> None:
        """Refuse a table that was not measured on this machine's processor or accelerator.

        Raises:
            LatencyTableError: names both.
        """
        made_on = self.provenance["device"]
        here = {device_name("cpu")}
        if torch.cuda.is_available():
            here |= {device_name(f"cuda:{i}") for i in range(torch.cuda.device_count())}
        elif torch.accelerator.is_available():
            here.add(device_name(torch.accelerator.current_accelerator() or "cpu"))
        if made_on not in here:
            raise LatencyTableError(
                f"the latency table was measured on {made_on}, this machine has {', '.join(sorted(here))}. If the "
                "model is to run there, say so with allow_other_device; otherwise measure a table here"
            )

    def meter(
        self,
        reference: Architecture,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int | None = None,
        allow_other_device: bool = False,
    ) -> LatencyMeter:
        """Seconds a batch of models pruned from ``reference``, for a search.

        Args:
            image_size: side, or (height, width), in pixels; the model's own by default.
            batch_size: images a forward pass that the pruned model is for; None: the table's.
            allow_other_device: the table may be of another device than this machine's.

        Raises:
            LatencyTableError: the table is of another model, input, batch or device, or does not cover the reference.
        """
        sizes = reference.family.sizes_config(reference.config)
        self.check(reference, pair(sizes.image_size if image_size is None else image_size), batch_size)
        if not allow_other_device:
            self.check_device()
        meter = LatencyMeter(self, reference)
        meter.ratio(reference)
        return meter

    # ------------------------------------------------------------------ files
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        stages = [{name: grid.to_dict() for name, grid in row.items()} for row in self.stages]
        record = {"version": FORMAT_VERSION, "provenance": self.provenance, "covers": self.covers}
        return {**record, "monotone": self.monotone, "model": self.model.to_dict(), "stages": stages}

    @classmethod
    def from_dict(cls, record: Any) -> LatencyTable:
        """Inverse of :meth:`to_dict`."""
        needed = {"version", "provenance", "covers", "monotone", "model", "stages"}
        if not isinstance(record, dict) or not needed <= record.keys():
            raise LatencyTableError(f"a latency table has {', '.join(sorted(needed))}")
        if record["version"] != FORMAT_VERSION:
            raise LatencyTableError(f"format version {record['version']!r}, this library reads {FORMAT_VERSION}")
        kinds = {"provenance": dict, "covers": dict, "monotone": bool, "stages": list}
        wrong = [name for name, kind in kinds.items() if not isinstance(record[name], kind)]
        if wrong or not all(isinstance(row, dict) for row in record["stages"]):
            raise LatencyTableError(f"malformed: {', '.join(wrong) or 'stages'}")
        stages = [
            {name: SampledGrid.from_dict(f"stage {i} {name}", grid) for name, grid in row.items()}
            for i, row in enumerate(record["stages"])
        ]
        model = SampledGrid.from_dict("model", record["model"])
        return cls(record["provenance"], record["covers"], model, stages, record["monotone"])

    def save(self, path: str | Path) -> Path:
        """Write the table as JSON."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            LatencyTableError: the file is damaged.
            OSError: there is no such file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, LatencyTableError) as error:
            raise LatencyTableError(f"{path} is no usable latency table: {error}") from error

    def summary(self) -> dict[str, Any]:
        """What to note of a table in the settings of a run: where and when it was made, and a digest of it."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
        names = ("device", "dtype", "batch_size", "image_size", "date")
        return {**{name: self.provenance[name] for name in names}, "digest": digest}

    def __repr__(self) -> str:
        p = self.provenance
        return f"LatencyTable({self.covers['model_type']} on {p['device']}, batch {p['batch_size']}, {p['dtype']})"


class LatencyMeter(CostMeter):
    """Seconds a batch, from a table that was measured on the device the model is for."""

    metric = "latency"

    def __init__(self, table: LatencyTable, reference: Architecture) -> None:
        super().__init__(reference)
        self.table = table

    def _layer_cost(self, shape: LayerShape, width: int, stage: int) -> float:
        return self.table.layer_seconds(shape, width, stage)

    def _outer_cost(self, hidden_size: int) -> float:
        return self.table.outer_seconds(hidden_size)
