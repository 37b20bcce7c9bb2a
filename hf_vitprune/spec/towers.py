"""The live model: what it is wrapped in, which towers are in it, and whether its tensors are what its config says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelMismatchError, UnsupportedModelError
from ..families import Family, LayerPaths, family_of, find_family
from ..utils.modules import get_wrapped, unwrapped
from .configs import is_pruned
from .layer_shape import LayerShape


def unwrap(model: Any) -> Any:
    """The transformers model inside a PruningModel or a PeftModel, or itself; all else is refused."""
    while True:
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(f"a model is asked for, not {_what_is_passed(model)}")
        cure = _WRAPPERS.get(type(model).__name__)
        if cure is not None:
            raise UnsupportedModelError(f"the model is wrapped in {type(model).__name__}: pass {cure}")
        inner = getattr(model, "get_base_model", None)
        if inner is None:
            return model
        model = inner()


def _what_is_passed(thing: Any) -> str:
    """What stands where a model should, and the cure."""
    if isinstance(thing, (str, Path)):
        return f"its name: load it first, by AutoModel.from_pretrained({str(thing)!r}) or the class of its task"
    if isinstance(thing, type):
        return f"the class {thing.__name__}: pass what {thing.__name__}.from_pretrained returns"
    if isinstance(thing, PreTrainedConfig):
        return f"a {type(thing).__name__}: load the model by from_pretrained, or make one by the class's from_config"
    inner = getattr(thing, "model", None)
    return f"a {type(thing).__name__}" + (": pass its .model" if isinstance(inner, nn.Module) else "")


#: class of a wrapper -> what to pass instead
_WRAPPERS = {
    "OptimizedModule": "what torch.compile was given (model._orig_mod), and compile the result",
    "DistributedDataParallel": "model.module (accelerator.unwrap_model(model))",
    "DataParallel": "model.module",
    "FullyShardedDataParallel": "the model from before it was sharded",
    "TopLevelTracedModule": "what torch.jit.trace was given, and trace the small model",
    "RecursiveScriptModule": "what torch.jit was given, and script the small model",
    "GraphModule": "the model that the graph was made of (by torch.export or torch.fx), and export the small one",
}
#: packages whose layers, or whose tensors, hold quantized weights
_QUANTIZERS = (
    "aqlm.", "auto_gptq.", "awq.", "bitsandbytes.", "compressed_tensors.", "eetq.", "fbgemm.", "gptqmodel.", "hqq.",
    "optimum.", "quanto.", "torch.ao.", "torchao.", "vptq.",
)  # fmt: skip


def check_live(model: nn.Module, architecture: Any) -> None:
    """Compare the tensors of every layer, and the stem, with the ``Architecture`` that a model's config describes.

    Its Linears may be wrapped by PEFT. ModelMismatchError names the first module that differs, and the cure.
    """
    family, config = architecture.family, architecture.config
    if getattr(model, "is_quantized", False):
        raise ModelMismatchError("the model is quantized: prune it in full precision, then quantize the small one")
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise ModelMismatchError(
                f"{path} is compiled: put back its _orig_mod, and compile the small model instead"
            )
    prefix = family.encoder_path(model)
    for name, count in architecture.layer_lists().items():
        path = prefix + name
        there = len(_find(model, path))
        if there != count:
            field = "depths" if architecture.depths is not None else "num_hidden_layers"
            raise ModelMismatchError(
                f"{path} holds {there} layers, and by the config there are {count}: layers were cut or added by hand. "
                f"Set config.{field} to what the model is (or keep all layers, and remove them with "
                "hf_vitprune.truncate)"
            )
    for i, name in enumerate(architecture.layer_names()):
        paths = family.layer_paths(prefix, name, config)
        _check_layer(model, paths, architecture.layers[i], architecture.width(i))
    _check_stem(model, architecture, prefix + family.patch)


def _check_layer(model: nn.Module, paths: LayerPaths, shape: LayerShape, width: int) -> None:
    if shape.mixer == "attention":
        inputs = width if shape.attention_in is None else shape.attention_in
        qk, v = shape.heads * shape.qk_dim, shape.heads * shape.v_dim
        for path, outputs in ((paths.q, qk), (paths.k, qk), (paths.v, v)):
            _check_linear(model, path, outputs, inputs)
        _check_linear(model, paths.o, width, v)
    if shape.mlp:
        for path in paths.fc1:
            _check_linear(model, path, shape.mlp, width if shape.mlp_in is None else shape.mlp_in)
        _check_linear(model, paths.fc2, width, shape.mlp)


def _find(model: nn.Module, path: str) -> Any:
    try:
        return get_wrapped(model, path)
    except AttributeError as error:
        raise ModelMismatchError(f"the model has no module {path}, which its family says it has") from error


def _check_linear(model: nn.Module, path: str, outputs: int, inputs: int) -> None:
    module = unwrapped(_find(model, path))
    _check_own_weight(module, path)
    if not isinstance(module, nn.Linear):
        raise ModelMismatchError(f"{path} is a {type(module).__name__}, and only a torch.nn.Linear can be pruned")
    found = tuple(module.weight.shape)
    if found != (outputs, inputs):
        raise ModelMismatchError(
            f"{path} has a weight of {found}, and by the config it has {(outputs, inputs)}: the model was changed "
            "after it was built. Set the config to what the model is, or undo the change"
        )


def _check_own_weight(module: nn.Module, path: str) -> None:
    """Whether what is multiplied is the module's own parameter, in full precision."""
    weight = module._parameters.get("weight")
    kinds = (type(module), type(weight), type(getattr(weight, "data", None)))
    quantized = any(f"{kind.__module__}.".startswith(_QUANTIZERS) for kind in kinds)
    if quantized or (weight is not None and (not weight.is_floating_point() or weight.dtype.itemsize < 2)):
        held = "" if weight is None else f" with a weight in {str(weight.dtype).removeprefix('torch.')}"
        raise ModelMismatchError(
            f"{path} is quantized (a {type(module).__module__}.{type(module).__name__}{held}): prune the model in "
            "full precision, then quantize the small one"
        )
    if parametrize.is_parametrized(module):
        raise ModelMismatchError(
            f"the weight of {path} is computed from other tensors (weight norm, ...): call "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
        )
    if "weight_orig" in module._parameters:
        raise ModelMismatchError(
            f"the weight of {path} is masked by torch.nn.utils.prune: call torch.nn.utils.prune.remove(module, "
            "'weight') first, which makes the zeros permanent"
        )
    if "weight_g" in module._parameters:
        raise ModelMismatchError(f"{path} has weight norm: call torch.nn.utils.remove_weight_norm(module) first")


