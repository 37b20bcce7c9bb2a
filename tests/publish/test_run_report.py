"""Figures of a run, read back from the SVG that is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_vitprune.methods.nvit.groups import Moment
from hf_vitprune.publish.block_report import plot_kept
from hf_vitprune.publish.run_report import plot_predictions, plot_run
from pruning_runs import nvit, scatter_scores


def test_a_run_is_drawn(tmp_path: Path) -> None:
    model = scatter_scores(nvit(target=0.5))
    model.decide()
    runs = {"first": model.method.moments(), "second": [Moment(0, 0, 1.0), Moment(1, 9, 0.6)]}
    text = plot_run(runs, tmp_path / "deep" / "run.svg", target=0.5).read_text()
    assert text.count("<!-- optimizer step -->") == text.count("<!-- share of the dense cost that is left -->") == 1
    assert all(f"<!-- {label} -->" in text for label in ("first", "second", "target, 0.5"))
    one = plot_run(runs["second"], tmp_path / "one.svg").read_text()
    assert "legend" not in one and one != text
    depth = plot_kept(model.plan(), tmp_path / "depth.svg").read_text()  # what survived, against depth
    assert all(f"<!-- {unit} -->" in depth for unit in ("heads", "q/k channels a head", "MLP neurons"))


def test_predictions_are_drawn(tmp_path: Path) -> None:
    text = plot_predictions([0.010, 0.020, 0.031], [0.011, 0.019, 0.030], tmp_path / "latency.svg").read_text()
    assert "<!-- measured (ms) -->" in text and text.count("<use ") >= 3
    assert "<!-- predicted as measured -->" in text and "<!-- a model -->" in text
    for predicted, measured in (([], []), ([0.1], [0.1, 0.2])):
        with pytest.raises(ValueError, match="one of each for every model"):
            plot_predictions(predicted, measured, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
