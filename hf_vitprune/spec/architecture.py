"""The shape of a (pruned) model: sizes of every layer, and the dense config it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig

from ..errors import InvalidArchitectureError, InvalidConfigError, UnsupportedModelError
from ..families import Family, family_of
from ..families.base import pair
from ..utils.settings import check_image_size
from .configs import (
    check_depth,
    checked_depths,
    dense_config,
    dense_sizes,
    fingerprint,
    make_config,
    possible_depths,
    stock_config,
    task_of,
)
from .layer_shape import (
    LayerShape,
    check_shape,
    check_size,
    shape_from_row,
    shape_from_words,
    shape_to_words,
)
from .towers import check_live, find_tower, unwrap

__all__ = ["Architecture", "unwrap"]

#: version of the JSON form of an architecture
FORMAT_VERSION = 1
#: versions of the ``pruning_config`` in config.json that are read; the last one is written. Since 2 the width beside
#: it is a sentence, so that no stock class takes the folder for one of its own
RECORD_VERSIONS = (1, 2)


@dataclass(frozen=True)
class Architecture:
    """Sizes of every layer of a model, and the stock config of its dense form.

    Attributes:
        config: stock config of the dense model (never a pruned one).
        layers: shapes of the layers that exist, bottom to top.
        hidden_size: width of the residual stream (Swin: of the first stage).
        depths: layers a stage (Swin), else None.
        task: class name without its family prefix, e.g. ``"ForImageClassification"`` or ``"Model"``.
        part: of a bigger model, what it is the shape of (a role or path, see ``towers``); None: the whole model.
    """

    config: PreTrainedConfig = field(compare=False, repr=False)
    layers: tuple[LayerShape, ...]
    hidden_size: int
    depths: tuple[int, ...] | None = None
    task: str = "ForImageClassification"
    part: str | None = field(default=None, compare=False)

    # ------------------------------------------------------------------ making one
    @classmethod
    def of(cls, model: Any, part: str | None = None) -> Architecture:
        """The architecture of a stock, pruned, PEFT or wrapped model, or of a tower in it, compared with its tensors.

        Args:
            model: the whole model.
            part: which tower of a bigger model; its only one by default.

        Raises:
            UnsupportedModelError: no family is registered for it, or there are several towers and no ``part``.
            ModelMismatchError: its tensors are not what its config says.
        """
        base = unwrap(model)
        tower = find_tower(base, part)
        module = base.get_submodule(tower.path)
        found = cls.from_config(module.config, task=task_of(module))
        if tower.path:
            found = replace(found, part=tower.part)
        check_live(module, found)
        return found

    @classmethod
    def given(cls, model: Any, part: str | None = None) -> Architecture:
        """:meth:`of` a model; an architecture as it is."""
        return model if isinstance(model, cls) else cls.of(model, part)

    @classmethod
    def from_config(cls, config: PreTrainedConfig, task: str = "ForImageClassification") -> Architecture:
        """The architecture that a stock or pruned config describes."""
        record = getattr(config, "pruning_config", None)
        if record is not None:
            return read_record(config, record, task)
        return cls.dense(stock_config(config), task)

    @classmethod
    def dense(cls, config: PreTrainedConfig, task: str = "ForImageClassification") -> Architecture:
        """The unpruned architecture of a stock config."""
        family = family_of(config)
        for name in ("num_hidden_layers", "depths"):
            check_depth(getattr(family.sizes_config(config), name, None))
        try:
            sizes = family.dense_layers(config)
        except UnsupportedModelError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidArchitectureError(f"no {config.model_type} model has this config: {error!r}") from error
        if not sizes:
            raise InvalidArchitectureError(f"no {config.model_type} model has this config: it has no layers")
        depths = family.depths(config)
        shifts = [None] * len(sizes) if depths is None else [bool(b % 2) for depth in depths for b in range(depth)]
        layers = tuple(
            LayerShape("attention", size.heads, size.head_dim, size.head_dim, size.mlp, shifted=shifted)
            for size, shifted in zip(sizes, shifts, strict=True)
        )
        return cls(config, layers, sizes[0].embedding, depths, task)

    @classmethod
    def from_layers(
        cls, base_config: PreTrainedConfig, layers: list[Any], hidden_size: int | None = None
    ) -> Architecture:
        """An architecture given layer by layer.

        Args:
            base_config: stock config of the dense model; gives what ``layers`` leaves out, and the attention scale.
            layers: one dict a layer (Swin: a list of such lists, one a stage) with any of ``mixer``, ``heads``,
                ``qk_dim``, ``v_dim``, ``mlp``, ``attention_in``, ``mlp_in``, ``conv_channels`` (of a convolution; by
                default the channels of one head), ``batch_norm``. Fewer layers than the dense model has are its
                first ones.
            hidden_size: residual width; the dense one by default.

        Raises:
            InvalidArchitectureError: an unknown key, a size that is no positive integer, too many layers.
        """
        dense = cls.dense(stock_config(base_config))
        full = dense.depths or (len(dense.layers),)
        stages = layers if dense.depths is not None else [list(layers)]
        if len(stages) != len(full) or not all(isinstance(stage, list) for stage in stages):
            raise InvalidArchitectureError(f"give {len(full)} lists of layers, one a stage")
        depths = tuple(map(len, stages)) if dense.depths is not None else None
        if any(kept > whole for kept, whole in zip(depths or (), full, strict=False)):
            raise InvalidArchitectureError(f"stages have at most {full} layers, got {depths}")
        rows = [(sum(full[:s]) + b, row) for s, stage in enumerate(stages) for b, row in enumerate(stage)]
        fewest = 1 if "layers" in dense.units else len(dense.layers)
        if not fewest <= len(rows) <= len(dense.layers):
            raise InvalidArchitectureError(f"{base_config.model_type} has {len(dense.layers)} layers, got {len(rows)}")
        shapes = tuple(shape_from_row(row, dense.layers[i], f"layer {i}") for i, row in rows)
        width = dense.hidden_size if hidden_size is None else hidden_size
        return cls(dense.config, shapes, width, depths, dense.task).validated()

    # ------------------------------------------------------------------ what follows from it
    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def units(self) -> frozenset[str]:
        """Units that models like this have."""
        return self.family.units_of(self.config)

    @property
    def unpruned(self) -> Architecture:
        """That of the dense model."""
        return Architecture.dense(self.config, self.task)

    @property
    def stages(self) -> list[int]:
        """Stage of every layer; all 0 without stages."""
        return [s for s, depth in enumerate(self.depths or (len(self.layers),)) for _ in range(depth)]

    @property
    def kinds(self) -> list[int]:
        """Kind of every layer, of which one costs what another of the same sizes does: its stage, for most."""
        return self.family.kinds(self.config, self.stages)

    def width(self, layer: int) -> int:
        """Residual width at a layer."""
        return self.hidden_size * self.family.width_factor(self.stages[layer])

    def head_dim(self, layer: int) -> int:
        """Channels a head of the dense model: what the attention scale is made from, whatever was removed."""
        first = sum((self.family.depths(self.config) or ())[: self.stages[layer]])  # of its stage
        return self.family.dense_layers(self.config)[first].head_dim

    def scaling(self, layer: int) -> float:
        return self.head_dim(layer) ** -0.5

    def fits(self, other: Architecture) -> bool:
        """Whether a plan made for one can be carried out on the other.

        Equal sizes are not enough: the dense models behind them give the attention scale and the kind of MLP.
        """
        return (
            self.model_type == other.model_type
            and replace(self, task=other.task) == other
            and all(self.head_dim(i) == other.head_dim(i) for i in range(len(self.layers)))
            and self.family.fc1_names(self.config) == self.family.fc1_names(other.config)
        )

    def layer_names(self) -> list[str]:
        """Paths of the layers below the encoder."""
        return self.family.layer_names(len(self.layers), self.depths)

    def layer_lists(self) -> dict[str, int]:
        """Path of every list of layers below the encoder -> its length, 0 in stages that are empty."""
        names = self.family.layer_names(len(self.layers), self.unpruned.depths)
        lists = dict.fromkeys((name.rpartition(".")[0] for name in names), 0)
        for name in self.layer_names():
            lists[name.rpartition(".")[0]] += 1
        return lists

    # ------------------------------------------------------------------ checks
    def check_looks(self, what: str, at_images: bool = True) -> None:
        """Refuse what runs a model on images where it reads something else; ``what`` names it in the error.

        ``at_images`` False: patches, and frames of videos, will do.
        """
        if self.family.reads != "images" and (at_images or self.family.part == "text"):
            raise UnsupportedModelError(
                f"{what} runs the model on images, and a {self.model_type} reads {self.family.reads}: use "
                "PruningPlan.magnitude, criteria.magnitude or a method that trains the whole model"
            )

    def checked_size(self, image_size: Any) -> tuple[int, int] | None:
        """(height, width) in pixels of a side or a pair, with room for a patch; None, for the config's, as it is."""
        check_image_size(image_size)
        if image_size is None:
            return None
        height, width = pair(image_size)
        if 0 in self.family.grid(self.config, image_size):
            raise InvalidConfigError(f"an image of {height} x {width} pixels holds no patch of a {self.model_type}")
        return height, width

    def validated(self) -> Architecture:
        """Itself, when every size is possible; raises InvalidArchitectureError with the layer and the size."""
        dense = self.unpruned
        check_size("hidden_size", self.hidden_size, dense.hidden_size)
        if "embedding" not in self.units and self.hidden_size != dense.hidden_size:
            raise InvalidArchitectureError(f"the residual width of {self.model_type} cannot be changed")
        if not 0 < len(self.layers) <= len(dense.layers):
            raise InvalidArchitectureError(f"{len(self.layers)} layers, the dense model has {len(dense.layers)}")
        if (self.depths is None) != (dense.depths is None) or len(self.depths or ()) != len(dense.depths or ()):
            raise InvalidArchitectureError(f"depths are {self.depths}, of the dense model {dense.depths}")
        if self.depths is not None and not possible_depths(self.depths, len(self.layers)):
            raise InvalidArchitectureError(
                f"depths {self.depths} of {len(self.layers)} layers: only the last stages can be empty"
            )
        largest = {name: max(getattr(s, name) for s in dense.layers) for name in ("heads", "qk_dim", "v_dim", "mlp")}
        for i, shape in enumerate(self.layers):
            where = f"layer {i}"
            check_shape(shape, largest, self.width(i), where)
            if shape.kernel and not self.family.convolutions:
                raise InvalidArchitectureError(
                    f"{where}: {self.model_type} models cannot mix tokens by {shape.mixer}: "
                    "their grid of patches is not known"
                )
            if (shape.shifted is None) != (self.depths is None) or not isinstance(shape.shifted, (bool, type(None))):
                raise InvalidArchitectureError(
                    f"{where}: shifted is for layers of windows only, got {shape.shifted!r}"
                )
        refused = self.family.refused_sizes(self.config, self.layers)
        if refused is not None:
            raise InvalidArchitectureError(f"{self.model_type}: {refused}")
        return self

    # ------------------------------------------------------------------ JSON
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, complete with the dense config."""
        layers = [{k: v for k, v in asdict(shape).items() if v is not None} for shape in self.layers]
        depths = list(self.depths) if self.depths is not None else None
        record = {"version": FORMAT_VERSION, "task": self.task, "hidden_size": self.hidden_size, "layers": layers}
        if self.part is not None:
            record["part"] = self.part
        return {**record, "depths": depths, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Architecture:
        """Inverse of :meth:`to_dict`; raises InvalidArchitectureError where something is missing or impossible."""
        if not isinstance(record, dict) or not {"config", "layers", "hidden_size", "task"} <= record.keys():
            raise InvalidArchitectureError("an architecture has config, layers, hidden_size and task")
        if record.get("version") != FORMAT_VERSION:
            raise InvalidArchitectureError(
                f"format version {record.get('version')!r}, this library reads {FORMAT_VERSION}"
            )
        rows, depths, task = record["layers"], record.get("depths"), record["task"]
        known = set(LayerShape.__dataclass_fields__)
        if not isinstance(rows, list) or any(not isinstance(row, dict) or set(row) - known for row in rows):
            raise InvalidArchitectureError(f"layers is a list of dicts with any of {', '.join(sorted(known))}")
        if not isinstance(task, str) or not isinstance(record["config"], dict):
            raise InvalidArchitectureError("task is a class name without its family's prefix, config a dict")
        part = record.get("part")
        if part is not None and not isinstance(part, str):
            raise InvalidArchitectureError(f"part is the name of a tower, got {part!r}")
        fields = dict(record["config"])
        config = make_config(fields.pop("model_type", None), fields)
        cls.dense(config)  # refuses one of no model
        layers = tuple(LayerShape(**row) for row in rows)
        return cls(config, layers, record["hidden_size"], checked_depths(depths), task, part).validated()

    def replace(self, **changes: Any) -> Architecture:
        return replace(self, **changes).validated()


def dense_of(config: PreTrainedConfig, task: str = "ForImageClassification") -> Architecture:
    """The dense architecture behind a stock or pruned config, as far as it remembers, or its own."""
    return Architecture.dense(dense_config(config), task)


# ---------------------------------------------------------------------- the record in config.json
def write_record(architecture: Architecture, info: dict[str, Any] | None = None) -> dict[str, Any]:
    """``pruning_config`` for config.json: versioned, in per_layer_config's words, sealed by a fingerprint."""
    c = architecture.family.sizes_config(architecture.config)
    names = dense_sizes(architecture.depths)
    record: dict[str, Any] = {
        "version": RECORD_VERSIONS[-1],
        "dense": {name: list(c.depths) if name == "depths" else getattr(c, name) for name in names},
        "hidden_size": architecture.hidden_size,
        "per_layer_config": {str(i): shape_to_words(shape) for i, shape in enumerate(architecture.layers)},
    }
    if architecture.depths is not None:
        record["depths"] = list(architecture.depths)
        record["head_dims"] = [architecture.head_dim(i) for i in range(len(architecture.layers))]
    if info:
        record["info"] = info
    record["fingerprint"] = fingerprint(record)
    return record


