"""Sizes of one layer: checks, and the words of transformers' ``per_layer_config`` for them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import InvalidArchitectureError

#: what may mix the tokens of a layer; ``identity`` gives back its normalised input
MIXERS = ("attention", "conv3x3", "conv1x1", "identity", "none")
#: side of the kernel of the mixers that convolve over the patch grid
KERNELS = {"conv3x3": 3, "conv1x1": 1}
#: no redistribution needs a part this many times its dense size; larger numbers are taken for corruption
MAX_GROWTH = 16


def _size(default: Any, word: str, title: str = "") -> Any:
    """A field: its word in ``per_layer_config``, and what tables and plots call it where a plan can reduce it."""
    return field(default=default, metadata={"word": word, "title": title})


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer.

    ``qk_dim`` and ``v_dim`` are channels a head; ``mlp`` 0 means no MLP. Only attention has ``heads``, ``qk_dim``,
    ``v_dim`` and ``attention_in``; only convolutions have ``conv_channels`` and ``batch_norm``.
    """

    mixer: str = _size("attention", "mixer")
    heads: int = _size(0, "num_attention_heads", "heads")
    qk_dim: int = _size(0, "qk_head_dim", "q/k channels a head")
    v_dim: int = _size(0, "v_head_dim", "v channels a head")
    mlp: int = _size(0, "intermediate_size", "MLP neurons")
    #: channels that q/k/v (fc1) read after the norm; None: all
    attention_in: int | None = _size(None, "attention_input_size", "channels into attention")
    mlp_in: int | None = _size(None, "mlp_input_size", "channels into the MLP")
    #: Swin: windows of this layer are shifted
    shifted: bool | None = _size(None, "shifted")
    #: channels between the two halves of a convolution mixer
    conv_channels: int | None = _size(None, "conv_channels")
    #: whether a convolution mixer has a BatchNorm; False: it was folded into the convolution
    batch_norm: bool | None = _size(None, "batch_norm")

    @property
    def kernel(self) -> int | None:
        """Side of the convolution kernel; None where the mixer is no convolution."""
        return KERNELS.get(self.mixer)


def check_shape(shape: LayerShape, largest: dict[str, int], width: int, where: str) -> None:
    """Refuse impossible sizes: InvalidArchitectureError, with ``where`` and the size.

    Args:
        largest: dense sizes, by field, that the growth limit counts from.
        width: of the residual stream.
    """
    if shape.mixer not in MIXERS:
        raise InvalidArchitectureError(f"{where}: unknown mixer {shape.mixer!r}; one of {', '.join(MIXERS)}")
    if shape.mixer == "attention":
        for name in ("heads", "qk_dim", "v_dim"):
            check_size(f"{where}: {name}", getattr(shape, name), largest[name])
    else:
        _check_absent(shape, _ATTENTION_SIZES, where)
    if shape.kernel is None:
        _check_absent(shape, _CONV_SIZES, where)
    else:
        check_size(f"{where}: conv_channels", shape.conv_channels, width)
        if not isinstance(shape.batch_norm, bool):
            raise InvalidArchitectureError(f"{where}: batch_norm is True or False, got {shape.batch_norm!r}")
    if shape.mlp != 0 or isinstance(shape.mlp, bool):
        check_size(f"{where}: mlp", shape.mlp, largest["mlp"])
    for name in ("attention_in", "mlp_in"):
        size = getattr(shape, name)
        if size is not None:
            check_size(f"{where}: {name}", size, width)
            if size > width:
                raise InvalidArchitectureError(f"{where}: {name} {size} is over the width {width}")


_ATTENTION_SIZES = ("heads", "qk_dim", "v_dim", "attention_in")
_CONV_SIZES = ("conv_channels", "batch_norm")


def _check_absent(shape: LayerShape, names: tuple[str, ...], where: str) -> None:
    for name in names:
        size = getattr(shape, name)
        if size is not None and (size != 0 or isinstance(size, bool)):
            raise InvalidArchitectureError(f"{where}: a layer whose mixer is {shape.mixer!r} has no {name}")


def check_size(what: str, size: Any, dense: int) -> None:
    if type(size) is not int or size < 1:
        raise InvalidArchitectureError(f"{what} is {size!r}, expected a whole number of at least 1")
    if size > dense * MAX_GROWTH:
        raise InvalidArchitectureError(f"{what} is {size}, over {MAX_GROWTH} times the dense size {dense}")


def shape_from_row(row: Any, dense: LayerShape, where: str) -> LayerShape:
    known = set(LayerShape.__dataclass_fields__) - {"shifted"}
    if not isinstance(row, dict) or set(row) - known:
        raise InvalidArchitectureError(f"{where}: expected a dict with any of {', '.join(sorted(known))}, got {row!r}")
    mixer = row.get("mixer", dense.mixer)
    defaults: dict[str, Any] = {}
    if mixer != "attention":
        defaults = {"heads": 0, "qk_dim": 0, "v_dim": 0, "attention_in": None}
    if mixer in KERNELS:
        defaults |= {"conv_channels": dense.v_dim, "batch_norm": True}
    return replace(dense, **{**defaults, **row})


#: word in ``per_layer_config`` -> field
_WORDS = {one.metadata["word"]: one.name for one in fields(LayerShape)}


def shape_from_words(row: Any, where: str) -> LayerShape:
    if not isinstance(row, dict) or set(row) - {*_WORDS, "skip", "head_dim"}:
        raise InvalidArchitectureError(f"{where}: unknown words in {row!r}")
    skip = row.get("skip", [])
    if not isinstance(skip, list) or set(map(str, skip)) - {"attention", "mlp"}:
        raise InvalidArchitectureError(f"{where}: skip is a list of attention and mlp, got {skip!r}")
    shape = {short: row[word] for word, short in _WORDS.items() if word in row}
    if "head_dim" in row:
        shape["qk_dim"] = shape["v_dim"] = row["head_dim"]
    if "attention" in skip:
        if {*_ATTENTION_SIZES, *_CONV_SIZES, "mixer"} & shape.keys():
            raise InvalidArchitectureError(f"{where}: a skipped attention has no sizes")
        shape["mixer"] = "none"
    elif "mixer" in shape and shape["mixer"] not in (*KERNELS, "identity"):
        raise InvalidArchitectureError(
            f"{where}: mixer is one of {', '.join(KERNELS)} and identity, got {shape['mixer']!r}; attention has "
            "no such word, and a removed one is in skip"
        )
    if ("mlp" in skip) == ("mlp" in shape):
        raise InvalidArchitectureError(f"{where}: give intermediate_size, or skip the mlp")
    return LayerShape(**shape)


def shape_to_words(shape: LayerShape) -> dict[str, Any]:
    """The row of ``per_layer_config``: inverse of :func:`shape_from_words`."""
    skip = [name for name, gone in (("attention", shape.mixer == "none"), ("mlp", shape.mlp == 0)) if gone]
    row: dict[str, Any] = {"skip": skip} if skip else {}
    sizes = {word: getattr(shape, name) for word, name in _WORDS.items()}
    row |= {word: size for word, size in sizes.items() if size is not None and (size != 0 or size is False)}
    if shape.mixer in ("attention", "none"):
        del row["mixer"]
    if shape.mixer == "attention" and shape.qk_dim == shape.v_dim:
        row["head_dim"] = row.pop("qk_head_dim")
        del row["v_head_dim"]
    return row
