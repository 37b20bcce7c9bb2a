"""The command line: what it prints and writes, and one line for every error."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification, BertConfig, CLIPConfig

from command_line import VIT, call, printed, refused, saved
from hf_vitprune.cost import count
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.publish.block_report import COLOURS
from hf_vitprune.spec.architecture import Architecture
from processes import ROOT
from quick import mostly_slow
from tiny import CASES, TEXT, TEXTS, WITH_MLP, hybrid, make, run


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A pruned model that no stock class can hold."""
    folder = tmp_path_factory.mktemp("uneven")
    saved(folder, units=["qk"])
    yield folder


# ---------------------------------------------------------------------- inspect
def test_inspect_prints_layers_and_what_remains(uneven: Path) -> None:
    (uneven / "model.safetensors").rename(uneven / "elsewhere")  # the config is enough
    text = printed("inspect", uneven)
    (uneven / "elsewhere").rename(uneven / "model.safetensors")
    rows = [line.split() for line in text.splitlines() if "attention" in line]
    assert [row[1:14:2] for row in rows] == [[str(i), "attention", "4", "4", "8", "48", rows[0][13]] for i in range(3)]
    assert "total" in text and "remain" in text and str(uneven) in text


#: beginnings of cases that take images of one size, or none
ONE_SIZE = ("VideoMAE", "Aimv2", "VitPose", "Data2VecVisionForSemantic", *TEXTS)


@pytest.mark.parametrize("name", mostly_slow(n for n in CASES if not n.startswith(ONE_SIZE)))
@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("stock", "pruned")), "twin"])
def test_inspect_counts_as_the_model_does(kind: str, name: str, tmp_path: Path) -> None:
    model = stock = make(name)
    if kind != "stock":
        model = prune(stock, PruningPlan.random(stock, 0.5, ["mlp"]), **({"stock": False} if kind == "twin" else {}))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    record = json.loads(printed("inspect", tmp_path, "--json", "--image-size", 32))
    cost = count(model, 32)
    assert (record["params"], record["macs"]) == (cost.params, cost.macs)
    assert record["dense"]["params"] == count(stock).params
    assert len(record["layers"]) == len(Architecture.of(model).layers) + 1


def test_inspect_of_configs_that_name_no_class(tmp_path: Path) -> None:
    CASES["DeiTForImageClassification"].config().save_pretrained(tmp_path)
    assert json.loads(printed("inspect", tmp_path, "--json"))["task"] == "ForImageClassification"


