"""Methods by name: one call makes a method known to the wrapper, the command line, the demo and the examples."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import toy_method
from hf_vitprune import count, get_pruning_model, register_method
from hf_vitprune.errors import InvalidConfigError, ResumeError
from hf_vitprune.methods import (
    NViTConfig,
    PruningConfig,
    SLSConfig,
    SPViTConfig,
    VTPConfig,
    config_class_of,
    method_names,
    registry,
)
from tiny import make

VIT = "ViTForImageClassification"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The toy method, registered for one test."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register_method(toy_method.ToyConfig, toy_method.Toy)
    yield toy_method


def test_own_methods_have_names() -> None:
    assert method_names() == ("vtp", "nvit", "spvit", "truncation")
    assert config_class_of("vtp") is VTPConfig and config_class_of("sls") is SLSConfig
    with pytest.raises(InvalidConfigError, match="'magic'; one of vtp, nvit, spvit, truncation"):
        config_class_of("magic")


def test_settings_follow_from_a_goal() -> None:
    config = config_class_of("vtp").from_goal(0.4, "params", round_to=4)
    assert config == VTPConfig(target=0.4, target_metric="params", round_to=4, gate_learning_rate=1e-2)
    sizes = {"embedding": 4, "heads": 1, "qk": 4, "v": 4, "mlp": 4}
    assert NViTConfig.from_goal(0.5, round_to=4, eta=0.1) == NViTConfig(target=0.5, group_sizes=sizes, eta=0.1)
    assert NViTConfig.from_goal(0.5) == NViTConfig(target=0.5)
    assert config_class_of("truncation").from_goal(0.5).to_dict()["target"] == 0.5
    with pytest.raises(InvalidConfigError, match="VTPConfig has no eta"):
        VTPConfig.from_goal(0.5, eta=0.1)
    with pytest.raises(InvalidConfigError, match="takes no target"):
        SLSConfig.from_goal(0.5)


def test_a_registered_method_prunes(toy: Any) -> None:
    assert method_names()[-1] == "toy" and config_class_of("toy") is toy.ToyConfig
    model = make(VIT)
    wrapped = get_pruning_model(model, config_class_of("toy").from_goal(0.8, round_to=4))
    small = wrapped.export(compensate="none")
    assert count(small).macs <= 0.8 * count(model).macs
    assert wrapped.plan().info["method"] == "Toy"


def test_installed_packages_bring_methods(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del registry._METHODS[toy.ToyConfig]
    package = tmp_path / "toy_package-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: toy-package\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\ntoy = installed_toy\n")
    code = "import hf_vitprune, toy_method as t\nhf_vitprune.register_method(t.ToyConfig, t.Toy)\n"
    (tmp_path / "installed_toy.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert "toy" in method_names()
    assert config_class_of("toy") is toy.ToyConfig


def test_what_is_no_method(toy: Any) -> None:
    register_method(toy.ToyConfig, toy.Toy)  # again, as in a notebook
    assert method_names().count("toy") == 1

    @dataclass
    class VtpConfig(PruningConfig):
        pass

    for config_class, method_class, message in (
        (toy.Toy, toy.Toy, "over PruningConfig"),
        (PruningConfig, toy.Toy, "over PruningConfig"),
        (toy.ToyConfig(target=0.5), toy.Toy, "over PruningConfig"),
        (toy.ToyConfig, toy.ToyConfig, "over PruningMethod"),
        (VtpConfig, toy.Toy, "'vtp' is taken by hf_vitprune.methods.vtp.config.VTPConfig"),
    ):
        with pytest.raises(InvalidConfigError, match=message):
            register_method(config_class, method_class)


def test_checkpoints_that_name_settings_of_before_go_on() -> None:
    """Those that are gone, at what they were by default; any other value computed something else."""
    config = SPViTConfig(target=0.7)
    state = dict(get_pruning_model(make(VIT), config).state_dict())
    record = json.loads(bytes(state["_extra_state"].tolist()))
    for changes, refused in (
        ({"temperature": "1.0", "final_temperature": "None", "tolerance": "0.02"}, None),
        ({"final_temperature": "0.5"}, "final_temperature was 0.5 and is None"),
        ({"cost_weight": "3.0"}, "cost_weight was 3.0 and is 40.0"),
        ({"magic": "None"}, "magic was None and is None"),
    ):
        state["_extra_state"] = torch.tensor(list(json.dumps({**record, **changes}).encode()), dtype=torch.uint8)
        with pytest.raises(ResumeError, match=refused) if refused else contextlib.nullcontext():
            get_pruning_model(make(VIT), config).load_state_dict(state)