def read_record(config: PreTrainedConfig, record: Any, task: str) -> Architecture:
    """What a ``pruning_config`` describes; InvalidArchitectureError where it was edited or damaged."""
    if not isinstance(record, dict):
        raise InvalidArchitectureError(f"pruning_config is a {type(record).__name__}, expected a dict")
    version = record.get("version")
    if type(version) is not int or version not in RECORD_VERSIONS:
        raise InvalidArchitectureError(
            f"pruning_config has format version {version!r}, this library reads {RECORD_VERSIONS}; "
            "a newer hf_vitprune may read it"
        )
    missing = {"dense", "hidden_size", "per_layer_config", "fingerprint"} - record.keys()
    if missing:
        raise InvalidArchitectureError(f"pruning_config lacks {', '.join(sorted(missing))}")
    rows = record["per_layer_config"]
    if not isinstance(rows, dict) or not isinstance(record["dense"], dict):
        raise InvalidArchitectureError("pruning_config: per_layer_config and dense are dicts")
    if sorted(rows) != sorted(str(i) for i in range(len(rows))):
        raise InvalidArchitectureError("pruning_config: per_layer_config numbers the layers from 0 without gaps")
    try:
        seal = fingerprint(record)
    except (TypeError, ValueError) as error:
        raise InvalidArchitectureError(f"pruning_config is not JSON: {error}") from error
    depths = checked_depths(record.get("depths"))
    shapes = tuple(shape_from_words(rows[str(i)], f"pruning_config: layer {i}") for i in range(len(rows)))
    base = stock_config(config)
    architecture = Architecture(base, shapes, record["hidden_size"], depths, task).validated()
    if seal != record["fingerprint"]:
        raise InvalidArchitectureError(
            "pruning_config does not match its fingerprint: it was edited or damaged after the model was saved; "
            "fetch config.json again, or rebuild the model with hf_vitprune.prune"
        )
    stated = Architecture.dense(config)
    if (len(stated.layers), stated.depths, stated.hidden_size) != (len(shapes), depths, architecture.hidden_size):
        raise InvalidArchitectureError(
            f"config.json says {stated.depths or len(stated.layers)} layers of width {stated.hidden_size}, its "
            f"pruning_config {depths or len(shapes)} of width {architecture.hidden_size}"
        )
    head_dims = [architecture.head_dim(i) for i in range(len(shapes))]
    if depths is not None and version > 1 and record.get("head_dims") != head_dims:
        raise InvalidArchitectureError(
            f"config.json gives the dense model heads of {head_dims} channels, its pruning_config of "
            f"{record.get('head_dims')}: the config was edited or damaged; fetch config.json again"
        )
    return architecture
