"""Learning from features: the losses by hand, what is matched with what, trainings without labels, and bad input."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vitprune import (
    DistillationConfig,
    NViTConfig,
    PruningCallback,
    PruningPlan,
    SLSConfig,
    TruncationConfig,
    get_pruning_model,
    prune,
    truncate,
)
from hf_vitprune.errors import InvalidConfigError, InvalidDataError, MissingLabelsError
from hf_vitprune.losses.features import FeatureReader, FeatureTeacher, feature_loss, token_weights
from hf_vitprune.spec.architecture import Architecture
from pruning_runs import VIT, Images, gated, nvit, spvit, state_of, trainer
from tiny import CASES, SIZE, TEXTS, feed, images, make, run

FEATURES = DistillationConfig(kind="features")
COSINE = DistillationConfig(kind="features", loss="cosine")


class Unlabelled(Images):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": super().__getitem__(i)["pixel_values"]}


def hooks(*models: Any) -> int:
    return sum(len(module._forward_hooks) for model in models for module in model.modules())


def pruned(dense: Any, *units: str) -> tuple[Any, PruningPlan]:
    plan = PruningPlan.random(dense, 0.5, units or ("mlp",))
    return prune(dense, plan), plan


def learner(student: Any, dense: Any, folder: Path, config: Any = FEATURES, **changes: Any) -> Any:
    sets = {"train_dataset": Unlabelled(8), "eval_dataset": Unlabelled(4)}
    return trainer(student, folder, teacher=dense, distillation=config, **{**sets, **changes})


# ---------------------------------------------------------------------- the losses, by hand
S = [[[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]], [[2.0, 2.0, -1.0], [5.0, 0.0, 1.0]]]
T = [[[1.0, 3.0, 3.0], [1.0, -2.0, 2.0]], [[2.0, 1.0, 0.0], [4.0, 1.0, 1.0]]]


def by_hand(loss: str) -> list[list[float]]:
    """(images, tokens) errors in plain Python."""

    def normal(x: list[float]) -> list[float]:
        mean = sum(x) / len(x)
        scale = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-6)
        return [(v - mean) / scale for v in x]

    def token(s: list[float], t: list[float]) -> float:
        if loss == "cosine":
            dot, norms = sum(a * b for a, b in zip(s, t, strict=True)), math.hypot(*s) * math.hypot(*t)
            return 1 - dot / norms
        if loss == "normalised":
            return sum((a - b) ** 2 for a, b in zip(normal(s), normal(t), strict=True)) / 3
        columns = [[token[c] for image in T for token in image] for c in range(3)]
        means = [sum(column) / 4 for column in columns]
        spreads = [sum((v - m) ** 2 for v in c) / 4 + 1e-6 for c, m in zip(columns, means, strict=True)]
        return sum((a - b) ** 2 / v for a, b, v in zip(s, t, spreads, strict=True)) / 3

    return [[token(s, t) for s, t in zip(a, b, strict=True)] for a, b in zip(S, T, strict=True)]


@pytest.mark.parametrize("loss", ["cosine", "normalised", "standardised"])
def test_losses_are_those_of_the_documentation(loss: str) -> None:
    student, teacher = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (S, T))
    expected = torch.tensor(by_hand(loss), dtype=torch.float64)
    found = feature_loss(student, teacher, loss)
    torch.testing.assert_close(found, expected.mean(1), rtol=1e-9, atol=0)
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
    weighted = feature_loss(student, teacher, loss, weights)
    torch.testing.assert_close(weighted, expected @ weights, rtol=1e-9, atol=0)
    found.sum().backward()
    assert student.grad is not None and student.grad.abs().sum() > 0 and teacher.grad is None


def test_an_outlier_channel_hides_the_others_from_the_cosine_alone() -> None:
    teacher = torch.randn(4, 6, 16, dtype=torch.float64)
    teacher[..., 0] += 1000
    student = torch.randn_like(teacher)
    student[..., 0] = teacher[..., 0]
    losses = {name: float(feature_loss(student, teacher, name).mean()) for name in ("cosine", "standardised")}
    assert losses["cosine"] < 1e-4 and losses["standardised"] > 1


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = torch.randn(2, 3, 8).half(), torch.randn(2, 3, 8).half()
    found = feature_loss(student, teacher, "cosine")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, feature_loss(student.float(), teacher.float(), "cosine"))


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        (VIT, {}, [0.5] + [0.125] * 4),
        ("DeiTForImageClassification", {}, [0.25] * 2 + [0.125] * 4),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 2}, [0.5, 0, 0] + [0.125] * 4),
        ("SiglipVisionModel", {}, None),
        ("SwinModel", {}, None),
    ],
)
def test_special_tokens_count_as_much_as_all_patches_and_registers_nothing(
    case: str, changes: dict[str, Any], expected: list[float] | None
) -> None:
    found = token_weights(Architecture.of(make(case, **changes)), 4 if expected is None else len(expected), "cpu")  # type: ignore[arg-type]
    assert (found if found is None else found.tolist()) == expected


# ---------------------------------------------------------------------- what is read
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(TEXTS)])
def test_what_leaves_the_tower_is_read_of_every_class(case: str) -> None:
    model = make(case)
    reader = FeatureReader(model)
    run(model, output_hidden_states=True)  # transformers' own hooks come to stay
    before = hooks(model)
    with reader.reading() as states, torch.no_grad():
        output = model(**feed(model, images()), output_hidden_states=True)
    last = getattr(output, "last_hidden_state", None)
    if last is not None and not case.startswith(("CLIP", "VideoMAE")):  # read as the stream is
        assert torch.equal(states[0], last)
    elif "pooler_output" in output:  # CLIP: the norm is over the class token alone
        assert torch.equal(states[0][:, 0], output.pooler_output)
    hidden = states[0]
    assert hidden.ndim == 3 and hidden.shape[-1] == Architecture.of(model).width(-1)
    assert hooks(model) == before


def test_layers_by_number(tmp_path: Path) -> None:
    model = make("ViTModel")
    reader = FeatureReader(model, (1, 3))
    with reader.reading() as states, torch.no_grad():
        hidden = model(pixel_values=images(), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], hidden[1]) and sorted(states) == [1, 3]
    plan = PruningPlan.dense(model).keep_layers([0, 2])
    small = prune(model, plan)
    teacher = FeatureTeacher(model, small, DistillationConfig("features", layers=(1, 3), plan=plan))
    assert teacher.pairs == {1: 1, 3: 2}
    with teacher.reading() as mine, torch.no_grad():
        small(pixel_values=images())
    each = teacher.term(mine, teacher.features(images()))
    assert each.shape == (2,) and torch.equal(mine[1], hidden[1])
    last = FeatureTeacher(model, small, FEATURES)  # needs no plan
    assert last.pairs == {0: 0}


def test_a_backbone_is_matched_where_it_gives_features() -> None:
    dense = make("Dinov2Backbone")
    small, _ = pruned(dense)
    assert FeatureTeacher(dense, small, FEATURES).pairs == {1: 1, 3: 3}


def test_a_narrow_student_is_matched_on_the_channels_that_stay() -> None:
    dense = make("Dinov2Model").double()
    small, plan = pruned(dense, "embedding")
    teacher = FeatureTeacher(dense, small, DistillationConfig("features", plan=plan, loss="cosine"))
    assert plan.embedding is not None
    kept = list(plan.embedding)
    with teacher.reading() as states, torch.no_grad():
        small(pixel_values=images().double())
    each = teacher.term(states, teacher.features(images()))
    mine, theirs = (run(m, images().double())["last_hidden_state"] for m in (small, dense))
    weights = torch.tensor([0.5] + [0.125] * 4, dtype=torch.float64)
    errors = 1 - torch.cosine_similarity(mine, theirs[..., kept], dim=-1)
    torch.testing.assert_close(each, errors @ weights)


# ---------------------------------------------------------------------- trainings
@pytest.mark.parametrize(
    "case", ["ViTModel", "Dinov2Backbone", VIT, "SwinModel", "CLIPVisionModel", "SiglipVisionModel"]
)
def test_a_small_model_learns_without_labels(case: str, tmp_path: Path) -> None:
    dense = make(case)
    small, _ = pruned(dense)
    before, teacher_before = state_of(small), state_of(dense)
    run_ = learner(small, dense, tmp_path, learning_rate=1e-3, max_steps=6, optim="adamw_torch")
    start = run_.evaluate()["eval_loss"]
    there = hooks(small, dense)
    run_.train()
    end = run_.evaluate()["eval_loss"]
    assert end < start and any(not torch.equal(t, before[n]) for n, t in small.state_dict().items())
    assert all(torch.equal(t, teacher_before[n]) for n, t in dense.state_dict().items())
    assert hooks(small, dense) == there


def test_the_reported_loss_is_the_mean_over_images(tmp_path: Path) -> None:
    dense = make("ViTModel")
    small, _ = pruned(dense)
    run_ = learner(small, dense, tmp_path, COSINE, per_device_eval_batch_size=2)
    pixels = torch.stack([Unlabelled(4)[i]["pixel_values"] for i in range(4)])
    mine, theirs = (run(m, pixels)["last_hidden_state"] for m in (small, dense))
    weights = token_weights(Architecture.of(dense), 5, mine.device)
    expected = feature_loss(mine, theirs, "cosine", weights).mean()
    assert run_.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("case", ["ViTModel", VIT])
@pytest.mark.parametrize("labels", [False, True])
def test_micro_batches_add_up(case: str, labels: bool, tmp_path: Path) -> None:
    """Two of two images make the step of one of four, with labels (-100 left out nowhere) and without."""
    dense = make(case)
    ends = []
    data = Images(4) if labels else Unlabelled(4)
    for size, parts in ((4, 1), (2, 2)):
        small, _ = pruned(dense)
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        learner(small, dense, tmp_path, COSINE, max_steps=1, train_dataset=data, **batch).train()
        ends.append(state_of(small))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6)


def test_beside_labels_the_term_is_added(tmp_path: Path) -> None:
    dense = make(VIT)
    small, _ = pruned(dense)
    batch = {"pixel_values": images(4), "labels": torch.tensor([0, 1, 2, 3])}
    run_ = learner(small, dense, tmp_path, DistillationConfig("features", weight=3.0), train_dataset=Images())
    plain = trainer(copy.deepcopy(small), tmp_path)
    small.train(), plain.model.train()
    found, task = (one.compute_loss(one.model, dict(batch)).item() for one in (run_, plain))
    teacher = run_.lessons[0][1]
    with teacher.reading() as states, torch.no_grad():
        small(pixel_values=batch["pixel_values"])
    term = float(teacher.term(states, teacher.features(batch["pixel_values"])).mean())
    assert term > 0.01 and found == pytest.approx(task + term, rel=1e-5)


@pytest.mark.parametrize("make_gated", [gated, nvit, spvit], ids=["vtp", "nvit", "spvit"])
@pytest.mark.parametrize("case", ["ViTModel", VIT])
def test_methods_learn_what_to_prune_without_labels(make_gated: Any, case: str, tmp_path: Path) -> None:
    model = make_gated(case)
    before = state_of(model)
    # AdamW's steps do not shrink with the loss; SPViT's gates would move too little by them
    settings = {"learning_rate": 1e-2, "optim": "sgd" if make_gated is spvit else "adamw_torch"}
    run_ = trainer(model, tmp_path, max_steps=4, train_dataset=Unlabelled(), **settings)
    assert [config.kind for config, _ in run_.lessons] == ["features"]
    run_.train()
    assert any(not torch.equal(t, before[n]) for n, t in state_of(model).items() if n in before)
    small = model.export(compensate="none")
    shapes = [tuple(t.shape) for t in small.state_dict().values()]
    assert shapes != [tuple(t.shape) for t in model.unload().state_dict().values()]
    assert all(bool(t.isfinite().all()) for t in run(small).values())


def test_nvit_scores_the_features_before_anything_is_removed(tmp_path: Path) -> None:
    """Student and teacher are one at first: with noise, a unit that no feature depends on still scores nothing."""
    dense = make("ViTModel")
    with torch.no_grad():
        dense.layers[1].mlp.fc2.weight[:, :24] = 0
    settings = {
        "target": 0.8,
        "units": ("mlp",),
        "group_sizes": {"mlp": 1},
        "interval": 4,
        "eta": 0.0,
        "pruning_share": 1.0,
    }
    model = get_pruning_model(dense, NViTConfig(**settings))
    run_ = trainer(model, tmp_path, max_steps=4, train_dataset=Unlabelled(), learning_rate=0.0)
    run_.train()
    kept = {entry.index: set(entry.mlp or ()) for entry in model.plan().layers}
    assert not kept[1] & set(range(24))


def test_only_bare_models_and_missing_labels_take_the_default(tmp_path: Path) -> None:
    assert not trainer(gated(), tmp_path).lessons
    none = DistillationConfig("none")
    with pytest.raises(MissingLabelsError, match='kind="features"'):
        trainer(gated(), tmp_path, train_dataset=Unlabelled(), distillation=none).train()
    with pytest.raises(MissingLabelsError, match='kind="features"'):
        trainer(make(VIT), tmp_path, train_dataset=Unlabelled()).train()


def test_sls_without_labels_is_refused_before_training_and_truncation_goes_without(tmp_path: Path) -> None:
    sls = get_pruning_model(make(VIT), SLSConfig())
    before = state_of(sls)
    with pytest.raises(InvalidDataError, match="TruncationConfig\\(layers='features'\\)"):
        trainer(sls, tmp_path, train_dataset=Unlabelled()).train()
    assert all(torch.equal(t, before[n]) for n, t in state_of(sls).items())
    model = get_pruning_model(make(VIT), TruncationConfig(layers="features", max_drop=1.0))
    callbacks = [PruningCallback(images=Unlabelled(8))]
    trainer(model, tmp_path, train_dataset=Unlabelled(), callbacks=callbacks).train()
    assert len(model.plan().layers) < 3


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "soft", "layers": (1,)}, "kind 'features'"),
        ({"kind": "features", "layers": ()}, "layers are numbers"),
        ({"kind": "features", "layers": (0,)}, "layers are numbers"),
        ({"kind": "features", "layers": (1, 1)}, "each once"),
        ({"kind": "features", "loss": "euclid"}, "loss is one of"),
        ({"kind": "features", "temperature": 2.0}, "temperature"),
        ({"kind": "features", "plan": "plan.json"}, "PruningPlan"),
        ({"kind": "features", "weight": -1.0}, "weight"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        DistillationConfig(**wrong)


def test_pairs_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    dense = make("ViTModel")
    small, plan = pruned(dense)
    narrow, narrow_plan = pruned(dense, "embedding")
    half = truncate(dense, 2)
    for student, teacher, config, message in (
        (narrow, dense, FEATURES, "nothing says which channels"),
        (narrow, dense, DistillationConfig("features", plan=plan), "not between the two"),
        (small, make("ViTModel", hidden_size=64), FEATURES, "32 channels, the teacher's 64"),
        (half, dense, DistillationConfig("features", layers=(1,)), "2 of the teacher's 3 layers"),
        (half, dense, DistillationConfig("features", layers=(4,)), "there is no 4"),
        (small, dense, DistillationConfig("features", layers=(4,)), "there is no 4"),
        (copy.deepcopy(dense), dense, FEATURES, "not pruned"),
        (dense, dense, FEATURES, "share tensors"),
        (small, None, FEATURES, "needs a teacher"),
    ):
        with pytest.raises(InvalidConfigError, match=message):
            learner(student, teacher, tmp_path, config)
    gone = DistillationConfig("features", layers=(3,), plan=PruningPlan.dense(dense).keep_layers([0, 1]))
    with pytest.raises(InvalidConfigError, match="layer 3 of the teacher is gone"):
        learner(half, dense, tmp_path, gone)
    assert narrow_plan.embedding is not None


def test_masks_drawn_at_random_are_refused_before_training(tmp_path: Path) -> None:
    dense = make("ViTMAEModel")
    small, _ = pruned(dense)
    with pytest.raises(InvalidDataError, match="noise"):
        learner(small, dense, tmp_path).train()
    teacher = FeatureTeacher(dense, small, FEATURES)
    assert teacher.features(**feed(dense, images()))[0].shape[-1] == 32


def test_images_of_another_size_are_refused_before_training(tmp_path: Path) -> None:
    dense = make("ViTModel", image_size=2 * SIZE)
    small, _ = pruned(dense)
    run_ = learner(small, dense, tmp_path)
    with pytest.raises(InvalidDataError, match=r"\(3, 16, 16\) \(its own size is 32\)"):
        run_.train()