def _check_stem(model: nn.Module, architecture: Any, path: str) -> None:
    projection = unwrapped(_find(model, path))
    _check_own_weight(projection, path)
    channels = getattr(architecture.family.sizes_config(architecture.config), "num_channels", None)
    weight: Any = getattr(projection, "weight", None)
    if weight is None or weight.shape[architecture.family.stem_axis] != architecture.hidden_size:
        raise ModelMismatchError(
            f"{path} does not make tokens of the config's width {architecture.hidden_size}: the model was changed "
            "after it was built"
        )
    if isinstance(projection, nn.Conv2d) and channels is not None and projection.in_channels != channels:
        raise ModelMismatchError(
            f"{path} takes {projection.in_channels} channels, and config.num_channels is {channels}: set the config "
            "(and the num_channels of the patch embedding) to what the model is"
        )


#: last name on the path of a tower -> its role
_ROLES = {
    "vision": ("vision", "image", "visual", "pixel"),
    "text": ("text",),
    "backbone": ("backbone",),
    "encoder": ("encoder",),
}


@dataclass(frozen=True)
class Tower:
    """An encoder that can be pruned."""

    #: its role in the model (``"vision"``, ``"text"``, ``"encoder"``, ``"backbone"``), or its path
    part: str
    #: of its module in the model; ``""`` where the model itself is it
    path: str
    #: ``model_type`` of its family
    family: str
    #: how many it has
    layers: int


def towers(model: Any) -> dict[str, Tower]:
    """Every prunable encoder of a transformers model (or of one in a PeftModel or PruningModel), by its part.

    Raises:
        UnsupportedModelError: it is no model.
    """
    model = unwrap(model)
    if stands_alone(model):
        own = family_of(model)
        return {own.part: Tower(own.part, "", own.model_type, _layers(model, own))}
    found: dict[str, Tower] = {}
    for path, module in model.named_modules():
        family = find_family(module) if path and isinstance(module, PreTrainedModel) else None
        inside = path.startswith(tuple(f"{tower.path}." for tower in found.values()))
        if inside or family is None or _layer_list(module, family) is None:
            continue
        last = path.rpartition(".")[2]
        role = next((role for role, words in _ROLES.items() if any(word in last for word in words)), path)
        part = path if role in found else role
        found[part] = Tower(part, path, family.model_type, _layers(module, family))
    return found


def stands_alone(model: nn.Module) -> bool:
    """Whether the model is an encoder with a head of its own: its config is the encoder's."""
    family = find_family(model)
    return family is not None and _layer_list(model, family) is not None


def find_tower(model: Any, part: str | None = None) -> Tower:
    """The tower of a part (its role, or its path); the only one by default; UnsupportedModelError lists all."""
    base = unwrap(model)
    if stands_alone(base) and part is None:
        return next(iter(towers(base).values()))
    found = towers(base)
    name = type(base).__name__
    if not found:
        looked = sorted({m.config.model_type for m in base.modules() if isinstance(m, PreTrainedModel)} - {""})
        if len(looked) < 2:
            family_of(base)  # says what is supported
        raise UnsupportedModelError(
            f"{name} holds no encoder of a registered family; looked at models of type {', '.join(looked)}. Register "
            "your own with hf_vitprune.register_family"
        )
    chosen = [tower for tower in found.values() if part in (tower.part, tower.path)]
    if part is None and len(found) == 1:
        return next(iter(found.values()))
    if len(chosen) != 1:
        listed = ", ".join(f"{tower.part!r} ({tower.family} at {tower.path or 'the top'})" for tower in found.values())
        problem = "holds several towers" if part is None else f"has no part {part!r}"
        raise UnsupportedModelError(f"{name} {problem}: choose one with part=..., of {listed}")
    return chosen[0]


def pruned_tower(model: Any, part: str | None = None) -> Tower:
    """The tower of a part; by default the only one, or the only pruned one; raises as :func:`find_tower`."""
    found = towers(model).values() if part is None else ()
    pruned = [tower for tower in found if is_pruned(unwrap(model).get_submodule(tower.path).config)]
    return pruned[0] if len(pruned) == 1 else find_tower(model, part)


def tower_module(model: Any, part: str | None = None) -> Any:
    """The module of a tower: a transformers model that stands for itself; raises as :func:`find_tower`."""
    base = unwrap(model)
    return base.get_submodule(find_tower(base, part).path)


def _layer_list(model: nn.Module, family: Family) -> Any:
    try:
        return model.get_submodule(family.encoder_path(model) + family.layers)
    except AttributeError:
        return None


def _layers(model: nn.Module, family: Family) -> int:
    return sum(len(getattr(stage, "blocks", [stage])) for stage in _layer_list(model, family))  # Swin's are in stages
