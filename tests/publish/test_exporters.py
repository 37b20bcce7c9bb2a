"""Exports: what every runtime reads back computes what the model does, and a wrong file is not left behind."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor, pipeline
from transformers.exporters import ExportedModel

from hf_vitprune import PruningPlan, VTPConfig, get_pruning_model, prune
from hf_vitprune.errors import (
    ExportError,
    InvalidConfigError,
    MissingExtraError,
    UnsupportedModelError,
)
from hf_vitprune.publish.exporters import export, formats
from hf_vitprune.publish.exporters import run as exporting
from hf_vitprune.publish.exporters.checks import agreement, largest_error
from hf_vitprune.utils.batches import ImageBatches
from tiny import hybrid, images, make
from tiny_adapters import adapted
from tiny_composites import dual, llava

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
VIT = "ViTForImageClassification"
UNITS = ["heads", "qk", "v", "mlp", "embedding"]
slow = pytest.mark.slow


def where_installed(to: str) -> Any:
    return pytest.param(to, marks=[slow, pytest.mark.skipif(find_spec(to) is None, reason=f"no {to} here")])


graphs = pytest.mark.parametrize("to", ["onnx", where_installed("openvino"), where_installed("executorch")])


def pruned(name: str, units: list[str] = UNITS) -> Any:
    model = make(name)
    return prune(model, PruningPlan.random(model, 0.4, units, round_to=1), stock=False).eval()


@pytest.fixture(scope="module")
def small() -> Any:
    """q/k and v of different widths, in every layer others, and norms over kept channels."""
    return pruned(VIT)


@pytest.fixture(scope="module")
def labelled(small: Any) -> list[dict[str, Any]]:
    pixels = images(6)
    with torch.no_grad():
        right = small(pixels).logits.argmax(-1)
    right[0] = (right[0] + 1) % small.config.num_labels  # one that the model gets wrong
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, right, strict=True)]


@graphs
def test_a_graph_computes_what_the_model_does(to: str, small: Any, tmp_path: Path) -> None:
    pytest.importorskip(to)
    record = export(small, tmp_path / "out", to)
    assert record.error < 1e-4 and record.batches == [1, 2, 3] and record.sizes == [[16, 16]]
    assert record.inputs == {"pixel_values": ["batch", 3, 16, 16]}
    loaded = formats.load_graph(to, tmp_path / "out")
    for batch in (1, 7):
        pixels = images(batch, seed=batch)
        with torch.no_grad():
            assert largest_error(small(pixels), loaded(pixel_values=pixels)) < 1e-4
    written = json.loads((tmp_path / "out" / "checked.json").read_text())
    assert written["error"] == record.error and written["versions"]["torch"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "batch x 3 x 16 x 16" in page and "ExportedModel.from_pretrained" in page
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@slow
def test_onnx_needs_nothing_of_ours(small: Any, tmp_path: Path) -> None:
    import onnxruntime

    export(small, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = images(5)
    (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, small(pixels).logits.numpy(), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("vit", [VIT]) and "pruning_config" not in config
    assert len(config["id2label"]) == small.config.num_labels


@slow
def test_a_pipeline_on_onnxruntime(small: Any, tmp_path: Path) -> None:
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    export(small, tmp_path / "out", "onnx", processor=processor)
    loaded = ExportedModel.from_pretrained(tmp_path / "out", device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))
    own = AutoImageProcessor.from_pretrained(tmp_path / "out")
    found, expected = (pipeline("image-classification", model=m, image_processor=own)(image) for m in (loaded, small))
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def test_a_graph_holds_no_work_that_is_for_nothing(tmp_path: Path) -> None:
    """No masks that mask nothing, no padding of q/k to the width of v, no shapes read while an attention runs."""
    import onnx

    model = make(VIT)
    small = prune(model, PruningPlan.random(model, 0.5, ["qk"], round_to=1), stock=False)
    export(small, tmp_path / "out", "onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert not {"Where", "Pad", "Not", "Less", "Slice"} & {*kinds} and kinds.count("Softmax") == len(model.vit.layers)
    assert kinds.count("Shape") == 1  # the batch, for the class token
    assert small.config._attn_implementation == model.config._attn_implementation


def test_portable(small: Any, tmp_path: Path) -> None:
    assert export(small, tmp_path / "out", "portable").error == 0
    assert list((tmp_path / "out").glob("*.py"))
    with pytest.raises(ExportError, match="use --to native"):
        export(make(VIT), tmp_path / "stock", "portable")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KINDS: dict[str, Any] = {
    "mixers": lambda: hybrid(VIT),
    "backbone": lambda: pruned("Dinov2Backbone"),
    "peft": lambda: adapted(pruned(VIT), peft.LoraConfig(target_modules=["q_proj", "v_proj"])),
    "swin": lambda: pruned("SwinForImageClassification", ["heads", "qk", "v", "mlp"]),
    "clip": lambda: prune(model := dual("CLIP")()[0], PruningPlan.random(model, 0.4, ["mlp", "v"], part="vision")),
}


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models(kind: str, tmp_path: Path) -> None:
    record = export(KINDS[kind](), tmp_path / "out", "onnx")
    assert record.error < 1e-4
    if kind == "clip":
        assert record.inputs["input_ids"][0] == "texts" and record.inputs["attention_mask"][0] == "texts"


@slow
def test_a_tower_by_itself(tmp_path: Path) -> None:
    record = export(KINDS["clip"](), tmp_path / "out", "onnx", part="vision")
    assert list(record.inputs) == ["pixel_values"]


@slow
def test_several_image_sizes(small: Any, tmp_path: Path) -> None:
    export(small, tmp_path / "out", "onnx", image_sizes=[16, (24, 32)])
    loaded = formats.load_graph("onnx", tmp_path / "out")
    for size in (16, 32, (24, 40)):
        pixels = images(2, size)
        with torch.no_grad():
            expected = small(pixels, interpolate_pos_encoding=True)
        assert largest_error(expected, loaded(pixel_values=pixels)) < 1e-4


@graphs
def test_int8_says_what_it_loses(to: str, small: Any, labelled: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("nncf" if to == "openvino" else to)
    record = export(small, tmp_path / "out", to, images=labelled, int8=True)
    found = record.agreement
    assert found is not None and found.images == 6 and found.accuracy == 5 / 6
    assert 0.9 < found.least_cosine <= found.cosine < 1 and record.tolerance is None
    # the numbers are those of the file that is there
    again = agreement(small, formats.load_graph(to, tmp_path / "out"), ImageBatches(labelled, 6), {})
    assert (again.top1, again.exported_accuracy) == (found.top1, found.exported_accuracy)
    assert again.cosine == pytest.approx(found.cosine, abs=1e-2)
    if to == "onnx":
        import onnx

        kinds = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
        assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul"}


# ---------------------------------------------------------------------- what is wrong is not left behind
def test_a_wrong_file_is_caught(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.make_graph

    def wrong(to: str, model: Any, *args: Any) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.vit.layers[1].mlp.fc1.weight[0] += 1
        return real(to, other, *args)

    monkeypatch.setattr(exporting, "make_graph", wrong)
    with pytest.raises(ExportError, match="the onnx export is off by"):
        export(small, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


@slow
def test_a_wrong_int8_file_is_caught(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.load_graph

    def turned(to: str, folder: Path) -> Any:
        loaded = real(to, folder)

        def call(**inputs: Any) -> Any:
            output = loaded(**inputs)
            output.logits = -output.logits
            return output

        return call

    monkeypatch.setattr(exporting, "load_graph", turned)
    with pytest.raises(ExportError, match="no likeness"):
        export(small, tmp_path / "out", "onnx", int8=True, images=images(4))
    assert not list(tmp_path.iterdir())


@slow
def test_a_file_of_one_batch_size_is_caught(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "varying_axes", lambda inputs, *rest: {name: {} for name in inputs})
    monkeypatch.setattr(exporting, "axis_names", lambda *rest: {})
    with pytest.raises(ExportError, match="does not run on 1 images"):
        export(small, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_do_names_its_reason(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Any:
        raise NotImplementedError("no kernel for aten::turnip")

    monkeypatch.setattr(exporting, "make_graph", fails)
    with pytest.raises(ExportError, match="cannot export PrunedViTForImageClassification.*aten::turnip"):
        export(small, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


@slow
def test_a_model_that_is_kept(tmp_path: Path) -> None:
    """Exporting leaves the caller's model as it was: its mode, its gradients, its type."""
    model = make(VIT).to(torch.bfloat16).train()
    export(model, tmp_path / "out", "onnx")
    assert model.training and model.dtype == torch.bfloat16 and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------- refusals, before any work
