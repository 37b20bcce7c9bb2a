"""A pruning run that was killed and resumed ends like one that was not; a wrong checkpoint is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer

import killed_run
from hf_vitprune import PruningCallback, PruningTrainer, VTPConfig, get_pruning_model
from hf_vitprune.errors import ResumeError
from processes import run_python
from pruning_runs import VIT, gated, lora_model, scatter_scores, state_of, trainer
from tiny import assert_same, make, run


@pytest.mark.parametrize(
    "names", [("lora", "spvit"), pytest.param(("vit", "nvit", "decided"), marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_never_killed(names: tuple[str, ...], tmp_path: Path) -> None:
    """Bit for bit: weights, gates, masks, and the plan; with dropout, accumulation, schedules, a teacher, and LoRA.

    Several runs a test, since they die in one other process: starting it is slow. The quick ones are VTP with LoRA
    and SPViT.
    """
    ends = run_python("import runpy; runpy.run_module('killed_run', run_name='__main__')", str(tmp_path), *names)
    assert [line for line in ends.splitlines() if line.endswith(" 9")] == [f"{name} 9" for name in names]
    for name in names:
        check_resumed(name, tmp_path, tmp_path / "whole")


def check_resumed(name: str, killed: Path, tmp_path: Path) -> None:
    _, step, _ = killed_run.KILLED[name]
    whole = killed_run.training(name, tmp_path, save_strategy="no")
    start = state_of(whole.model)
    whole.train()

    saved = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in (killed / name).iterdir())
    assert saved == list(range(1, step + 1)) and step < killed_run.STEPS
    torch.manual_seed(99)  # the process that resumes has another past
    again = killed_run.training(name, killed)
    again.train(resume_from_checkpoint=True)

    assert again.state.global_step == whole.state.global_step == killed_run.STEPS
    assert_same(again.model.state_dict(), state_of(whole.model))
    assert again.model.plan() == whole.model.plan()
    assert again.model.method.decided
    moved = {key for key, tensor in start.items() if not torch.equal(tensor, whole.model.state_dict()[key])}
    assert any("classifier" in key for key in moved)
    if name == "nvit":
        steps = [moment.step for moment in again.model.method.moments()]
        assert set(steps) == {0, 2, 4, 6} and steps == [m.step for m in whole.model.method.moments()]
    else:
        assert any(key.endswith("score") for key in moved)
        assert any(key.endswith(("mask", "kept")) for key in moved) == (name != "decided")
    assert_same(run(again.model.export().eval()), run(whole.model.export().eval()))


def test_the_last_checkpoint_is_resumed_into_the_same_decision(tmp_path: Path) -> None:
    """Killed between the last step and the end: what is left is the decision."""
    settings = {"save_strategy": "steps", "max_steps": 2}
    whole = trainer(gated(sparsity_weight=0.01), tmp_path, **settings)
    whole.train()
    again = trainer(gated(sparsity_weight=0.01), tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.model.state_dict(), state_of(whole.model))
    assert again.model.method.decided and again.model.plan() == whole.model.plan()


@pytest.mark.parametrize("binarize", [False, True])
def test_a_decision_is_saved_and_loaded(binarize: bool) -> None:
    first = scatter_scores(gated(binarize=binarize)).eval()
    first.decide()
    second = gated(binarize=binarize).eval()
    assert not second.method.decided
    second.load_state_dict(first.state_dict())
    assert second.method.decided and second.plan() == first.plan()
    assert_same(run(second), run(first))


@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
def test_load_best_model_at_end(kind: type[Trainer], tmp_path: Path) -> None:
    """The decision is the best checkpoint's, and is taken after it was loaded."""
    run_ = trainer(
        gated(sparsity_weight=0.01), tmp_path, kind=kind, callbacks=[PruningCallback()], max_steps=4,
        learning_rate=3.0, save_strategy="steps", eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    run_.train()
    best = Path(run_.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    expected = gated(sparsity_weight=0.01)
    expected.load_state_dict(load_file(best / "model.safetensors"))
    assert not expected.method.decided
    expected.decide()
    assert_same(run_.model.state_dict(), state_of(expected))
    assert run_.model.plan() == expected.plan()


def test_adapters_that_share_tensors_can_be_resumed(tmp_path: Path) -> None:
    """VeRA's layers share two frozen matrices, which safetensors does not save twice."""

    def model() -> Any:
        torch.manual_seed(0)
        peft_model = get_peft_model(make(VIT), VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        return get_pruning_model(peft_model, VTPConfig(pruning_ratio=0.4, round_to=4))

    settings = {"save_strategy": "steps", "max_steps": 2}
    whole, again = (trainer(model(), tmp_path, **settings) for _ in range(2))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(again.model.state_dict(), state_of(whole.model))
    again.model.load_state_dict(whole.model.state_dict(), strict=True)


# ---------------------------------------------------------------------- wrong checkpoints
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(gated(), folder, save_strategy="steps", max_steps=1).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: gated(pruning_ratio=0.3), r"pruning_ratio was 0\.4 and is 0\.3"),
        (lambda: gated(target=0.5), r"pruning_ratio was 0\.4 and is None; target was None and is 0\.5"),
        (lambda: gated(uneven=True, sparsity_weight=1.0), "sparsity_weight was 0.0001 and is 1.0; uneven was False"),
        (lambda: gated(points=["mlp_in"]), "points was .*attention_in.* and is .*mlp_in"),
        (lambda: gated(target_modules=r"\.0$"), "target_modules was None and is"),
        (lambda: gated(VIT, {"num_hidden_layers": 2}), "model was vit of 3 layers .* and is vit of 2 layers"),
        (lambda: gated(VIT, {"intermediate_size": 40}), "model was vit of 3 layers .* and is vit of 3 layers"),
        (lambda: gated("DeiTForImageClassification"), "model was vit of .* and is deit of"),
        (
            lambda: get_pruning_model(lora_model(), VTPConfig(pruning_ratio=0.4, round_to=4)),
            "modules_to_save.* missing",
        ),
    ],
)
def test_another_runs_checkpoint_is_refused_whole(
    make_model: Any, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = make_model()
    before = state_of(model)
    with pytest.raises(ResumeError, match=message):
        trainer(model, tmp_path, max_steps=2).train(resume_from_checkpoint=str(checkpoint))
    assert_same(model.state_dict(), before)


def test_a_checkpoint_of_the_bare_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trainer(make(VIT), tmp_path, save_strategy="steps", max_steps=1).train()
    for state in (load_file(tmp_path / "checkpoint-1" / "model.safetensors"), {}):
        with pytest.raises(ResumeError, match="no checkpoint of the PruningModel"):
            gated().load_state_dict(state, strict=False)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("model.classifier.weight")
    with pytest.raises(ResumeError, match=r"model\.classifier\.weight missing"):
        gated().load_state_dict(tensors, strict=False)


def test_a_gated_checkpoint_is_no_checkpoint_of_the_bare_model(checkpoint: Path, tmp_path: Path) -> None:
    """The other way round, in PruningTrainer: nothing of it fits, which is no resume either."""
    with pytest.raises(ResumeError):
        trainer(make(VIT), tmp_path, max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_a_sound_checkpoint_is_loaded_inside_another_module(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    outer = torch.nn.Sequential(gated())
    outer.load_state_dict({f"0.{name}": tensor for name, tensor in tensors.items()})
    assert_same(outer[0].state_dict(), tensors)
    save_file(outer[0].state_dict(), tmp_path / "again.safetensors")
    assert_same(load_file(tmp_path / "again.safetensors"), tensors)
