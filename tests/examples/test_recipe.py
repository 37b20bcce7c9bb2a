"""Published runs as recipes: each starts, takes two steps on tiny data, and says what it will cost."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, SwinConfig, SwinForImageClassification

from hf_vitprune import SPViTConfig, VTPConfig
from hf_vitprune.contrib.augment import AugmentationConfig
from hf_vitprune.errors import InvalidConfigError, MissingExtraError
from hf_vitprune.utils import extras
from hf_vitprune_cli.digits import tiny_vit
from processes import ROOT
from recipe import Recipe, Run, gpu_hours

EXAMPLES = ROOT / "examples"
RECIPES = EXAMPLES / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.json"))
LABELS = [str(i) for i in range(10)]
#: run by `make test`; the others by `make test-all`
QUICK = {"spvit-swin-ti-distilled", "revit-t", "sls-convpass"}
SIZES: dict[str, Any] = {"image_size": 16, "num_labels": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of the kinds that recipes start from, with image processors."""
    from transformers import ViTImageProcessorPil

    made = tmp_path_factory.mktemp("models")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128}
    deit = DeiTConfig(patch_size=4, **small, **SIZES, **names)
    swin = SwinConfig(patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **SIZES, **names)
    models = {
        "vit": tiny_vit(LABELS),
        "deit": DeiTForImageClassificationWithTeacher(deit),
        "one_head": tiny_vit(LABELS),
        "swin": SwinForImageClassification(swin),
    }
    models["one_head"].config.num_attention_heads = 1  # of 64 channels, as ReViT's rule has it
    for name, model in models.items():
        model.save_pretrained(made / name)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(made / name)
    return made


def tiny_changes(name: str, folder: Path) -> list[Any]:
    """What a recipe cannot have on tiny data: its model, its teacher, its batch, and numbers in 10^9 multiply-adds."""
    recipe = Recipe.load(RECIPES, name)
    if recipe.tasks:
        return ["--model_name_or_path", folder / "vit", "--task", "eurosat", "--retrain_epochs", "1"]
    kinds = {"nvit": "deit", "revit": "one_head", "vtp": "vit", "spvit": "swin" if "swin" in name else "vit"}
    kind = kinds[name.partition("-")[0]]
    words: list[Any] = ["--model_name_or_path", folder / kind]
    if "teacher_name_or_path" in recipe.arguments:
        words += ["--teacher_name_or_path", folder / "vit"]
    settings = dict(recipe.arguments.get("method_config", {}))
    if "target_gmacs" in settings:
        settings |= {"target_gmacs": 5e-4, "gate_learning_rate": 3.0}
    if name.startswith("nvit"):
        settings["group_sizes"] = {"embedding": 8, "heads": 1, "qk": 4, "v": 4, "mlp": 16}
        settings = {k: v for k, v in settings.items() if k not in ("interval", "groups_per_step")}
        words += ["--target_metric", "macs", "--target", "0.6"]
    if name.startswith("revit"):
        words += ["--revit_hidden_size", "32"]
    return [*words, "--method_config", json.dumps(settings)] if settings else words


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_it_starts_and_takes_two_steps(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = Recipe.load(RECIPES, name)
    script = EXAMPLES / ("run_sls_peft.py" if published.tasks else "run_image_classification_pruning.py")
    arguments = [
        *(script, "--recipe", name, "--output_dir", tmp_path, "--dataset", "digits", "--max_train_samples", "64"),
        *("--max_eval_samples", "16", "--max_steps", "2", "--per_device_train_batch_size", "16"),
        *("--gradient_accumulation_steps", "1", "--use_cpu", "True", "--report_to", "none", "--disable_tqdm", "True"),
        *tiny_changes(name, folder),
    ]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    assert published.published in output and "hours of an A100" in output
    if published.tasks:
        summary = json.loads(output[output.index('{\n  "kept_layers"') :])
        assert set(summary["accuracy"]) == {"adapted", "truncated", "retrained"}
        assert PeftConfig.from_pretrained(tmp_path / "adapter").scale == published.tasks["eurosat"]["scale"]
        return
    summary = json.loads(output[output.rindex("{\n") :])
    assert 0 <= summary["accuracy"] <= 1
    assert ("accuracy_of_average" in summary) == ("ema_decay" in published.arguments)
    assert (tmp_path / "model.safetensors").exists()


def test_every_recipe_is_whole() -> None:
    assert len(NAMES) == 24
    for name in NAMES:
        recipe = Recipe.load(RECIPES, name)
        assert "arXiv" in recipe.published and recipe.notes
        assert bool(recipe.scratch) != (bool(recipe.learn) and bool(recipe.tune))
        for stage in (recipe.learn, recipe.tune, recipe.scratch):
            if stage:  # the DeiT-based codes clip nothing, Swin's clips at 5
                assert stage["max_grad_norm"] == (5.0 if "swin" in name else 0.0)
        if recipe.tasks:
            assert recipe.augmentation is None and len(recipe.tasks) == 19
        else:
            assert recipe.augmentation is not None and AugmentationConfig(**recipe.augmentation).cutmix == 1.0


SIZES_OF = {"ti": "tiny", "s": "small", "b": "base"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("spvit", "vtp"))])
def test_a_recipe_has_the_published_settings_of_its_method(name: str) -> None:
    settings = Recipe.load(RECIPES, name).arguments["method_config"]
    if name.startswith("vtp"):  # scores learn at the weights' rate
        assert VTPConfig(**settings) == VTPConfig.published(0.4 if "40" in name else 0.2)
        return
    _, family, size, *more = name.split("-")
    published = "-".join([family, SIZES_OF[size], *(part for part in more if part != "distilled")])
    assert SPViTConfig(**settings) == SPViTConfig.published(published)


