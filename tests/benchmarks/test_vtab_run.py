"""Sweeps over VTAB-1k tasks: whole, killed and resumed, refused; on tiny models and a stand-in task."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification
from typer.testing import CliRunner

from benchmarks import common
from benchmarks.vtab import experiment, training
from benchmarks.vtab.adapters import PEFT_METHODS, adapt, load_pretrained
from benchmarks.vtab.cli import app
from benchmarks.vtab.data import load_task
from benchmarks.vtab.dsprites import read_dsprites
from benchmarks.vtab.experiment import Experiment
from benchmarks.vtab.local import Local, run_local
from benchmarks.vtab.pretrain import Backbone, pretrain, source_images
from benchmarks.vtab.pruning import Choice, Pruned
from benchmarks.vtab.settings import Recipe, Run, Settings
from benchmarks.vtab.store import Store
from benchmarks.vtab.sweep import runs_of
from benchmarks.vtab.tasks import TASKS, find_task
from hf_vitprune import SLSConfig, count, select_layers, truncate
from hf_vitprune.errors import InvalidConfigError, VitPruneError
from processes import run_on_two
from vtab_runs import MACHINE, results, sweep


# ---------------------------------------------------------------------- whole sweeps
@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(
    root: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of(["kitti"], ["linear"], ["none", "truncate:k=2", "truncate:k=1"], [1])
    child = os.fork()
    if child == 0:  # dies with the second record written but not yet in its place
        move = os.replace

        def die(old: str, new: Path) -> None:
            if "truncate-k=2" in str(new):
                os._exit(9)
            move(old, new)

        common.os.replace = die
        sweep(settings, runs, root, tmp_path / "killed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    store = Store(tmp_path / "killed")
    assert [store.finished(run) for run in runs] == [True, False, False]
    assert len(list((tmp_path / "killed" / "runs").iterdir())) == 2  # one of them unfinished
    assert len(list(store.records())) == 1

    trainings: list[str] = []
    train = experiment.train

    def counted(*args: Any, what: str, **kwargs: Any) -> Any:
        trainings.append(what)
        return train(*args, what=what, **kwargs)

    monkeypatch.setattr(experiment, "train", counted)
    first = store.path(runs[0]).read_bytes()
    said = sweep(settings, runs, root, tmp_path / "killed")
    assert "1 of 3 runs are done already" in said and "2/2" in said
    assert trainings == [f"kitti: linear, truncate:k={k}, retraining" for k in (2, 1)]  # the adapted model is there
    assert store.path(runs[0]).read_bytes() == first
    sweep(settings, runs, root, tmp_path / "whole")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    trainings.clear()
    assert "3 of 3 runs are done" in sweep(settings, runs, root, tmp_path / "killed") and not trainings


@pytest.mark.slow
def test_records_say_everything(root: Path, settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, selection=True, test_limit=10)
    runs = runs_of(["kitti"], ["lora"], ["none", "sls:alpha=0.9", "truncate:k=2"], [3])
    sweep(settings, runs, root, tmp_path)
    records = {record["pruning"]: record for record in Store(tmp_path).records()}
    assert set(records) == {"none", "sls:alpha=0.9", "truncate:k=2"}
    part = records["truncate:k=2"]
    assert part["data"]["test_images"] == 10 and part["data"]["of_test_images"] == 12
    assert "train800 has 32 images instead of 800" in part["data"]["deviations"]
    assert part["settings"] == json.loads(json.dumps(settings.to_dict()))
    assert part["environment"]["torch"] == torch.__version__ and "peft" in part["environment"]
    last, best = part["results"]["last_epoch"], part["results"]["best_on_val200"]
    assert (last["kept_layers"], last["layers"], last["epoch"]) == (2, 3, 2)
    assert last["accuracy_before"] == records["none"]["results"]["last_epoch"]["accuracy"]
    assert {"accuracy_truncated", "accuracy", "seconds_to_retrain"} <= last.keys()
    assert last["validation"] == [] and len(best["validation"]) == 2
    assert best["epoch"] == 1 + best["validation"].index(max(best["validation"]))

    # the costs are those of the models themselves
    pretrained = load_pretrained(settings.model, 4, 3)
    small = truncate(pretrained, 2)
    assert last["cost"]["macs"] == count(small).macs and last["cost"]["dense_macs"] == count(pretrained).macs
    head = 16 * 4 + 4
    assert last["cost"]["backbone_params"] == count(pretrained).params - head
    assert last["cost"]["stored"]["params"] == head + 2 * 2 * (2 * 16 + 16 * 2)  # layers x (q, v) x (A, B)
    assert last["cost"]["stored"]["bytes"] > 4 * last["cost"]["stored"]["params"]

    # SLS's decision is that of the library on the adapted model
    run = Run("kitti", "lora", "sls:alpha=0.9", 3)
    here = Experiment(settings, load_task(find_task("kitti"), root, any_size=True), Store(tmp_path), MACHINE)
    model, _ = here.adapted(run, "train800val200")
    selection = select_layers(model, here.examples("train800val200"), SLSConfig(alpha=0.9))
    decision = records["sls:alpha=0.9"]["results"]["last_epoch"]["decision"]
    assert decision["scores"] == selection.to_dict()["scores"]
    assert records["sls:alpha=0.9"]["results"]["last_epoch"]["kept_layers"] == selection.kept_layers


#: the other sweeps adapt by LoRA and by the head alone
SLOW = ("lora", "linear", "dora", "adalora", "ia3", "vera", "loha", "repadapter", "full")


@pytest.mark.parametrize(
    "peft", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PEFT_METHODS]
)
def test_every_adaptation_is_pruned_and_retrained(peft: str, root: Path, settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, recipe=replace(settings.recipe, epochs=1, warmup_epochs=0))
    runs = runs_of(["kitti"], [peft], ["none", "truncate:k=1"], [0])
    sweep(settings, runs, root, tmp_path)
    none, cut = (record["results"]["last_epoch"] for record in Store(tmp_path).records())
    assert cut["accuracy_before"] == none["accuracy"] and cut["kept_layers"] == 1
    assert cut["cost"]["stored"]["shared_backbone"] == (peft != "full")
    assert cut["cost"]["stored"]["params"] <= none["cost"]["stored"]["params"]
    if peft not in ("full", "linear"):
        own = none["cost"]["stored"]["params"] - 68  # the head stays
        assert cut["cost"]["stored"]["params"] - 68 == pytest.approx(own / 3)


@pytest.mark.parametrize(
    "pruning",
    ["vtp:target=0.6"]
    + [pytest.param(p, marks=pytest.mark.slow) for p in ("nvit:target=0.9", "spvit:target=0.7", "depgraph:ratio=0.5")],
)
def test_width_pruning_stores_whole_models(pruning: str, root: Path, settings: Settings, tmp_path: Path) -> None:
    if pruning.startswith("depgraph"):
        pytest.importorskip("torch_pruning")
    sweep(settings, runs_of(["kitti"], ["lora"], [pruning], [0]), root, tmp_path)
    (record,) = Store(tmp_path).records()
    result = record["results"]["last_epoch"]
    cost, merged = result["cost"], result["decision"].get("adapters") == "merged"
    assert cost["macs"] < cost["dense_macs"] and not cost["stored"]["shared_backbone"]
    assert merged == pruning.startswith("spvit") == (cost["params"] == cost["stored"]["params"])
    assert cost["params"] <= cost["stored"]["params"] < cost["dense_params"] + 1000


@pytest.mark.slow
def test_depth_of_sls_without_full_depth_first(
    root: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``truncate:k=sls`` adapts the pretrained model cut to SLS's depth, as if it had never been deeper."""
    monkeypatch.setattr(Experiment, "selection", lambda *_: {"kept_layers": 2})
    sweep(settings, runs_of(["kitti"], ["lora"], ["truncate"], [3]), root, tmp_path)
    (record,) = Store(tmp_path).records()
    data = load_task(find_task("kitti"), root, any_size=True)
    here = Experiment(settings, data, Store(tmp_path / "unused"), MACHINE)
    images = here.examples("train800val200")
    steps = settings.recipe.steps(len(images))
    fresh = adapt(truncate(load_pretrained(settings.model, 4, 3), 2), "lora", rank=2, steps=steps, seed=3)
    training.train(fresh, images, settings.recipe, seed=3, machine=MACHINE, what="x")
    reached = training.accuracy(fresh, here.examples("test"), batch_size=8, machine=MACHINE)
    assert record["results"]["last_epoch"]["accuracy"] == reached
    assert "accuracy_truncated" not in record["results"]["last_epoch"]