def test_refusals(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidConfigError, match="no format 'tflite'"):
        export(small, out, "tflite")
    with pytest.raises(InvalidConfigError, match="give some"):
        export(small, out, "onnx", int8=True)
    with pytest.raises(InvalidConfigError, match="int8 is for onnx"):
        export(small, out, "native", int8=True, images=images(2))
    with pytest.raises(InvalidConfigError, match="image sizes are for"):
        export(small, out, "native", image_sizes=[32])
    with pytest.raises(InvalidConfigError, match=r"images are of shape \(3, 24, 24\)"):
        export(small, out, "onnx", images=images(4, 24))
    if find_spec("executorch") is not None:
        with pytest.raises(InvalidConfigError, match="one image size"):
            export(small, out, "executorch", image_sizes=[16, 32])
    with pytest.raises(InvalidConfigError, match="what its export"):
        export(get_pruning_model(make(VIT), VTPConfig(target=0.5)), out, "onnx")
    with pytest.raises(UnsupportedModelError, match="generates text.*part='vision'"):
        export(llava()[0], out, "onnx")
    broken = make(VIT)
    with torch.no_grad():
        broken.vit.layernorm.bias[0] = torch.nan
    with pytest.raises(ExportError, match=r"vit\.layernorm\.bias has values that are not finite"):
        export(broken, out, "onnx")
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="force=True"):
        export(small, out, "onnx")
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"openvino, nncf: pip install 'hf_vitprune\[openvino,int8\]'"):
        export(small, out, "openvino", int8=True, images=images(2))