# ---------------------------------------------------------------------- report
def test_report_puts_models_side_by_side(uneven: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dense, plot = tmp_path / "dense", tmp_path / "kept.svg"
    whole = count(saved(dense), 32)
    rows = json.loads(printed("report", dense, uneven, "--json", "--image-size", 32))
    small = count(AutoModelForImageClassification.from_pretrained(uneven), 32)
    assert [row["name"] for row in rows] == [str(dense), str(uneven)]
    assert [(row["params"], row["macs"]) for row in rows] == [(cost.params, cost.macs) for cost in (whole, small)]
    assert rows[1]["MACs kept"] == small.macs / whole.macs
    assert [layer["qk"] for layer in rows[1]["layers"][:-1]] == [4, 4, 4]
    text = printed("report", dense, uneven, "--plot", plot)
    assert "MACs kept" in text and text.count("attention") == 3 and "share kept" in plot.read_text()


# ---------------------------------------------------------------------- export
def test_export_native(tmp_path: Path) -> None:
    small = saved(tmp_path / "small", units=["heads", "mlp"])
    assert "ViTForImageClassification saved in" in printed(
        "export", tmp_path / "small", tmp_path / "out", "--to", "native"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "checked.json",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(loaded).__name__ == VIT
    assert run(loaded)["logits"].allclose(run(small)["logits"], rtol=1e-4, atol=1e-5)


def test_native_refused_before_anything_is_written(uneven: Path, tmp_path: Path) -> None:
    line = refused("export", uneven, tmp_path / "out", "--to", "native")
    assert "layer 0 has qk_dim 4 and v_dim 8" in line
    assert not (tmp_path / "out").exists()


def test_export_takes_force_for_a_folder_that_is_there(tmp_path: Path) -> None:
    saved(tmp_path / "small", units=["heads", "mlp"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "is there already" in refused("export", tmp_path / "small", tmp_path / "out", "--to", "native")
    printed("export", tmp_path / "small", tmp_path / "out", "--to", "native", "--force")
    assert (tmp_path / "out" / "mine").read_text() == "mine" and (tmp_path / "out" / "model.safetensors").exists()


# ---------------------------------------------------------------------- card
def test_card(uneven: Path, tmp_path: Path) -> None:
    text = printed(
        "card", uneven, "--base-model", "google/vit-base", "--license", "apache-2.0", "--repo-id", "me/small"
    )
    data = ModelCard(text).data
    assert (data.base_model, data.license) == ("google/vit-base", "apache-2.0")
    assert 'from_pretrained("me/small")' in text and str(uneven) not in text
    out = tmp_path / "new" / "README.md"
    printed("card", uneven, "--out", out)
    assert "## Layers" in out.read_text()
    out.write_text("mine")
    assert "is there already" in refused("card", uneven, "--out", out)
    assert out.read_text() == "mine"
    printed("card", uneven, "--out", out, "--force")
    assert "## Layers" in out.read_text()


# ---------------------------------------------------------------------- errors
def test_models_that_are_not_there(tmp_path: Path) -> None:
    assert "there is no folder" in refused("inspect", tmp_path / "nothing")
    assert "no config.json" in refused("card", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused("export", tmp_path, tmp_path.parent / "out", "--to", "native")


def test_models_of_other_kinds(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    assert "no family is registered for BertConfig" in refused("inspect", tmp_path / "bert")
    for name, content in (("none", "{}"), ("unknown", '{"model_type": "no_such_model"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        assert str(tmp_path / name) in refused("inspect", tmp_path / name)
    CLIPConfig(vision_config=dict(WITH_MLP), text_config=dict(TEXT), architectures=["CLIPModel"]).save_pretrained(
        tmp_path / "clip"
    )
    assert "clip_vision_model" in printed("inspect", tmp_path / "clip", "--part", "vision")
    assert "choose one with part=" in refused("card", tmp_path / "clip")
    assert "its vision tower, a `clip_vision_model`" in printed("card", tmp_path / "clip", "--part", "vision")
    (tmp_path / "layers.json").write_text('{"mixer": [], "mlp_hidden": []}')
    (tmp_path / "weights.pth").touch()
    words = ("convert", tmp_path / "weights.pth", tmp_path / "out", "--base", tmp_path / "clip")
    assert "holds several encoders" in refused(*words, "--layers", tmp_path / "layers.json")
    config = make(VIT).config
    config.architectures = ["NoSuchClass"]
    config.save_pretrained(tmp_path / "class")
    assert "NoSuchClass" in refused("inspect", tmp_path / "class")


def test_damaged_models(tmp_path: Path) -> None:
    saved(tmp_path, units=["heads"])
    record = json.loads((tmp_path / "config.json").read_text())
    record["pruning_config"]["per_layer_config"]["0"]["num_attention_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert "fingerprint" in refused("inspect", tmp_path)
    record["hidden_size"] = "wide"
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert "hidden_size" in refused("inspect", tmp_path)
    saved(tmp_path, units=["heads"])
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    assert "deserializing" in refused("export", tmp_path, tmp_path.parent / "out", "--to", "native")


@pytest.mark.parametrize("position", [0, 2])
def test_debug_shows_where_an_error_comes_from(position: int, tmp_path: Path) -> None:
    args = ["inspect", str(tmp_path / "nothing")]
    args.insert(position, "--debug")
    assert isinstance(call(*args).exception, FileNotFoundError)


def test_wrong_usage_is_explained() -> None:
    assert call("inspect").exit_code == 2 and call("no-such-command").exit_code == 2
    assert call("inspect", "x", "--image-size", 0).exit_code == 2


# ---------------------------------------------------------------------- the script itself
def test_commands_are_listed_without_slow_imports() -> None:
    script = """
import sys
from hf_vitprune_cli.main import app
from typer.testing import CliRunner
commands = ("demo", "inspect", "prune", "latency", "evaluate", "export", "bench", "report", "convert", "card")
print(CliRunner().invoke(app, ["--help"]).output)
for command in commands:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0 and "--help" in shown.output, command
    assert CliRunner().invoke(app, [command, "--no-such-option"]).exit_code == 2
assert CliRunner().invoke(app, ["prune", "model", "out"]).exit_code == 2
assert not {"torch", "transformers", "numpy", "hf_vitprune"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(
        command in done.stdout for command in ("inspect", "export", "report", "card", "prune", "demo", "--debug")
    )


def test_console_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The entry point as the shell calls it: arguments from sys.argv, and an exit status."""
    monkeypatch.setattr(sys, "argv", ["hf-vitprune", "inspect", str(tmp_path / "nothing")])
    monkeypatch.delitem(sys.modules, "hf_vitprune_cli.main")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("hf_vitprune_cli.main", run_name="__main__")
    printed = capsys.readouterr()
    assert (exit.value.code, printed.out) == (1, "")
    assert printed.err == f"hf-vitprune: there is no folder {tmp_path / 'nothing'}\n"


def test_inspect_draws_the_layers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    hybrid(VIT).save_pretrained(tmp_path / "model")
    assert "conv3x3" in printed("inspect", tmp_path / "model", "--plot", tmp_path / "layers.svg")
    assert COLOURS["conv3x3"] in (tmp_path / "layers.svg").read_text()
