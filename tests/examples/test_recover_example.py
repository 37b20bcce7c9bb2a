"""examples/recover_backbone.py, shortened."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModel

import hf_vitprune  # noqa: F401  what the folder needs to load
from processes import ROOT

FILE = ROOT / "examples" / "recover_backbone.py"


def test_it_recovers_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("recover_backbone", FILE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    left = example.main(["--steps", "20", "--out", str(tmp_path / "small")])
    printed = capsys.readouterr().out
    assert left < 1 and "of 20 stay" in printed and "of the MACs" in printed
    assert AutoModel.from_pretrained(tmp_path / "small").config.hidden_size == 64
    with pytest.raises(SystemExit):
        example.main(["--model", "x"])