@pytest.mark.parametrize(("retraining", "rate", "kind"), [("clr", 0.01, "cosine"), ("ft", 0.0001, "constant")])
def test_schedules_of_retraining(
    retraining: str, rate: float, kind: str, root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Watched(training._Trainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.args)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(training, "_Trainer", Watched)
    settings = replace(settings, retraining=retraining)
    data = load_task(find_task("kitti"), root, any_size=True)
    here = Experiment(settings, data, Store(Path("unused")), MACHINE)
    small = adapt(truncate(load_pretrained(settings.model, 4, 0), 1), "linear", rank=2, steps=8, seed=0)
    run = Run("kitti", "linear", "truncate:k=1", 0)
    here._retrained(run, small, Pruned(small, 1), "train800")
    (arguments,) = seen
    assert (arguments.learning_rate, arguments.lr_scheduler_type.value) == (pytest.approx(rate), kind)


def test_without_retraining(root: Path, settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, retraining_epochs=0)
    sweep(settings, runs_of(["kitti"], ["linear"], ["truncate:k=random"], [5]), root, tmp_path)
    (record,) = Store(tmp_path).records()
    result = record["results"]["last_epoch"]
    assert result["accuracy"] == result["accuracy_truncated"] and result["kept_layers"] in (1, 2)
    with pytest.raises(InvalidConfigError, match="needs retraining epochs"):
        sweep(settings, runs_of(["kitti"], ["linear"], ["truncate"], [5]), root, tmp_path)


# ---------------------------------------------------------------------- parts
def test_the_best_epoch_on_validation_is_put_back(root: Path, settings: Settings) -> None:
    data = load_task(find_task("kitti"), root, any_size=True)
    here = Experiment(settings, data, Store(Path("unused")), MACHINE)
    model = adapt(load_pretrained(settings.model, 4, 0), "lora", rank=2, steps=32, seed=0)
    recipe = replace(settings.recipe, epochs=4, learning_rate=0.3)  # jumps about
    validation = here.examples("val200")
    trained = training.train(
        model, here.examples("train800"), recipe, seed=0, machine=MACHINE, what="x", validation=validation
    )
    reached = training.accuracy(model, validation, batch_size=8, machine=MACHINE)
    assert reached == max(trained.validation) == trained.validation[trained.epoch - 1]


def test_adalora_keeps_its_budget_through_retraining(root: Path, settings: Settings) -> None:
    data = load_task(find_task("kitti"), root, any_size=True)
    examples = Experiment(settings, data, Store(Path("unused")), MACHINE).examples("train800")
    recipe = replace(settings.recipe, epochs=5)
    model = adapt(load_pretrained(settings.model, 4, 0), "adalora", rank=2, steps=recipe.steps(32), seed=0)

    def ranks(model: Any) -> torch.Tensor:
        parts = [p.detach().flatten() for name, p in model.named_parameters() if "lora_E" in name]
        return torch.cat(parts) != 0

    training.train(model, examples, recipe, seed=0, machine=MACHINE, what="x")
    assert ranks(model).numel() == 3 * 3 * 2 and ranks(model).sum() == 2 * 3 * 2
    small = truncate(model, 2)
    before = ranks(small)
    training.train(small, examples, recipe, seed=0, machine=MACHINE, what="x", keep_zero_ranks=True)
    assert ranks(small).equal(before)


def test_a_random_depth_is_the_runs_own(root: Path, settings: Settings, tmp_path: Path) -> None:
    names = [
        Choice.parse(text).label for text in ("truncate:k=random", "truncate", "vtp", "sls", "depgraph:ratio=0.5")
    ]
    assert names == ["truncate:k=random", "truncate:k=sls", "vtp:target=sls", "sls", "depgraph:ratio=0.5"]
    assert runs_of(["kitti_dist"], ["lora", "lora"], ["sls", "sls"], [1, 1]) == [Run("kitti", "lora", "sls", 1)]


def test_pretrained_source_model(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=16)
    backbone = Backbone(width=16, heads=2, layers=2)
    pretrain(tmp_path, images=32, recipe=recipe, seed=0, machine=MACHINE, backbone=backbone)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(model) is ViTForImageClassification and model.config.num_labels == 144
    images = source_images(50)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=images.read(0), return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape == (1, 144)
    assert images.labels.min() >= 0 and images.labels.max() < 144
    used = {int(i) for part in read_dsprites("dsprites_ori").values() for i in part.read.indices}
    assert not used & set(images.read.indices.tolist())


@pytest.mark.slow
def test_what_every_layer_knows(source: Path, root: Path, settings: Settings, tmp_path: Path) -> None:
    sweep(settings, runs_of(["kitti"], ["lora"], ["none"], [0]), root, tmp_path)
    words = f"layers kitti --seed 0 --data {root} --output {tmp_path} --probe-images 10 --cpu"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "layers" / "kitti--lora--seed0.json").read_text())
    assert record["scores"].keys() == record["probe_accuracy"].keys() == {"1", "2", "3"}
    assert all(0 <= 10 * value <= 10 and 10 * value == int(10 * value) for value in record["probe_accuracy"].values())
    assert f"rank correlation of score and probe accuracy {record['correlation']:.2f}" in " ".join(done.output.split())

    here = Experiment(settings, load_task(find_task("kitti"), root, any_size=True), Store(tmp_path), MACHINE)
    model, _ = here.adapted(Run("kitti", "lora", "none", 0), "train800val200")
    selection = select_layers(model, here.examples("train800val200"), SLSConfig())
    assert record["selection"]["kept_layers"] == selection.kept_layers
    assert selection.to_dict()["scores"].items() <= record["scores"].items()
    for name in ("depth", "maps"):
        assert (tmp_path / "layers" / f"kitti--lora--seed0--{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_way_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=64)
    tiny = Local(64, recipe, recipe, test_limit=64, rank=2, backbone=Backbone(16, 2, 2, 32))
    text = StringIO()
    for _ in range(2):
        assert not run_local(tiny, ["digits"], tmp_path, MACHINE, Console(file=text, width=200))
    assert "without depgraph" in text.getvalue() and "4 of 4 runs are done already" in text.getvalue()
    assert text.getvalue().count("pretrained on dSprites (re-rendered)") == 1
    report = CliRunner().invoke(app, ["report", "--output", str(tmp_path)])
    assert "small ViT pretrained here" in report.output and "64 of 797 test images" in report.output
    with pytest.raises(VitPruneError, match="pretrained with other sizes"):
        run_local(replace(tiny, source_images=65), ["digits"], tmp_path, MACHINE, Console(file=text))


# ---------------------------------------------------------------------- commands
@pytest.mark.parametrize("terminal", ["dumb", "xterm-256color"])
def test_list_says_what_is_here(terminal: str, root: Path) -> None:
    """In a pipe a row stays on one line, whatever the environment says of width and terminal."""
    shown = CliRunner().invoke(app, ["list", "--data", str(root)], env={"COLUMNS": "40", "TERM": terminal})
    lines = {line.split()[1]: line for line in shown.output.splitlines() if line.startswith("│")}
    assert TASKS.keys() == lines.keys()
    assert "folder" in lines["kitti"] and str(root / "kitti") in lines["kitti"]
    assert "local" in lines["digits"] and "(re-rendered)" in lines["dsprites_ori"] and "scikit" in lines["digits"]
    assert "hf download" in shown.output
    assert "smallnorb_ele" in shown.output


def test_the_command_runs_and_says_errors_in_one_line(source: Path, root: Path, tmp_path: Path) -> None:
    words = f"run --tasks kitti --peft linear --pruning none+truncate:k=1 --seeds 7 --model {source} --data {root}"
    more = f"--output {tmp_path} --epochs 1 --warmup-epochs 0 --batch-size 8 --any-size --no-selection --cpu"
    speed = "--speed-batch 2 --speed-rounds 1"
    done = CliRunner().invoke(app, f"{words} {more} {speed}".split())
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "kitti--linear--none--seed7.json",
        "kitti--linear--truncate-k=1--seed7.json",
    ]
    # speed is measured again, and nothing else changes
    file = tmp_path / "runs" / "kitti--linear--truncate-k=1--seed7.json"
    before = json.loads(file.read_text())
    before["results"]["last_epoch"]["cost"] |= {"speedup": -1.0, "images_per_second": -1.0}
    file.write_text(json.dumps(before))
    again = CliRunner().invoke(app, ["speed", "--output", str(tmp_path), "--data", str(root), "--cpu"])
    assert again.exit_code == 0 and "kitti--linear--truncate-k=1--seed7: " in again.output, again.output
    after = json.loads(file.read_text())
    for name in ("speedup", "images_per_second"):
        assert after["results"]["last_epoch"]["cost"].pop(name) > 0 > before["results"]["last_epoch"]["cost"].pop(name)
    assert after == before
    wrong = CliRunner().invoke(app, ["run", "--tasks", "kity"])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("benchmarks.vtab: there is no task 'kity' (did you mean kitti?)")
    assert wrong.stderr.count("\n") == 1
    assert "seeds are whole numbers" in CliRunner().invoke(app, ["run", "--seeds", "a"]).stderr


