"""The example script as users run it: killed and resumed, on two processes, pushed to a Hub."""

import json
import random
import runpy
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import hf_vitprune
import hf_vitprune_cli.digits
from hub_standin import HubStandIn, hub_environment
from processes import ROOT

SCRIPT = ROOT / "examples" / "run_image_classification_pruning.py"
ARGUMENTS = [
    *("--dataset", "digits", "--max_train_samples", "128", "--max_eval_samples", "64", "--num_train_epochs", "1"),
    *("--per_device_train_batch_size", "16", "--save_steps", "3", "--use_cpu", "True", "--report_to", "none"),
    *("--disable_tqdm", "True"),
]
#: dies without a word in the stage named by argv[1], at the step that argv[2] says
KILLED = f"""
import os, runpy, sys
from transformers import TrainerCallback
from hf_vitprune import PruningTrainer

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(sys.argv_stage) and state.global_step == sys.argv_step:
            os._exit(9)

sys.argv_stage, sys.argv_step = sys.argv.pop(1), int(sys.argv.pop(1))
plain = PruningTrainer.__init__
def init(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Die())
PruningTrainer.__init__ = init
sys.argv[0] = {str(SCRIPT)!r}
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def run(*command, env=None, expected=0):
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env, timeout=300)
    assert result.returncode == expected, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def summary_of(output):
    return json.loads(output[output.rindex("{\n") :])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, summary, files on the Hub) of a run that nothing happened to, and that pushes its model."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with HubStandIn() as hub:
        push = ["--push_to_hub", "--hub_model_id", "tester/digits-small", "--output_dir", folder]
        output = run(SCRIPT, *ARGUMENTS, *push, env=hub_environment(hub, tmp_path_factory.mktemp("home")))
        return folder, summary_of(output), dict(hub.files("tester/digits-small"))


def test_the_summary_is_of_a_model_at_the_target(undisturbed):
    folder, summary, _ = undisturbed
    assert 0.4 < summary["macs_ratio"] <= 0.5
    assert {"README.md", "config.json", "preprocessor_config.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["learn", "tune"])
def test_a_killed_run_resumes_to_the_same_model(undisturbed, tmp_path, stage):
    step = random.randint(
        3, 7
    )  # of 8; the first checkpoint is at 3. Any step must do, so another one is drawn each time
    print(f"killed at step {step} of {stage}")
    run("-c", KILLED, stage, step, *ARGUMENTS, "--output_dir", tmp_path, expected=9)
    assert not (tmp_path / "model.safetensors").exists()
    output = run(SCRIPT, *ARGUMENTS, "--output_dir", tmp_path, "--resume_from_checkpoint", "True")
    folder, summary, _ = undisturbed
    assert summary_of(output) == summary
    expected, resumed = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert expected.keys() == resumed.keys()
    assert all(expected[name].equal(resumed[name]) for name in expected)


def test_it_pushes_the_model_with_its_card(undisturbed):
    _, _, files = undisturbed
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= set(files)
    assert b"hf_vitprune" in files["README.md"]


@pytest.mark.slow
def test_nvit_with_another_teacher(tmp_path):
    """The full model teaches by KL while it is pruned, another classifier by hard labels in both stages."""
    images = hf_vitprune_cli.digits.load_images("digits")
    model = tmp_path / "dense"
    hf_vitprune_cli.digits.tiny_vit(images.label_names).save_pretrained(model)
    hf_vitprune_cli.digits.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(model)
    sizes = json.dumps({"group_sizes": {"heads": 1, "qk": 4, "v": 4}})
    options = ["--method", "nvit", "--method_config", sizes, "--temperature", "20", "--teacher_name_or_path", model]
    output = run(SCRIPT, *ARGUMENTS, *options, "--model_name_or_path", model, "--output_dir", tmp_path / "out")
    assert 0.4 < summary_of(output)["macs_ratio"] <= 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pruning_config"]["info"]["method"] == "NViT"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["learn", "tune"])
def test_a_killed_search_resumes_to_the_same_model(tmp_path, stage):
    """SPViT, fine-tuned from the weights of before the search; the architecture goes from stage to stage by itself."""
    images = hf_vitprune_cli.digits.load_images("digits")
    model = tmp_path / "dense"
    hf_vitprune_cli.digits.tiny_vit(images.label_names).save_pretrained(model)
    hf_vitprune_cli.digits.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(model)
    options = [
        *(
            "--method",
            "spvit",
            "--gate_learning_rate",
            "0.5",
            "--weights",
            "pretrained",
            "--model_name_or_path",
            model,
        ),
        *("--distillation", "hard", "--logging_steps", "2"),
    ]
    expected = summary_of(run(SCRIPT, *ARGUMENTS, *options, "--output_dir", tmp_path / "whole"))
    assert expected["macs_ratio"] <= 0.5
    assert {"architecture.png", "gates.png"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    run("-c", KILLED, stage, 4, *ARGUMENTS, *options, "--output_dir", tmp_path / "killed", expected=9)
    resumed = ["--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "True"]
    assert summary_of(run(SCRIPT, *ARGUMENTS, *options, *resumed)) == expected
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_give_one_result(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    output = run(*launcher, SCRIPT, *ARGUMENTS, "--lora_rank", "2", "--output_dir", tmp_path / "out")
    assert output.count('"accuracy_masked"') == 1
    assert summary_of(output)["macs_ratio"] <= 0.5


@pytest.mark.parametrize("taught", [pytest.param(False, marks=pytest.mark.slow), True])
def test_redistributed_model_from_scratch(tmp_path, monkeypatch, capsys, taught):
    """Taught, it has a second head: both heads learn, from labels and from the teacher."""
    out = tmp_path / "out"
    arguments = [SCRIPT, *ARGUMENTS, "--revit_hidden_size", "32", "--output_dir", out]
    if taught:
        hf_vitprune_cli.digits.tiny_vit([str(i) for i in range(10)]).save_pretrained(tmp_path / "teacher")
        arguments += ["--teacher_name_or_path", tmp_path / "teacher", "--drop_path", "0.1", "--warmup_steps", "0.2"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")  # a process of its own would import for longer than it trains
    summary = summary_of(capsys.readouterr().out)
    base = hf_vitprune_cli.digits.tiny_vit([str(i) for i in range(10)]).config
    base.num_attention_heads = 1
    expected = hf_vitprune.revit(base, 32)
    loaded = AutoModelForImageClassification.from_pretrained(out)
    if taught:
        assert type(loaded).__name__ == "PrunedDeiTForImageClassificationWithTeacher"
        assert hf_vitprune.Architecture.of(loaded).layers == expected.layers
    else:
        cost = hf_vitprune.count(expected)
        assert summary["macs"] == cost.macs and summary["weight_params"] == cost.weight_params
        assert hf_vitprune.Architecture.of(loaded) == expected
    assert 0 <= summary["accuracy"] <= 1 and (out / "README.md").exists()


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    """A folder with something in it takes --force; the model's, and what holds it or lies in it, is never written."""
    main = runpy.run_path(str(SCRIPT))["main"]
    model = tmp_path / "home" / "model"
    hf_vitprune_cli.digits.tiny_vit([str(i) for i in range(10)]).save_pretrained(model)
    before = (model / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    words = ["--model_name_or_path", str(tmp_path / "link"), "--use_cpu", "True", "--report_to", "none"]
    for out, force, said in (
        (model, "True", "is .*link, which is read"),
        (model / "small", "True", "lies in"),
        (tmp_path / "home", "True", "holds"),
        (tmp_path / "taken", "False", "is there already; choose another place, or add --force"),
    ):
        with pytest.raises(FileExistsError, match=said):
            main([*words, "--output_dir", str(out), "--force", force])
    assert {path.name for path in tmp_path.iterdir()} == {"home", "link", "taken"}
    assert (model / "model.safetensors").read_bytes() == before
