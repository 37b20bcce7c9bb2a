"""Parameters and multiply-adds of an architecture, for one image: layers in closed form, the rest as it is built.

Both attention matmuls count (tools that hook modules miss them: 16.85G instead of 17.56G for ViT-B/16), and so do the
patch embedding and the classifier. Norms, softmax, activations and additions do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from .skeleton import LayerTensors, Part, layer_tensors, outside


class Cost(NamedTuple):
    """Cost of a model for one image.

    ``params``: all parameters. ``weight_params``: elements of weight matrices only (no bias, norm, token, position).
    ``macs``: multiply-adds.
    """

    params: int
    weight_params: int
    macs: int


def count(model: Any, image_size: int | tuple[int, int] | None = None, part: str | None = None) -> Cost:
    """Cost of a model (stock, pruned, PEFT: the base without adapters) or of an Architecture.

    Args:
        model: the model or its Architecture.
        image_size: side, or (height, width), in pixels; the config's by default. Parameters do not depend on it.
        part: which tower of a bigger model; its only one by default. What lies outside of it is not counted.

    Raises:
        UnsupportedModelError: no family is registered for the model.
        InvalidConfigError: an impossible ``image_size``.
    """
    parts = cost_parts(model, image_size, part)
    weights = sum(part.weights for part in parts)
    return Cost(weights + sum(part.others for part in parts), weights, sum(part.macs for part in parts))


def cost_parts(model: Any, image_size: int | tuple[int, int] | None = None, part: str | None = None) -> list[Part]:
    """The cost part by part: ``layer i attention`` (whatever mixes its tokens), ``layer i mlp``, and the rest."""
    architecture = Architecture.given(model, part)
    size = architecture.checked_size(image_size)
    grid = architecture.family.grid(architecture.config, size)
    small, parts = layer_tensors(architecture), []
    for i, (shape, kind) in enumerate(zip(architecture.layers, architecture.kinds, strict=True)):
        parts += layer_parts(architecture, shape, architecture.width(i), kind, grid, f"layer {i}", small[kind])
    return [*parts, outside(architecture, architecture.hidden_size, size)]


def layer_parts(
    architecture: Architecture,
    shape: LayerShape,
    width: int,
    kind: int,
    grid: tuple[int, int],
    name: str = "layer",
    small: LayerTensors | None = None,
) -> list[Part]:
    """Mixer and MLP of one layer of any shape, residual width and kind, in models like ``architecture``.

    Args:
        kind: ``architecture.kinds[i]``.
        grid: patches down and across, ``family.grid(config, image_size)``.
        small: small tensors of layers of this kind, where they are known.
    """
    family, config = architecture.family, architecture.config
    small = small or layer_tensors(architecture)[kind]
    tokens, projected, squares = family.attention_tokens(config, grid, kind)
    mixer = f"{name} attention"
    if shape.mixer == "attention":
        mixing = _attention(small, shape, width, mixer, projected, squares)
        mixing = mixing._replace(macs=mixing.macs + family.other_attention_macs(config, shape.heads, kind))
    else:
        mixing = _other_mixer(small, shape, width, mixer, family.grid_tokens(grid, kind))
    return [mixing, _mlp(small, shape, width, f"{name} mlp", tokens, len(family.fc1_names(config)))]


def _attention(small: LayerTensors, shape: LayerShape, width: int, name: str, tokens: int, squares: int) -> Part:
    inputs = width if shape.attention_in is None else shape.attention_in
    qk, v = shape.heads * shape.qk_dim, shape.heads * shape.v_dim
    weights = inputs * (2 * qk + v) + v * width
    biases = (small.q + small.k) * qk + small.v * v + small.o * width
    others = biases + small.head * shape.heads + small.rest + small.mixer * width
    # the kernel pads the narrower of q/k and v; the arithmetic it needs is counted, not the padding
    return Part(name, weights, others, tokens * weights + squares * (qk + v))


def _other_mixer(small: LayerTensors, shape: LayerShape, width: int, name: str, patches: int) -> Part:
    if shape.mixer == "none":
        return Part(name, 0, 0, 0)
    around = small.mixer * width  # the norm in front, the LayerScale behind
    if shape.conv_channels is None:
        return Part(name, 0, around, 0)
    weights = shape.conv_channels * width * ((shape.kernel or 0) ** 2 + 1)
    own = shape.conv_channels * (2 if shape.batch_norm else 1) + width
    return Part(name, weights, own + around, patches * weights)


def _mlp(small: LayerTensors, shape: LayerShape, width: int, name: str, tokens: int, branches: int) -> Part:
    if shape.mlp == 0:
        return Part(name, 0, 0, 0)
    inputs = width if shape.mlp_in is None else shape.mlp_in
    weights = shape.mlp * (branches * inputs + width)
    return Part(name, weights, small.fc1 * shape.mlp + (small.fc2 + small.mlp) * width, tokens * weights)


def block_macs(model: Any, image_size: int | tuple[int, int] | None = None) -> list[tuple[int, int]]:
    """(multiply-adds of the mixer, of the MLP) of every layer of a model or an Architecture, for one image."""
    architecture = Architecture.given(model)
    macs = {part.name: part.macs for part in cost_parts(architecture, image_size)}
    return [(macs[f"layer {i} attention"], macs[f"layer {i} mlp"]) for i in range(len(architecture.layers))]


def removed_macs(model: Any, image_size: int | tuple[int, int] | None = None) -> dict[str, float]:
    """Where the multiply-adds were pruned that the layers of the dense model had.

    Returns:
        ``attention`` and ``mlp``: the fraction of theirs that is gone; ``attention_share``: attention's part of all
        that is gone (0 where nothing is).
    """
    architecture = Architecture.given(model)
    now, before = (
        [sum(column) for column in zip(*block_macs(which, image_size), strict=True)]
        for which in (architecture, architecture.unpruned)
    )
    gone = [full - left for full, left in zip(before, now, strict=True)]
    shares = {name: part / full for name, part, full in zip(("attention", "mlp"), gone, before, strict=True)}
    return {**shares, "attention_share": gone[0] / sum(gone) if sum(gone) else 0.0}