@pytest.mark.slow
def test_two_processes_share_the_batch_and_one_writes(source: Path, root: Path, tmp_path: Path) -> None:
    """The adapted model is that of one process; and a sweep goes on in two processes."""
    words = f"run --tasks kitti --peft lora --pruning none+sls+truncate:k=2 --seeds 7 --model {source} --data {root}"
    more = "--no-selection --epochs 2 --warmup-epochs 1 --batch-size 8 --rank 2 --learning-rate 0.01 --any-size --cpu"
    speed = "--speed-batch 2 --speed-rounds 1 --output"
    for _ in range(2):
        printed = run_on_two(
            "-m", "benchmarks.vtab", *f"{words} {more} {speed} {tmp_path / 'two'}".split(), timeout=900
        )
    assert "3 of 3 runs are done already" in printed
    words = words.replace("none+sls+truncate:k=2", "none")
    alone = CliRunner().invoke(app, f"{words} {more} {speed} {tmp_path / 'one'}".split())
    assert alone.exit_code == 0, alone.output
    assert results(tmp_path / "one").items() <= results(tmp_path / "two").items()
    state = "adapted/kitti--lora--seed7--train800val200/state.safetensors"
    torch.testing.assert_close(load_file(tmp_path / "two" / state), load_file(tmp_path / "one" / state))
