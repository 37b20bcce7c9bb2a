"""Folders with a file of code: they load where this package cannot be imported, bit for bit, and are saved again."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, ViTForImageClassification

from hf_vitprune import PruningPlan, errors, prune, push_to_hub, towers
from hf_vitprune.errors import InvalidArchitectureError, InvalidConfigError, PortableError
from hf_vitprune.families import base, swin
from hf_vitprune.modeling import blocks, conv_mixer, rebuild, registry
from hf_vitprune.modeling.portable import Portable
from hf_vitprune.modeling.portable_source import MOST_LINES
from hf_vitprune.utils import mixing, modules
from hub_standin import HubStandIn, hub_environment
from plans import PLANS, plan_named
from portable_folders import aligned
from processes import SUPPORT, run, run_python
from tiny import CASES, EVERY_FAMILY, WITH_GRID, assert_same, hybrid, lacks, make
from tiny import run as outputs
from tiny_composites import COMPOSITES
from tiny_composites import outputs as composite_outputs

FILE = "modeling_hf_vitprune.py"
SOURCES = (rebuild, blocks, conv_mixer, base, swin, mixing, modules, errors)
#: case, plan (None: with mixers of every kind)
QUICK: list[tuple[str, str | None]] = [
    ("ViTForImageClassification", "everything"),
    ("ViTForImageClassification", None),
    ("ViTForImageClassification", "removed branches"),
    ("SwinForImageClassification", "everything"),
    ("SwinForImageClassification", None),
    ("DINOv3ViTModel", "qk"),
    ("Dinov2Backbone", "everything"),
    ("SiglipVisionModel", "embedding"),
    ("VideoMAEForVideoClassification", "embedding"),
    ("BeitForSemanticSegmentation", "embedding"),
    ("BeitForImageClassification", "removed branches"),
    ("CLIPForImageClassification", "narrow inputs"),
]
FEW_WHOLES = ["LLaVA", "CLIP", "DepthAnything"]


def pruned(case: str, plan: str | None) -> Any:
    if plan is None:
        return hybrid(case)
    model = make(case)
    made = plan_named(plan, model)
    return None if made is None else prune(model, made, stock=False)


def save(folder: Path, model: Any, kind: str, expected: dict[str, torch.Tensor]) -> None:
    model.save_pretrained(folder, portable=True)
    lines = (folder / FILE).read_text().count("\n")
    assert lines <= MOST_LINES, (folder, lines)
    torch.save(expected, folder / "outputs.pt")
    (folder / "kind").write_text(kind)


def save_whole(root: Path, name: str) -> None:
    for part in towers(COMPOSITES[name]()[0]):
        model, inputs = COMPOSITES[name]()
        small = prune(model, PruningPlan.random(model, 0.4, ["heads", "qk", "v", "mlp"], part=part), stock=False)
        save(root / name / part, small, name, composite_outputs(small, inputs))


def load_without_the_package(root: Path) -> None:
    """All of the folders, in a process that cannot import it."""
    folders = sorted(str(saved.parent.relative_to(root)) for saved in root.rglob("outputs.pt"))
    lines = run("-I", str(SUPPORT / "portable_folders.py"), str(root), timeout=900).splitlines()
    assert folders and sorted(line for line in lines if line in folders) == folders


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("portable")
    for case, plan in QUICK:
        small = pruned(case, plan)
        save(root / case / str(plan), small, case, outputs(small))
    for name in FEW_WHOLES:
        save_whole(root, name)
    return root


def test_folders_load_without_the_package(quick: Path) -> None:
    """Bit for bit, and saved again they are the same folders; untrusted they are refused."""
    load_without_the_package(quick)


def test_folders_load_through_registration_with_the_package(quick: Path) -> None:
    """Nobody is asked to trust the file, and it is not run even for those who do."""
    for saved in sorted(quick.rglob("outputs.pt")):
        fields = json.loads((saved.parent / "config.json").read_text())
        auto = next(name for name in sorted(fields["auto_map"], reverse=True) if name != "AutoConfig")
        backbone = "AutoBackbone" in fields["auto_map"]
        made = registry.PrunedDinov2Backbone if backbone else getattr(transformers, auto)
        for settings in ({}, {"trust_remote_code": True}):
            model = aligned(made.from_pretrained(saved.parent, **settings).eval())
            assert not type(model).__module__.startswith("transformers_modules."), type(model)
            kind = (saved.parent / "kind").read_text()
            given = composite_outputs(model, COMPOSITES[kind]()[1]) if kind in COMPOSITES else outputs(model)
            assert_same(given, torch.load(saved, weights_only=True))


@pytest.mark.slow
def test_every_family_and_kind_of_architecture(tmp_path: Path) -> None:
    for case in EVERY_FAMILY:
        for plan in [*PLANS, None]:
            if (plan and lacks(case, plan)) or (plan is None and case not in WITH_GRID):
                continue
            small = pruned(case, plan)
            if small is not None:
                save(tmp_path / case / str(plan), small, case, outputs(small))
    for case in sorted({*CASES} - {*EVERY_FAMILY}):
        small = pruned(case, "mlp")
        save(tmp_path / case / "mlp", small, case, outputs(small))
    load_without_the_package(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["everything", None])
def test_dtypes_devices_shards_pipelines_and_training(plan: str | None, tmp_path: Path) -> None:
    """See ``portable_folders.uses``."""
    small = pruned("ViTForImageClassification", plan)
    save(tmp_path / "small", small, "ViTForImageClassification", outputs(small))
    (tmp_path / "small" / "uses").touch()
    load_without_the_package(tmp_path)


@pytest.mark.slow
def test_every_bigger_model(tmp_path: Path) -> None:
    for name in COMPOSITES:
        save_whole(tmp_path, name)
    load_without_the_package(tmp_path)


# ---------------------------------------------------------------------- the Hub
PUSH = """
import sys
from pathlib import Path
import torch
from hf_vitprune import push_to_hub
from tiny import hybrid, run
small = hybrid("ViTForImageClassification")
small.push_to_hub("tester/method", portable=True)
push_to_hub(small, "tester/function", portable=True)
torch.save(run(small), Path(sys.argv[1]) / "pushed.pt")
"""


def online(hub: HubStandIn, home: Path) -> dict[str, str]:
    settings = hub_environment(hub, home)
    return {name: value for name, value in settings.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "0"}


@pytest.mark.slow
def test_from_the_hub(tmp_path: Path) -> None:
    (tmp_path / "kind").write_text("ViTForImageClassification")
    with HubStandIn(lfs=True) as hub:
        run_python(PUSH, str(tmp_path), **online(hub, tmp_path / "a"))
        for name in ("tester/method", "tester/function"):
            assert {FILE, "README.md"} <= {*hub.files(name)}
            assert "trust_remote_code=True" in hub.files(name)["README.md"].decode()
        command = ("-I", str(SUPPORT / "portable_folders.py"), str(tmp_path), "tester/method", "tester/function")
        run(*command, **online(hub, tmp_path / "b"))


# ---------------------------------------------------------------------- the file
def test_the_file_is_made_of_the_source() -> None:
    """Every class and function of it is one of the package, up to docstrings; nothing is written a second time."""
    names, own = set(), set()
    for case in ("ViTForImageClassification", "SwinForImageClassification"):
        tree = ast.parse(Portable(hybrid(case)).source)
        for node in tree.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                continue
            if node.name.startswith("Pruned") and "Portable" in ast.unparse(node):
                own.add(node.name)
                continue
            module = next(
                m for m in SOURCES if hasattr(m, node.name) and getattr(m, node.name).__module__ == m.__name__
            )
            original = ast.parse(inspect.getsource(getattr(module, node.name))).body[0]
            assert bare(node) == bare(original), node.name
            names.add(node.name)
    assert names > {"rebuild_", "PrunedAttentionMixin", "ConvMixer", "give_grid", "WholeGridMixin", "window_bias"}
    assert own == {f"Pruned{kind}{part}" for kind in ("ViT", "Swin") for part in ("Config", "ForImageClassification")}


def bare(node: ast.AST) -> str:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.unparse(node)


# ---------------------------------------------------------------------- what cannot be said
class Doubled(ViTForImageClassification):
    """A user's class: its forward is its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def with_head(model: Any) -> Any:
    model.classifier = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 5))
    return model


