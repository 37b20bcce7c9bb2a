"""What a kind of adapter says of itself so that it can be pruned with its model, and PEFT's registry of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftType
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils import register_peft_method
from peft.utils.other import get_pattern_key
from torch import nn

from ...errors import AdapterError
from ...surgery.cuts import Cut

Side = Literal["in", "out", "none"]
_KINDS: dict[str, Any] = {}
#: name of a tensor within its layer -> the new tensor, and whether it is trained
Tensors = dict[str, tuple[torch.Tensor, bool]]

#: of the types that carry the record of a pruned base
PREFIX = "VITPRUNE_"


@dataclass(frozen=True)
class LayerCut:
    """Which rows (outputs) and columns (inputs) of a weight stay, and the factors of the columns; None: all, ones."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    scale: torch.Tensor | None

    @classmethod
    def of(cls, cut: Cut, shape: torch.Size) -> LayerCut:
        def index(axis: int) -> torch.Tensor | None:
            kept = cut.index.get(axis)
            whole = kept is None or torch.equal(kept.cpu(), torch.arange(shape[axis]))
            return None if whole else kept

        scale = cut.scale.get(1)
        return cls(index(0), index(1), None if scale is None or bool((scale == 1).all()) else scale)

    @property
    def keeps_inputs(self) -> bool:
        return self.columns is None and self.scale is None

    @property
    def is_whole(self) -> bool:
        return self.rows is None and self.keeps_inputs

    def take(self, tensor: torch.Tensor, side: Side, axis: int, scaled: bool = False) -> torch.Tensor:
        """The part of ``tensor`` that stays; its ``axis`` runs over the rows or columns of the weight."""
        kept = {"in": self.columns, "out": self.rows, "none": None}[side]
        cut = Cut("", {} if kept is None else {axis: kept})
        if scaled and self.scale is not None:
            cut.scale[axis] = self.scale
        return cut.take(tensor.detach())


