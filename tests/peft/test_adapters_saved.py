"""Adapters of pruned models on disk: exact on their base, however they are loaded, and refused on any other."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, PeftType
from transformers import AutoModelForImageClassification

from hf_vitprune.errors import AdapterError
from hf_vitprune.peft import register_peft_types, save_pruned_peft
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune, truncate
from tiny import CLASSIFIERS, assert_same, make, run
from tiny_adapters import CONFIGS, SLICED, adapted, targets

register_peft_types()
VIT = "ViTForImageClassification"


def dense(folder: Path, case: str = VIT) -> Path:
    make(case).save_pretrained(folder / "dense")
    return folder / "dense"


def load(path: Path | str) -> Any:
    return AutoModelForImageClassification.from_pretrained(path).eval()


def from_base(base: Any, folder: Path, **kwargs: Any) -> Any:
    return PeftModel.from_pretrained(base, str(folder), **kwargs).eval()


def injected(base: Any, folder: Path) -> Any:
    base.load_adapter(str(folder))
    return base.eval()


# ---------------------------------------------------------------------- whole layers: the dense checkpoint will do
#: kinds that are stored like another one that is not among them
LIKE_OTHERS = ("rslora", "loha", "hira", "lokr", "boft", "hra", "fourierft", "c3a", "randlora", "shira")


def kinds(names: Iterable[str]) -> list[Any]:
    """All, those like others only in the slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE_OTHERS else []) for name in names]


@pytest.mark.parametrize("kind", kinds(CONFIGS))
def test_depth_on_the_dense_base(kind: str, tmp_path: Path) -> None:
    model = adapted(load(dense(tmp_path)), kind)
    small = prune(model, PruningPlan.dense(model).keep_layers([0, 2]))
    expected = run(small)
    assert save_pruned_peft(small, tmp_path / "adapter") is None
    base = load(tmp_path / "dense")
    loaded = from_base(base, tmp_path / "adapter")
    assert_same(run(loaded), expected)
    assert base is loaded.get_base_model() and type(base) is type(small.get_base_model())
    assert base.config.num_hidden_layers == 2
    assert_same(run(AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()), expected)
    if kind not in ("vera", "vblora"):  # PEFT injects those into a PeftModel only
        assert_same(run(injected(load(tmp_path / "dense"), tmp_path / "adapter")), expected)


@pytest.mark.parametrize("case", [c for c in CLASSIFIERS if "Registers" not in c and "swiglu" not in c])
def test_depth_of_every_family(case: str, tmp_path: Path) -> None:
    model = adapted(load(dense(tmp_path, case)), "lora")
    small = truncate(model, len(PruningPlan.dense(model).layers) - 1)
    small.save_pretrained(tmp_path / "adapter")
    expected = run(small)
    for loaded in (
        from_base(load(tmp_path / "dense"), tmp_path / "adapter"),
        from_base(load(tmp_path / "dense"), tmp_path / "adapter", low_cpu_mem_usage=True),
        injected(load(tmp_path / "dense"), tmp_path / "adapter"),
        load(tmp_path / "adapter"),
    ):
        assert_same(run(loaded), expected)
    # what the base became is a whole pruned model, as if truncate had made it
    again = from_base(load(tmp_path / "dense"), tmp_path / "adapter")
    again.unload().save_pretrained(tmp_path / "base")
    assert_same(run(from_base(load(tmp_path / "base"), tmp_path / "adapter")), expected)
    plan = PruningPlan.random(again, 0.4)
    assert_same(run(prune(from_base(load(tmp_path / "base"), tmp_path / "adapter"), plan)), run(prune(small, plan)))


def test_only_its_own_layers(tmp_path: Path) -> None:
    model = adapted(load(dense(tmp_path)), "lora")
    plan = PruningPlan.dense(model)
    small = prune(model, plan.keep_layers([0, 2]))
    small.save_pretrained(tmp_path / "adapter")
    assert not any(file.suffix in (".bin", ".pt", ".pkl") for file in (tmp_path / "adapter").iterdir())
    own = prune(load(tmp_path / "dense"), plan.keep_layers([0, 2]))
    assert_same(run(from_base(own, tmp_path / "adapter")), run(small))
    top = prune(model, plan.keep_layers([2]))
    top.save_pretrained(tmp_path / "top")
    shallow = from_base(load(tmp_path / "dense"), tmp_path / "adapter").unload()
    assert_same(run(from_base(shallow, tmp_path / "top")), run(top))
    others = [
        prune(load(tmp_path / "dense"), plan.keep_layers([0, 1])),  # the same shape
        truncate(load(tmp_path / "dense"), 1),
        make(VIT, num_hidden_layers=2),
        make(VIT, num_hidden_layers=4),
        make(VIT, num_attention_heads=2),
        make("DeiTForImageClassification"),
    ]
    for other in others:
        before = run(other)
        for how in (from_base, injected):
            with pytest.raises(AdapterError, match=r"layers \[0, 2\] of the dense one"):
                how(other, tmp_path / "adapter")
        assert_same(run(other), before)


# ---------------------------------------------------------------------- sizes: the pruned base comes along
@pytest.mark.parametrize("kind", kinds(SLICED))
def test_sizes_with_their_base(kind: str, tmp_path: Path) -> None:
    model = adapted(load(dense(tmp_path)), kind)
    small = prune(model, PruningPlan.random(model, 0.4))
    folder = tmp_path / "adapter"
    assert save_pruned_peft(small, folder) == folder / "base"
    expected = run(small)
    assert_same(run(from_base(load(folder / "base"), folder)), expected)
    assert_same(run(injected(load(folder / "base"), folder)), expected)
    assert_same(run(AutoPeftModel.from_pretrained(folder).eval()), expected)
    trained = PeftModel.from_pretrained(load(folder / "base"), str(folder), is_trainable=True)
    assert any(p.requires_grad for p in trained.parameters())
    for how in (from_base, injected):
        with pytest.raises(AdapterError, match="load the pruned base model"):
            how(load(tmp_path / "dense"), folder)