def test_hours_by_hand() -> None:
    """DeiT-B for 300 epochs: 1281167 * 300 * 2 * 3 * 17.56e9 operations at 109.2e12 a second are 103 hours."""
    hours = gpu_hours(1281167, 300, 17.56e9)
    assert hours == pytest.approx(1281167 * 300 * 6 * 17.56e9 / 109.2e12 / 3600, rel=1e-12)
    assert hours == pytest.approx(103.0, abs=0.1)
    assert gpu_hours(1000, 1, 3e9, 9e9) == pytest.approx(2 * gpu_hours(1000, 1, 3e9))


def test_settings_of_a_task() -> None:
    recipe = Recipe.load(RECIPES, "sls-convpass")
    kitti = recipe.for_task("kitti").arguments["adapter_config"]
    assert kitti == {"r": 8, "activation": "quick_gelu", "scale": 10, "initial": "xavier"}
    run, words = Run.of(["--recipe=sls-convpass", "--task=kitti"], RECIPES, adapters=True)
    assert json.loads(words[words.index("--adapter_config") + 1]) == kitti and run.given == {"recipe", "task"}
    with pytest.raises(InvalidConfigError, match="sls-convpass: name a task; tasks are caltech101"):
        Run.of(["--recipe", "sls-convpass"], RECIPES, adapters=True)
    with pytest.raises(InvalidConfigError, match="nothing is published for 'beans'"):
        recipe.for_task("beans")
    with pytest.raises(InvalidConfigError, match=r"sls-convpass is for examples/run_sls_peft\.py"):
        Run.of(["--recipe", "sls-convpass", "--task", "kitti"], RECIPES)
    with pytest.raises(InvalidConfigError, match=r"vtp-40 is for examples/run_image_classification_pruning\.py"):
        Run.of(["--recipe", "vtp-40"], RECIPES, adapters=True)


def test_stages_batches_and_refusals(tmp_path: Path) -> None:
    recipe = Recipe.load(RECIPES, "spvit-deit-s")
    stage = recipe.stage("learn", {"learning_rate"}, per_device=64, processes=4)
    assert stage["gradient_accumulation_steps"] == 4 and "learning_rate" not in stage
    assert recipe.stage("tune", {"gradient_accumulation_steps"}, 7, 3)["num_train_epochs"] == 130
    with pytest.raises(InvalidConfigError, match="1024 images a step, and 3 x 7 at a time"):
        recipe.stage("tune", set(), 7, 3)
    with pytest.raises(InvalidConfigError, match="no recipe 'vtp-60'; there are nvit-b"):
        Recipe.load(RECIPES, "vtp-60")
    for content, message in (("{", "is not JSON"), ('{"batch": 1, "published": "", "epochs": 1}', "other entries")):
        (tmp_path / "one.json").write_text(content)
        with pytest.raises(InvalidConfigError, match=message):
            Recipe.load(tmp_path, "one")


def test_without_kornia_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"hf_vitprune\[augment\]"):
        Run.of(["--recipe", "vtp-40"], RECIPES)
    assert Run.of(["--method", "vtp"], RECIPES) == (Run(None, {"method"}), ["--method", "vtp"])
