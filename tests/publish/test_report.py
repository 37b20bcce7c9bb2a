"""Tables and plots: the numbers add up to what ``count`` says, and everything removed can be seen."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from hf_vitprune.cost import count
from hf_vitprune.cost.closed_form import block_macs, removed_macs
from hf_vitprune.errors import MissingExtraError
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.publish.block_report import COLOURS, kept_shares, plot_architecture, plot_kept
from hf_vitprune.publish.report import (
    comparison_markdown,
    comparison_table,
    human,
    layer_markdown,
    layer_rows,
    layer_table,
)
from hf_vitprune.spec.architecture import Architecture
from tiny import CASES, hybrid, make

VIT = "ViTForImageClassification"


def printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def without_attention(plan: PruningPlan, index: int) -> PruningPlan:
    layers = [replace(e, mixer="none", heads=(), qk=(), v=()) if e.index == index else e for e in plan.layers]
    return plan.with_layers(layers)


@pytest.mark.parametrize("name", CASES)
def test_layers_add_up(name: str) -> None:
    model = make(name)
    cost, rows = count(model), layer_rows(model)
    assert sum(row["params"] for row in rows) == cost.params
    assert sum(row["macs"] for row in rows) == cost.macs
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["layer"] for row in rows] == [*range(len(rows) - 1), "other"]


def test_rows_state_the_sizes() -> None:
    model = make(VIT)
    plan = without_attention(PruningPlan.random(model, 0.5, ["heads", "qk", "mlp"]), 1)
    rows = layer_rows(prune(model, plan), image_size=32)
    assert rows[0].items() >= {"mixer": "attention", "heads": 2, "qk": 4, "v": 8, "mlp": 24}.items()
    assert rows[1].items() >= {"mixer": "none", "heads": 0, "attention_in": None}.items()
    assert sum(row["macs"] for row in rows) == count(plan.architecture, 32).macs > count(plan.architecture).macs
    assert "stage" not in rows[0]
    assert [row.get("stage") for row in layer_rows(make("SwinModel"))] == [0, 0, 1, 1, 1, None]


def test_layer_tables() -> None:
    model = make(VIT)
    plan = without_attention(PruningPlan.random(model, 0.5, ["mlp"]), 1)
    reading = replace(plan.layers[2], mlp_in=tuple(range(8)))
    architecture = plan.with_layers([*plan.layers[:2], reading]).architecture
    text = printed(layer_table(architecture, title="small [one]"))
    assert "small [one]" in text
    lines = layer_markdown(architecture).splitlines()
    assert lines[0].startswith("| layer | mixer | heads | qk | v | mlp | mlp_in | params | MACs | share |")
    assert lines[3].startswith("| 1 | - | - | - | - | 24 | all |")
    assert lines[4].startswith("| 2 | attention | 4 | 8 | 8 | 24 | 8 |")
    assert lines[-1].startswith("| total |") and lines[-1].endswith("| 100.0% |")
    assert human(count(architecture).params) in text
    assert {line.count("|") for line in lines} == {11}


def test_comparison() -> None:
    rows = [
        {"name": "dense", "accuracy": 0.8125, "params": 86_567_656, "macs": 17_563_000_000, "latency_ms": 123.456},
        {"name": "a|b [x]", "accuracy": 0.8, "params": 999, "macs": 5, "latency_ms": 61.7, "speedup": 2.0, "f1": 0.5},
    ]
    lines = comparison_markdown(rows).splitlines()
    assert lines[0] == "|  | accuracy | f1 | params | MACs | latency (ms) | speed-up |"
    assert lines[2] == "| dense | 81.2% |  | 86.6M | 17.6G | 123.46 |  |"
    assert lines[3] == "| a\\|b [x] | 80.0% | 0.5 | 999 | 5 | 61.70 | 2.00x |"
    text = printed(comparison_table(rows))
    assert "a|b [x]" in text and "86.6M" in text
    assert comparison_markdown([{"name": "only", "params": 1}]).splitlines()[0] == "|  | params |"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (123_456_789, "123M"), (1.5e12, "1.50T")],
)
def test_human(number: float, text: str) -> None:
    assert human(number) == text


def test_kept_shares_of_plans_and_shapes() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.5, ["heads", "mlp"]).keep_layers([0, 2])
    shares = kept_shares(plan)
    assert shares == {"heads": [0.5, 0, 0.5], "qk": [1, 0, 1], "v": [1, 0, 1], "mlp": [0.5, 0, 0.5]}
    small = prune(model, plan)
    assert kept_shares(small) == kept_shares(plan.architecture) == {k: [v[0], v[2]] for k, v in shares.items()}
    again = PruningPlan.random(small, 0.5, ["heads"])
    assert kept_shares(again)["heads"] == [0.5, 0.5] and kept_shares(again.architecture)["heads"] == [0.25, 0.25]
    narrow = plan.with_layers(replace(e, attention_in=tuple(range(8))) if e.index else e for e in plan.layers)
    assert kept_shares(narrow)["attention_in"] == [1, 0, 0.25]
    swin = PruningPlan.random(make("SwinModel"), 0.5, ["heads"]).keep_layers([0, 1, 3, 4])
    assert kept_shares(swin)["heads"] == [0.5, 0.5, 0, 0.5, 0.5]
    assert kept_shares(swin.architecture)["heads"] == [0.5] * 4


def test_plot(tmp_path: Path) -> None:
    model = make(VIT)
    plans = {f"{ratio}": PruningPlan.random(model, ratio) for ratio in (0.25, 0.5)}
    assert plot_kept(plans, tmp_path / "deep" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in plot_kept(plans["0.5"], tmp_path / "one.svg").read_bytes()
    assert plot_kept(Architecture.of(model), tmp_path / "dense.pdf").exists()
    assert "stage" not in plot_kept(plans, tmp_path / "named.svg").read_text()


def test_plots_say_what_they_show(tmp_path: Path) -> None:
    swin = make("SwinModel")
    plans = {f"{ratio}": PruningPlan.random(swin, ratio, ["heads", "mlp"]) for ratio in (0.25, 0.5)}
    text = plot_kept(plans, tmp_path / "kept.svg").read_text()
    words = ("share kept (%)", "stage 0", "MLP neurons", "0.25", "0.5", "layer, bottom to top")
    assert all(f"<!-- {word} -->" in text for word in words)
    assert text.count("<!-- stage 0 -->") == 4  # one a panel
    text = plot_architecture(prune(swin, plans["0.5"]), tmp_path / "blocks.svg").read_text()
    assert "<!-- the same layer, dense -->" in text and "<!-- stage 0 -->" in text


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hf_vitprune\[plots\]'"):
        plot_kept(make(VIT), tmp_path / "plot.png")


# ---------------------------------------------------------------------- blocks
def test_multiply_adds_of_blocks(tmp_path: Path) -> None:
    model = hybrid("ViTForImageClassification", ["conv3x3", "identity", "attention", "none"])
    macs = block_macs(model)
    assert [mixer > 0 for mixer, _ in macs] == [True, False, True, False]
    assert sum(map(sum, macs)) == sum(row["macs"] for row in layer_rows(model) if row["layer"] != "other")
    dense = block_macs(Architecture.dense(Architecture.of(model).config))
    gone = removed_macs(model)
    assert gone["mlp"] == 0 and gone["attention_share"] == 1
    assert gone["attention"] == pytest.approx(1 - sum(m for m, _ in macs) / sum(m for m, _ in dense))
    assert removed_macs(make("ViTForImageClassification"))["attention_share"] == 0


@pytest.mark.parametrize("case", ["ViTForImageClassification", "SwinForImageClassification"])
def test_architectures_are_drawn(case: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = plot_architecture(hybrid(case), tmp_path / "new" / "blocks.svg")
    text = file.read_text()
    for colour in ("attention", "conv3x3", "conv1x1", "identity", "MLP"):
        assert COLOURS[colour] in text
    assert COLOURS["none"] not in text


def test_convolutions_in_the_table() -> None:
    table = layer_markdown(hybrid("ViTForImageClassification"))
    assert "| conv_channels |" in table and "| conv3x3 |" in table
    assert "conv_channels" not in layer_markdown(make("ViTForImageClassification"))
