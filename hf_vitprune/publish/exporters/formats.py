"""Which formats there are, what each needs installed, and how transformers' exporters make and run them."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...errors import InvalidConfigError, MissingExtraError
from ...families import family_of
from ...modeling.blocks import IN_STEPS, UNPADDED, eager_attention_forward
from ...spec.towers import towers

#: folders that transformers loads
FOLDERS = ("native", "portable")
#: files of other runtimes
GRAPHS = ("onnx", "openvino", "executorch")
FORMATS = FOLDERS + GRAPHS

#: format -> the packages that make and run it, all in the extra of the format's name
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
}


def check_format(to: str, int8: bool = False) -> None:
    """Refuse (InvalidConfigError) what there is not, and (MissingExtraError) what lacks a package."""
    if to not in FORMATS:
        raise InvalidConfigError(f"there is no format {to!r}; choose one of {', '.join(FORMATS)}")
    if to in FOLDERS:
        if int8:
            raise InvalidConfigError(f"int8 is for {', '.join(GRAPHS)}: a {to} folder keeps the model's own weights")
        return
    wanted = [(name, to) for name in _PACKAGES[to]] + [("nncf", "int8")] * (int8 and to == "openvino")
    missing = [(name, extra) for name, extra in wanted if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(extra for _, extra in missing))
        names = ", ".join(name for name, _ in missing)
        raise MissingExtraError(f"{to} needs {names}: pip install 'hf_vitprune[{extras}]'")


def make_graph(
    to: str, model: Any, inputs: Mapping[str, Any], shapes: Mapping[str, Any], quantizer: Any = None
) -> Any:
    """A float32 model on the CPU, in evaluation mode, as a ``transformers.exporters.ExportedModel``.

    Args:
        inputs: an example.
        shapes: which axes of it may vary, as ``torch.export`` takes them.
        quantizer: of :func:`int8_quantizer`.
    """
    from transformers import exporters

    exporter, settings = {
        "onnx": (exporters.OnnxExporter, exporters.OnnxConfig),
        "openvino": (exporters.OpenVINOExporter, exporters.OpenVINOConfig),
        "executorch": (exporters.ExecutorchExporter, exporters.ExecutorchConfig),
    }[to]
    config = settings(dynamic=True, dynamic_shapes=dict(shapes), quantizer=quantizer)
    return exporter().export(model, dict(inputs), config)


def int8_quantizer(to: str, calibration: Iterable[Mapping[str, Any]]) -> Any:
    """Weights of Linears in int8, and their inputs: by ranges seen as it runs, or (OpenVINO) in the calibration."""
    from transformers import exporters

    samples = [dict(sample) for sample in calibration]
    if to == "onnx":  # a quantized Conv runs slower than a plain one, and there is one: the patch embedding
        dynamic = exporters.OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
        return exporters.OnnxRuntimeQuantizer(dynamic)
    if to == "openvino":
        return exporters.NNCFOpenVINOQuantizer(exporters.NNCFQuantizationConfig(), samples)
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    kinds = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    return exporters.PT2EQuantizer(XNNPACKQuantizer().set_global(kinds), samples[:1])


def load_graph(to: str, folder: str | Path) -> Any:
    """A graph read back by its own runtime, on the CPU and in float32, to be called like the model.

    OpenVINO computes in bfloat16 by itself where the processor can.
    """
    from transformers.exporters import ExportedModel

    if to == "openvino":
        return ExportedModel.from_pretrained(folder, device="cpu", config={"INFERENCE_PRECISION_HINT": "f32"})
    return ExportedModel.from_pretrained(folder, device=None if to == "executorch" else "cpu")


# ---------------------------------------------------------------------- attention as graphs want it
@contextlib.contextmanager
def without_empty_masks(model: Any, inputs: dict[str, Any], to: str) -> Iterator[None]:
    """Encoders of images make no masks for a while; where the inputs have some, all stays as it is.

    transformers leaves an empty mask out, but not while it is exported: every layer would then add zeros to all scores
    and choose all outputs by a condition that always holds, which does not shrink with the model. For an attention
    without a mask function of its own it makes none. ONNX has no node for torch's fused attention, and what stands for
    it reads its shapes as it runs and turns the keys twice: for ONNX it is written in plain steps.

    Args:
        model, inputs: what is exported, and its example.
        to: the format.
    """
    AttentionInterface.register(UNPADDED, sdpa_attention_forward)
    AttentionInterface.register(IN_STEPS, eager_attention_forward)
    changed = []
    if not any(name.startswith("pixel") and "mask" in name for name in inputs):
        for tower in towers(model).values():
            module = model.get_submodule(tower.path)
            family = family_of(module)
            config = family.sizes_config(module.config)
            if family.part != "text" and config._attn_implementation == "sdpa":
                changed.append(config)
    try:
        for config in changed:
            config._attn_implementation = IN_STEPS if to == "onnx" else UNPADDED
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"
