"""At the door: are a model's tensors where its config and its family say? What differs is named before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedConfig

from ..errors import ModelMismatchError, UnsupportedModelError
from ..families import LayerPaths
from ..utils.modules import get_wrapped, unwrapped
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