class AdapterKind:
    """One PEFT type; a subclass with a name is known by it. As it stands: stays where a layer loses nothing, else
    becomes LoRA or is merged.

    Attributes:
        name: of the type (``"LORA"``).
        sides: name of each tensor of a layer -> the side of the weight it belongs to; rows are outputs, columns
            inputs. Empty: this kind cannot be sliced.
        scaled: the tensor that takes the factors which a plan folds into the columns of the weight. Empty: the
            adapter multiplies the weight elementwise, and has them from there.
        convolutions: whether it can be sliced on convolutions as well.
        changes_inputs: it acts on the input of the layer, so that nothing is to be done while all inputs stay.
        additive: it adds ``get_delta_weight`` to the weight, whatever that is.
        settings_dropped: fields that belong to how an adapter was made.
        settings_refused: fields that cannot be said of a pruned model.
        cannot_be_merged: why, for kinds that no weights can take in.
        tuner_mixin: put in front of PEFT's tuner class, in the type for pruned models.
    """

    name = ""
    sides: Mapping[str, Side] = {}
    scaled = ""
    convolutions = False
    changes_inputs = False
    additive = False
    settings_dropped: tuple[str, ...] = ()
    settings_refused: tuple[str, ...] = ("target_parameters", "trainable_token_indices", "modules_to_tie")
    cannot_be_merged = ""
    tuner_mixin: type = object

    def __init_subclass__(cls) -> None:
        if cls.name:
            _KINDS[cls.name] = cls()

    # ------------------------------------------------------------------ settings
    def check_config(self, config: Any) -> None:
        """Refuse settings that do not survive a change of the model's structure (AdapterError)."""
        for field in self.settings_refused:
            if getattr(config, field, None):
                raise AdapterError(
                    f"an adapter with {field} cannot be carried over to a pruned model; merge it first "
                    "(merge_and_unload), or prune the base model and train the adapter on the small one"
                )

    def changes_base(self, config: Any) -> bool:
        """Whether the adapter changed the base weights when it was made (PiSSA and the like)."""
        return False

    def rewrite(self, fields: dict[str, Any], layers: Mapping[str, Any]) -> None:
        """Change fields of the new config in place; ``layers``: new name -> old layer, of those it stays on."""

    def renamed_pattern(self, field: str, pattern: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """A field of values by layer (keys: regular expressions), for layers named one by one: old name -> new."""
        found = {old: get_pattern_key(list(pattern), old) for old in names}
        return {names[old]: pattern[key] for old, key in found.items() if key in pattern}

    # ------------------------------------------------------------------ slicing
    def cut_of(self, layer: Any, cut: Callable[[str], LayerCut]) -> LayerCut:
        """What a layer loses. ``cut(name)`` is that of a module in the layer that is wrapped; "" names itself."""
        return cut("")

    def slice(self, layer: Any, cut: LayerCut) -> Tensors | None:
        """New tensors of a layer's adapters; None: they cannot be sliced like that."""
        tensors = adapter_tensors(layer)
        if cut.is_whole or (self.changes_inputs and cut.keeps_inputs):
            return {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()}
        base = layer.get_base_layer()
        convolution = self.convolutions and isinstance(base, nn.Conv2d) and base.groups == 1
        if not (isinstance(base, nn.Linear) or convolution) or getattr(layer, "fan_in_fan_out", False):
            return None
        sliced: Tensors = {}
        for name, tensor in tensors.items():
            part = name.split(".")[0]
            if part not in self.sides:
                return None
            side, axis = self.place(part, layer)
            sliced[name] = cut.take(tensor, side, axis, scaled=part == self.scaled), tensor.requires_grad
        return sliced

    def place(self, part: str, layer: Any) -> tuple[Side, int]:
        """(side of the weight, axis) of one tensor."""
        side = self.sides[part]
        return side, int(side == "in")

    def fits(self, tuner: Any, layers: list[Any]) -> bool:
        """Whether PEFT can make the tuner anew for these layers alone."""
        return True

    def as_lora(self, layer: Any, cut: LayerCut) -> Tensors | None:
        """LoRA tensors (scaling 1) of a layer's adapters of another kind, sliced.

        PEFT splits the change of the weight by singular values; those that are nothing but rounding are left out. So
        this is exact to rounding, or None: the type cannot be converted, or LoRA would be larger than the weight.
        """
        base: Any = layer.get_base_layer()
        names = layer._get_available_adapters()
        if not isinstance(base, nn.Linear) or len(names) > 1 or not layer.supports_lora_conversion(*names):
            return None
        lora: Tensors = {}
        for name in names:
            state = convert_to_lora(layer, min(base.weight.shape), name)[1]
            a, b = state[".lora_A.weight"], state[".lora_B.weight"]
            sizes = b.norm(dim=0) * a.norm(dim=1)
            rounding = torch.finfo(a.dtype).eps * max(base.weight.shape)
            real = sizes > sizes.max() * rounding
            if not real.any():  # what does nothing yet can still be trained
                real[0] = True
                a = torch.full_like(a, a.shape[1] ** -0.5)
            if int(real.sum()) * sum(base.weight.shape) > base.weight.numel():
                return None
            trained = any(tensor.requires_grad for tensor in adapter_tensors(layer).values())
            lora[f"lora_A.{name}.weight"] = cut.take(a[real], "in", 1, scaled=True), trained
            lora[f"lora_B.{name}.weight"] = cut.take(b[:, real], "out", 0), trained
        return lora

    def finished(self, tensor: torch.Tensor, name: str, layer: str, configs: Mapping[str, Any]) -> torch.Tensor:
        """The tensor ``name`` of ``layer`` as PEFT has it once it is loaded with its config."""
        return tensor

    # ------------------------------------------------------------------ new weights under adapters
    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        """Whether weights can be found under a Linear's active adapters that make up a given effective weight.

        Args:
            layer: as it is in the dense model.
            weight: the effective weight; None where only the bias is new.
        """
        return self.additive

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        """Take an adapter's part out of the effective weight and bias that ``base`` holds, in place."""
        base.weight.data -= layer.get_delta_weight(adapter).to(base.weight)


def kind_named(name: str) -> AdapterKind:
    """The kind of that name; one that only stays whole, becomes LoRA or is merged where nothing is known of it."""
    if name not in _KINDS:
        made = AdapterKind()
        made.name = name
        return made
    return _KINDS[name]


def kind_of(config: Any) -> AdapterKind:
    """Of an adapter's config, of a stock type or one for pruned models."""
    return kind_named(str(config.peft_type.value).removeprefix(PREFIX))


def adapter_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a tuner layer but those of the layer it wraps."""
    named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if not name.startswith("base_layer.")}


def add_peft_method(name: str, config_class: Any, tuner_class: Any, prefix: str) -> None:
    """Make an adapter type known to PEFT under ``name`` (capitals); nothing happens where it is known already."""
    if name in PeftType._value2member_map_:
        return
    member: Any = str.__new__(PeftType, name)  # the registry is open to new methods, the enumeration of names is not
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    register_peft_method(name=name.lower(), config_cls=config_class, model_cls=tuner_class, prefix=prefix)
