"""Bigger models with a pruned tower in a process of their own: their Auto class and pipelines, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from composite_pipelines import PIPELINES, through_pipeline
from hf_vitprune import PruningPlan, prune, towers
from processes import run_python
from tiny import relative_error
from tiny_composites import COMPOSITES, auto_class, outputs

UNITS = ["heads", "qk", "v", "mlp"]

FRESH = """
import json, sys
from pathlib import Path
import torch, transformers
import hf_vitprune
from composite_pipelines import through_pipeline
from tiny import assert_same
from tiny_composites import COMPOSITES, outputs
root = Path(sys.argv[1])
for name, auto in json.loads((root / "auto.json").read_text()).items():
    for folder in sorted((root / name).iterdir()):
        model = getattr(transformers, auto).from_pretrained(folder).eval()
        assert_same(outputs(model, COMPOSITES[name]()[1]), torch.load(folder / "outputs.pt", weights_only=True))
    expected = folder / "pipeline.json"
    if expected.is_file():
        assert through_pipeline(name, folder) == json.loads(expected.read_text()), name
    print(name)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every composite with each of its towers pruned, and what it gives here after loading."""
    root = tmp_path_factory.mktemp("composites")
    made = {name: make() for name, make in COMPOSITES.items()}
    autos = {name: auto_class(model) for name, (model, _) in made.items()}
    (root / "auto.json").write_text(json.dumps({name: auto.__name__ for name, auto in autos.items()}))
    for name, auto in autos.items():
        model, inputs = made[name]
        for part in towers(model):
            folder = root / name / part
            prune(model, PruningPlan.random(model, 0.4, UNITS, part=part)).save_pretrained(folder)
            torch.save(outputs(auto.from_pretrained(folder).eval(), inputs), folder / "outputs.pt")
        if name in PIPELINES:
            PIPELINES[name][1]().save_pretrained(folder)
            (folder / "pipeline.json").write_text(json.dumps(through_pipeline(name, folder)))
    return root


def test_a_fresh_process_gives_the_same_bits(saved: Path) -> None:
    assert run_python(FRESH, str(saved)).split("\n")[:-1] == list(COMPOSITES)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_look_through_the_small_tower(name: str, saved: Path) -> None:
    """What the model gave there is not what the dense one gives."""
    folder = next((saved / name).iterdir())
    result = json.loads((folder / "pipeline.json").read_text())
    other = folder.parent / "dense"
    COMPOSITES[name]()[0].save_pretrained(other)
    PIPELINES[name][1]().save_pretrained(other)
    answer, sums = through_pipeline(name, other)
    assert answer and len(sums[0]) == len(result[1][0]) and sums[0] != result[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP", "DPT", "LLaVA"])
def test_onnx_export(name: str, tmp_path: Path) -> None:
    """The whole model by transformers' own exporter, run by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model, inputs = COMPOSITES[name]()
    small = prune(model, PruningPlan.random(model, 0.4, UNITS, part="vision" if name == "CLIP" else None))
    OnnxExporter().export(small, inputs, config=OnnxConfig(dynamic=False)).save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(next(tmp_path.glob("*.onnx")))
    names = [node.name for node in session.get_outputs()]
    found = session.run(None, {node.name: inputs[node.name].numpy() for node in session.get_inputs()})
    expected = outputs(small, inputs)
    compared = {key: torch.from_numpy(value) for key, value in zip(names, found, strict=True) if key in expected}
    assert compared
    for key, tensor in compared.items():
        assert relative_error(tensor, expected[key]) < 1e-5, key
