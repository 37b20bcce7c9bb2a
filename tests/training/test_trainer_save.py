"""What is saved after a training, what is loaded as the best, and models that a Trainer makes itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModel
from transformers import AutoModelForImageClassification, Trainer, ViTImageProcessor
from transformers.trainer_utils import HPSearchBackend

from hf_vitprune import (
    DistillationConfig,
    PruningCallback,
    PruningTrainer,
    SPViTConfig,
    TruncationConfig,
    VTPConfig,
    get_pruning_model,
)
from hf_vitprune.errors import AdapterError, InvalidConfigError, UnsupportedModelError
from hf_vitprune.methods import Stage
from pruning_runs import VIT, Patterns, arguments, gated, lora_model, nvit, state_of, trainer
from tiny import assert_same, make, run


# ---------------------------------------------------------------------- saving
@pytest.mark.parametrize("again", [False, True])
def test_save_model_after_the_decision_writes_the_small_model(again: bool, tmp_path: Path) -> None:
    run_ = trainer(gated(sparsity_weight=0.01), tmp_path, processing_class=ViTImageProcessor())
    for _ in range(1 + again):
        run_.train()
    run_.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pth"))}
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    small = run_.model.export().eval()
    assert type(loaded) is type(small)
    assert_same(loaded.state_dict(), dict(small.state_dict()))
    run_.model.save_pretrained(tmp_path / "direct")
    assert_same(AutoModelForImageClassification.from_pretrained(tmp_path / "direct").state_dict(), loaded.state_dict())


@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
def test_checkpoints_stay_what_resume_needs(kind: type[Trainer], tmp_path: Path) -> None:
    """Of the run that decides and of one that goes on after it."""
    model = gated(sparsity_weight=0.01)
    callbacks = [PruningCallback()]
    run_ = trainer(model, tmp_path, kind=kind, callbacks=callbacks, save_strategy="steps")
    run_.save_model(str(tmp_path / "start"))
    assert not (tmp_path / "start" / "config.json").exists()
    run_.train()
    run_.train()
    again = trainer(gated(sparsity_weight=0.01), tmp_path / "other", kind=kind, callbacks=[PruningCallback()])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(again.model.state_dict(), state_of(model))


def test_save_model_with_adapters_writes_them_and_their_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = get_pruning_model(lora_model(dropout=False), VTPConfig(pruning_ratio=0.4, round_to=4))
    run_ = trainer(model, tmp_path / "run")
    run_.train()
    for folder, save in (("a", run_.save_model), ("b", model.save_pretrained)):
        save(str(tmp_path / folder))
        loaded = AutoPeftModel.from_pretrained(tmp_path / folder).eval()
        assert_same(run(loaded), run(model.export().eval()))
    with pytest.raises(AdapterError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "c", max_shard_size="1GB")
    pushed: list[Any] = []
    monkeypatch.setattr("hf_vitprune.training.model.upload", lambda small, repo, **_: pushed.append((small, repo)))
    model.push_to_hub("someone/something")
    assert pushed[0][1] == "someone/something"
    assert_same(run(pushed[0][0].eval()), run(model.export().eval()))


def test_nothing_is_saved_before_the_decision(tmp_path: Path) -> None:
    model = gated()
    for saving in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(UnsupportedModelError, match="nothing is decided yet"):
            saving(str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_plain_trainer_says_how_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_vitprune.training.callback.logger.warning", said.append)
    run_ = trainer(gated(), tmp_path, kind=Trainer, callbacks=[PruningCallback()])
    run_.train()
    assert any("trainer.model.save_pretrained(folder)" in line for line in said)
    run_.model.save_pretrained(tmp_path)  # the cure
    assert_same(run(AutoModelForImageClassification.from_pretrained(tmp_path).eval()), run(run_.model.export().eval()))
    said.clear()
    trainer(gated(), tmp_path).train()
    assert not said


# ---------------------------------------------------------------------- load_best_model_at_end
def best(value: list[float]) -> Any:
    """Metrics of the evaluations in their order."""
    numbers = iter(value)
    return lambda _: {"accuracy": next(numbers)}


@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
def test_best_is_chosen_among_models_at_the_target(kind: type[Trainer], tmp_path: Path) -> None:
    """NViT is on its target after step 3 of 6: what was better before has more units."""
    run_ = trainer(
        nvit(target=0.6), tmp_path, kind=kind, callbacks=[PruningCallback()], max_steps=6, learning_rate=0.01,
        train_dataset=Patterns(), save_strategy="steps", eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy", greater_is_better=True,
        compute_metrics=best([0.9, 0.8, 0.3, 0.5, 0.4, 0.2]),
    )  # fmt: skip
    run_.train()
    assert Path(run_.state.best_model_checkpoint).name == "checkpoint-4" and run_.state.best_metric == 0.5
    moments = run_.model.method.moments()
    assert run_.model.method.reached and {m.step for m in moments} == {0, 1, 2, 3}
    assert run_.model.method._step == 4


def test_a_search_is_on_its_target_where_its_cost_is() -> None:
    method = get_pruning_model(make(VIT), SPViTConfig(target=0.7, round_to=1)).method
    assert method.stage == Stage.REMOVING
    for name, gates in method.gates.items():
        gates.score.data.fill_(-1.0 if name.endswith("neurons") else 1.0)
    assert method.stage == Stage.REMOVING  # far under it
    method.target = method._cost_now() * 1.01
    assert method.stage == Stage.ON_TARGET


@pytest.mark.parametrize("config", [lambda: VTPConfig(target=0.6), lambda: TruncationConfig(layers=2)])
def test_methods_that_decide_at_the_end_take_the_best_of_all(config: Any, tmp_path: Path) -> None:
    model = get_pruning_model(make(VIT), config())
    run_ = trainer(
        model, tmp_path, max_steps=3, save_strategy="steps", eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy", greater_is_better=True,
        compute_metrics=best([0.2, 0.9, 0.3]),
    )  # fmt: skip
    run_.train()
    assert Path(run_.state.best_model_checkpoint).name == "checkpoint-2" and model.method.decided


# ---------------------------------------------------------------------- model_init
@pytest.mark.parametrize("make_model", [lambda: gated(sparsity_weight=0.01, gate_learning_rate=0.5), lambda: nvit()])
def test_model_init_gives_what_model_gives(make_model: Any, tmp_path: Path) -> None:
    settings = {"train_dataset": Patterns(140), "distillation": DistillationConfig("soft")}
    first = trainer(make_model(), tmp_path, **settings)
    second = trainer(None, tmp_path, model_init=make_model, **settings)
    first.train()
    second.train()
    assert second.model.compensate == first.model.compensate == "auto"
    assert_same(second.model.state_dict(), state_of(first.model))
    assert_same(dict(second.model.export().state_dict()), dict(first.model.export().state_dict()))
    groups = [[len(g["params"]) for g in t.optimizer.param_groups] for t in (first, second)]
    rates = [[g["lr"] for g in t.optimizer.param_groups] for t in (first, second)]
    assert groups[0] == groups[1] and rates[0] == rates[1]
    callbacks = [[type(c) for c in t.callback_handler.callbacks] for t in (first, second)]
    assert callbacks[0] == callbacks[1] and callbacks[0].count(PruningCallback) == 1


def test_model_init_resumes_exactly(tmp_path: Path) -> None:
    whole = trainer(None, tmp_path / "a", model_init=lambda: make(VIT), save_strategy="steps")
    whole.train()
    again = trainer(None, tmp_path / "b", model_init=lambda: make(VIT))
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert_same(again.model.state_dict(), state_of(whole.model))


def test_model_init_without_a_teacher_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="needs a teacher"):
        trainer(None, tmp_path, model_init=lambda: make(VIT), distillation=DistillationConfig())


@pytest.mark.parametrize("evaluates", ["no", "steps"])
def test_a_search_over_settings_compares_pruned_models(
    evaluates: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial makes its model of its own settings; its objective is of the model after the decision."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: {})  # no search library is needed

    def model_init(trial: SimpleNamespace | None) -> Any:
        return get_pruning_model(make(VIT), VTPConfig(target=0.7 if trial is None else trial.target, round_to=4))

    run_ = PruningTrainer(
        args=arguments(tmp_path, eval_strategy=evaluates, eval_steps=1),
        train_dataset=Patterns(),
        eval_dataset=Patterns(8),
        model_init=model_init,
    )
    run_.hp_search_backend, run_.hp_space = HPSearchBackend.OPTUNA, lambda trial: {}
    run_.hp_name, run_.compute_objective = None, lambda metrics: metrics["eval_loss"]
    run_._report_to_hp_search = lambda trial, step, metrics: setattr(run_, "objective", metrics["eval_loss"])
    for target in (0.6, 0.8):
        run_.objective = None
        run_._hp_search_setup = lambda trial: None
        run_.train(trial=SimpleNamespace(number=0, target=target))
        assert run_.model.plan().info["target"] == target
        assert run_.objective is None  # the backend evaluates what is left