def changed_after(small: Any) -> Any:
    small.classifier = nn.Linear(24, 9)
    return small


def cut(model: Any) -> Any:
    return prune(model, plan_named("mlp", model), stock=False)


REFUSED: dict[str, tuple[Any, str]] = {
    "class": (lambda: cut(Doubled(CASES["ViTForImageClassification"].config())), "Doubled is made by code"),
    "head": (lambda: cut(with_head(make("ViTForImageClassification"))), "classifier"),
    "changed": (lambda: changed_after(cut(make("ViTForImageClassification"))), "classifier.bias is not what"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_code_and_modules_of_the_users_are_refused_before_anything_is_written(what: str, tmp_path: Path) -> None:
    made, words = REFUSED[what]
    with pytest.raises(PortableError, match=words):
        made().save_pretrained(tmp_path / "small", portable=True)
    assert not (tmp_path / "small").exists()


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    small = cut(make("ViTForImageClassification"))
    peft = get_peft_model(small, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = outputs(peft.eval())
    with pytest.raises(PortableError, match="merge_and_unload"):
        peft.get_base_model().save_pretrained(tmp_path / "small", portable=True)
    with pytest.raises(PortableError, match="merge_and_unload"):
        peft.save_pretrained(tmp_path / "small", portable=True)
    assert not (tmp_path / "small" / "adapter_config.json").exists()
    with pytest.raises(PortableError, match="merge_and_unload"):
        push_to_hub(peft, "tester/peft", portable=True)
    save(tmp_path / "merged", peft.merge_and_unload(), "ViTForImageClassification", expected)


def test_a_push_inside_of_saving_comes_too_early(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="push_to_hub\\(portable=True\\)"):
        cut(make("ViTModel")).save_pretrained(tmp_path / "small", portable=True, push_to_hub=True)
    assert not (tmp_path / "small").exists()


def test_saved_without_it_the_folder_is_as_ever(tmp_path: Path) -> None:
    """A portable folder that is loaded with the package and saved has the five lines again."""
    small = cut(make("ViTModel"))
    small.save_pretrained(tmp_path, portable=True)
    again = AutoModel.from_pretrained(tmp_path)
    assert not hasattr(again.config, "portable")
    again.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path / "plain")
    for name in (FILE, "config.json"):
        assert (tmp_path / name).read_text() == (tmp_path / "plain" / name).read_text()


def test_a_bigger_model_without_its_kind_is_refused(tmp_path: Path) -> None:
    model = COMPOSITES["DepthAnything"]()[0]
    small = prune(model, PruningPlan.random(model, 0.4, ["mlp"]), stock=False)
    small.save_pretrained(tmp_path, portable=True)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["portable"]["stock_type"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InvalidArchitectureError, match="nothing known of its kind"):
        transformers.AutoConfig.from_pretrained(tmp_path)