def test_silently_fitting_shapes_are_refused(tmp_path: Path) -> None:
    """An adapter on q and v fits a model whose MLPs were never pruned, and would compute something else."""
    model = adapted(load(dense(tmp_path)), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    plan = PruningPlan.random(model, 0.4, ["mlp"])
    small = prune(model, plan)
    small.save_pretrained(tmp_path / "adapter")
    other = prune(load(tmp_path / "dense"), PruningPlan.random(model, 0.4, ["mlp"], seed=1))  # as many neurons, others
    for base in (load(tmp_path / "dense"), other):
        with pytest.raises(AdapterError):
            from_base(base, tmp_path / "adapter")
    assert_same(run(from_base(prune(load(tmp_path / "dense"), plan), tmp_path / "adapter")), run(small))


@pytest.mark.parametrize("case", ["merged", "pissa"])
def test_changed_base_weights_need_their_base(case: str, tmp_path: Path) -> None:
    config: Any = LoraConfig(r=3, target_modules=["fc1"], init_lora_weights="pissa")
    model = load(dense(tmp_path))
    model = adapted(
        model, config if case == "pissa" else peft.C3AConfig(block_size=8, target_modules=["fc1", "q_proj"])
    )
    plan = PruningPlan.dense(model).keep_layers([0, 1])
    if case == "merged":
        plan = PruningPlan.random(model, 0.4, ["mlp"])
    small = prune(model, plan)
    assert save_pruned_peft(small, tmp_path / "adapter") is not None
    for base in (load(tmp_path / "dense"), prune(load(tmp_path / "dense"), plan)):
        with pytest.raises(AdapterError):
            from_base(base, tmp_path / "adapter")
    assert_same(run(from_base(load(tmp_path / "adapter" / "base"), tmp_path / "adapter")), run(small))


def test_several_adapters(tmp_path: Path) -> None:
    model = adapted(load(dense(tmp_path)), LoraConfig(r=3, target_modules=["fc1"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    small = prune(model, PruningPlan.random(model, 0.4))
    save_pruned_peft(small, tmp_path / "adapter")
    again = from_base(load(tmp_path / "adapter" / "base"), tmp_path / "adapter")
    again.load_adapter(str(tmp_path / "adapter" / "other"), "other")
    for name in ("default", "other"):
        small.set_adapter(name)
        again.set_adapter(name)
        assert_same(run(again), run(small))
    shallow = truncate(model, 2)
    shallow.save_pretrained(tmp_path / "shallow")
    with pytest.raises(AdapterError):  # of another depth, as a second adapter
        again.load_adapter(str(tmp_path / "shallow" / "other"), "third")
    assert list(again.peft_config) == ["default", "other"]
    full = load(tmp_path / "dense")
    full.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "stock")
    with pytest.raises(AdapterError, match="already has adapters"):
        full.load_adapter(str(tmp_path / "shallow"))


# ---------------------------------------------------------------------- configs
def test_config_round_trip(tmp_path: Path) -> None:
    model = make(VIT)
    config = LoraConfig(
        r=3,
        target_modules=r".*layers\.[02]\..*fc1",
        rank_pattern={"layers.2.mlp.fc1": 7},
        modules_to_save=["classifier"],
    )
    small = prune(adapted(model, config), PruningPlan.dense(model).keep_layers([1, 2]))
    small.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded.peft_type is PeftType.VITPRUNE_LORA and isinstance(loaded, LoraConfig)  # type: ignore[attr-defined]
    assert set(loaded.target_modules or ()) == {"vit.layers.1.mlp.fc1"}
    assert loaded.rank_pattern == {"vit.layers.1.mlp.fc1": 7} and loaded.modules_to_save == ["classifier"]
    assert loaded.pruning["kept_layers"] == [1, 2]  # type: ignore[attr-defined]
    assert copy.deepcopy(loaded) == loaded and pickle.loads(pickle.dumps(loaded)) == loaded


@pytest.mark.parametrize(
    "damage", [None, {"version": 2}, {"version": 1}, {"kept_layers": "all"}, {"architecture": {}}]
)
def test_damaged_record(damage: dict[str, Any] | None, tmp_path: Path) -> None:
    truncate(adapted(load(dense(tmp_path)), "lora"), 2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    record = json.loads(file.read_text())
    if damage is None:
        del record["pruning"]
    elif damage == {"version": 1}:
        record["pruning"] = damage
    else:
        record["pruning"].update(damage)
    file.write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="record"):
        from_base(load(tmp_path / "dense"), tmp_path)


def test_registration_twice() -> None:
    before = list(PeftType)
    register_peft_types()
    assert list(PeftType) == before and len(set(before)) == len(before)
    assert PeftType("VITPRUNE_LOHA") is PeftType.VITPRUNE_LOHA  # type: ignore[attr-defined]


def test_save_refuses_stock_adapters(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="save_pretrained"):
        save_pruned_peft(adapted(make(VIT), "lora"), tmp_path)


def test_base_saved_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = make(VIT)
    small = prune(adapted(model, LoraConfig(r=3, target_modules=targets(model))), PruningPlan.random(model, 0.4))
    assert save_pruned_peft(small, tmp_path, base="me/vit-pruned") is None
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/vit-pruned"
    assert not (tmp_path / "base").exists()
