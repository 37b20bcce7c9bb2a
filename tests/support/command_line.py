"""The command line in this process: what it prints, and how it refuses."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune_cli import main as cli
from tiny import make

VIT = "ViTForImageClassification"


def call(*args: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, [str(arg) for arg in args])


def printed(*args: object) -> str:
    done = call(*args)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*args: object) -> str:
    """The one line that is printed instead of a traceback."""
    done = call(*args)
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("hf-vitprune: ")
    return done.stderr


def misused(*args: object) -> str:
    """What is printed for a command that cannot be meant, on one line."""
    done = call(*args)
    assert done.exit_code == 2, done.output
    return " ".join(done.stderr.replace("│", " ").split())


def saved(folder: Path, name: str = VIT, units: list[str] | None = None) -> PreTrainedModel:
    """A saved model with an image processor's settings beside it; pruned if ``units`` are given."""
    model = make(name)
    if units:
        model = prune(model, PruningPlan.random(model, 0.5, units), stock=False)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    return model
