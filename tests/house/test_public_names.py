"""What ``import hf_vitprune`` offers, what it registers, and what it leaves alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_vitprune

IMPORTS = ("import transformers", "import peft", "import hf_vitprune")
REGISTERED = """
from peft import PeftType
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig
config = AutoConfig.for_model("pruned_vit")
assert type(config).__name__ == "PrunedViTConfig", config
assert type(config) in AutoModelForImageClassification._model_mapping
assert {"VITPRUNE_LORA", "VITPRUNE_CONVPASS", "CONVPASS", "REPADAPTER"} <= {kind.value for kind in PeftType}
"""
#: slow to import, and of no use to loading
SLOW = (
    "datasets",
    "evaluate",
    "sklearn",
    "matplotlib",
    "rich",
    "transformers.trainer",
    "hf_vitprune.methods",
    "hf_vitprune.training",
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout


def test_every_name_is_there_and_listed() -> None:
    for name in hf_vitprune.__all__:
        assert getattr(hf_vitprune, name) is not None
    assert set(hf_vitprune.__all__) <= set(dir(hf_vitprune))
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        _ = hf_vitprune.prunes


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    tree = ast.parse(Path(hf_vitprune.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.asname: (node.module or alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == hf_vitprune._PUBLIC


@pytest.mark.parametrize(
    "order",
    [pytest.param((0, 1, 2), marks=pytest.mark.slow), (2, 0, 1), pytest.param((0, 2, 1), marks=pytest.mark.slow)],
)
def test_it_registers_what_loading_needs_in_whichever_order(order: tuple[int, ...]) -> None:
    run("\n".join(IMPORTS[i] for i in order) + REGISTERED)


def test_nothing_slow_is_imported_with_it() -> None:
    """Neither are the files of any model that transformers and PEFT alone do not need."""
    code = "import sys, torch, transformers, peft; print(*sys.modules); import hf_vitprune; print(*sys.modules)"
    before, after = ({*line.split()} for line in run(code).splitlines()[-2:])
    assert not after.intersection(SLOW)
    assert not [name for name in after - before if ".modeling_" in name]
