"""What must hold for every method and every family: what was trained with gates is what is exported, without trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_vitprune import (
    Architecture,
    NViTConfig,
    PruningModel,
    PruningPlan,
    SLSConfig,
    SPViTConfig,
    TruncationConfig,
    VTPConfig,
    count,
    get_pruning_model,
    mask,
)
from hf_vitprune.errors import UnsupportedModelError, UnsupportedUnitError
from hf_vitprune.utils.batches import ImageBatches
from plans import aligned
from pruning_runs import SMALL_GROUPS, VIT, Patterns, scatter_scores, score_tensors, state_of, trainer
from quick import FEW, mostly_slow
from tiny import CASES, CLASSIFIERS, NECKS, NO_GRID, TEXTS, assert_same, images, make, relative_error, run, total_loss

#: one line a configuration: name -> config
METHODS: dict[str, Callable[[], Any]] = {
    "VTP": lambda: VTPConfig(pruning_ratio=0.4, round_to=4),
    "VTP target": lambda: VTPConfig(target=0.6, round_to=2),
    "VTP uneven": lambda: VTPConfig(pruning_ratio=0.4, uneven=True, round_to=2),
    "VTP binarize": lambda: VTPConfig(pruning_ratio=0.4, binarize=True, round_to=4),
    "VTP two points": lambda: VTPConfig(pruning_ratio=0.4, points=["mlp_hidden", "attention_out"], round_to=2),
    "SLS": lambda: SLSConfig(alpha=0.01, iterations=250, perplexity=3.0),
    "Truncation": lambda: TruncationConfig(target=0.9),
    "NViT": lambda: NViTConfig(target=0.5, group_sizes=SMALL_GROUPS),
    "NViT by importance alone": lambda: NViTConfig(target=0.5, group_sizes=SMALL_GROUPS, eta=0),
    "NViT reference": lambda: NViTConfig(target=0.5, target_metric="params", group_sizes=SMALL_GROUPS, reference=True),
    "SPViT": lambda: SPViTConfig(target=0.9, round_to=4),
    "SPViT multi-path": lambda: SPViTConfig(target=0.4, target_metric="params", round_to=1, single_path=False),
    "NViT heads and qk": lambda: NViTConfig(target=0.8, group_sizes=SMALL_GROUPS, units=["heads", "qk"]),
}
FIRST = [name for name in METHODS if " " not in name]
#: methods with scores that learn
GATED = [name for name in METHODS if name.startswith("VTP")]
#: methods whose gates are evaluated at their likelier value
SEARCHED = [name for name in METHODS if name.startswith("SPViT")]
#: methods that remove layers from the top: nothing of a backbone that gives the last layer's output
DEPTH = ["SLS", "Truncation"]
SOME_CUT = ("SwinBackbone", "Swinv2Backbone")
UNCUT = [name for name in CASES if name.partition("-")[0].endswith("Backbone") and name not in SOME_CUT]
#: what is refused at the door: no grid for convolutions, no v channels to remove, no images to look at
REFUSED = {
    "SPViT": NO_GRID,
    "VTP": ("Swinv2",),
    "SLS": ("VideoMAE", "Siglip2", "ViTMAE"),
}
#: every configuration on one classifier a family, the first of a method on every other class
PAIRS = [
    (case, method)
    for case in CASES
    for method in (METHODS if case in CLASSIFIERS else FIRST)
    if not (case in UNCUT and method in DEPTH)
    and not (case in NECKS and method != "VTP")
    and not case.startswith((*TEXTS, *REFUSED.get(method, ())))  # images are what they learn from here
]
AT_THE_DOOR = [(case, method) for method, kinds in REFUSED.items() for case in CASES if case.startswith(kinds)]
SOME = [(case, method) for case in CLASSIFIERS for method in FIRST]


def wrap(model: Any, method: str) -> PruningModel:
    """A PruningModel with the images of a training."""
    made = get_pruning_model(model, METHODS[method]())
    made.training_images = ImageBatches(Patterns())
    made.compensate = "none"
    return made


def wrapped(case: str, method: str) -> PruningModel:
    """A PruningModel in eval mode with scores as after a training."""
    return scatter_scores(wrap(make(case), method)).eval()


def errors(full: dict[str, torch.Tensor], small: dict[str, torch.Tensor], plan: PruningPlan) -> float:
    """Largest relative difference; of removed residual channels the small model has nothing to compare."""
    assert full.keys() == small.keys() and full
    return max(relative_error(theirs, ours) for _, ours, theirs in aligned(small, full, plan))


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *mostly_slow(pair for pair in PAIRS if pair[1] in FIRST),
        *mostly_slow((pair for pair in PAIRS if pair[1] not in FIRST), FEW),
    ],
)
def test_gated_equals_exported_equals_masked(case: str, method: str) -> None:
    model = wrapped(case, method)
    undecided = run(model)
    small = model.export()  # takes the decision
    outputs, plan = run(small), model.plan()
    assert errors(run(model), outputs, plan) < 1e-5
    assert errors(run(mask(model.model, plan)), outputs, plan) < 1e-5
    # the cut units mattered; gates of SPViT that are off take no part before the decision either
    assert errors(run(make(case)) if method in SEARCHED else undecided, outputs, plan) > 1e-3
    assert Architecture.of(small) == plan.architecture
    assert count(small).macs < count(model.model).macs

    restored = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert restored == plan and restored.info == json.loads(json.dumps(plan.info))


@pytest.mark.parametrize("case", NECKS)
def test_features_of_every_layer_are_masked_where_a_neck_reads_them(case: str) -> None:
    model = get_pruning_model(make(case), NViTConfig(target=0.96, group_sizes=SMALL_GROUPS, eta=0))
    scatter_scores(model).eval()
    before, small = run(model), model.export()
    plan = model.plan()
    assert plan.embedding is not None
    assert errors(run(model), run(small), plan) < 1e-5
    assert errors(run(mask(model.model, plan)), run(small), plan) < 1e-5
    assert errors(before, run(small), plan) > 1e-3


@pytest.mark.parametrize(("case", "method"), AT_THE_DOOR)
def test_what_a_method_cannot_do_is_refused_at_once(case: str, method: str) -> None:
    with pytest.raises((UnsupportedModelError, UnsupportedUnitError)) as caught:
        get_pruning_model(make(case), METHODS[method]())
    assert make(case).config.model_type.split("_")[0] in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "method"), [(case, method) for case in CLASSIFIERS for method in GATED])
@pytest.mark.parametrize("seed", range(10))
def test_gated_equals_exported_for_any_scores(case: str, method: str, seed: int) -> None:
    """Scores of any size, many of them zero or tiny: whole sets and heads fall under the threshold."""
    model = wrapped(case, method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for score in score_tensors(model):
            spread = 10 ** (-4 * torch.rand((), generator=generator))
            kept = torch.rand(score.shape, generator=generator) < torch.rand((), generator=generator)
            score.copy_(torch.randn(score.shape, generator=generator) * spread * kept)
    small = model.double().export()
    pixels = images().double()
    assert errors(run(model, pixels), run(small, pixels), model.plan()) < 1e-10
    assert errors(run(mask(model.model, model.plan()), pixels), run(small, pixels), model.plan()) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith(("SLS", "Truncation"))])
def test_models_of_any_precision(method: str, dtype: torch.dtype) -> None:
    """Wrapped in their precision they train a step, and export in it."""
    model = wrap(make(VIT).to(dtype), method)
    total_loss(model.train(), images().to(dtype)).backward()
    scatter_scores(model.eval())
    small = model.export()
    assert all(t.dtype == dtype for t in small.state_dict().values() if t.is_floating_point())
    pixels = images().to(dtype)
    limit = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-12}[dtype]
    assert errors(run(model, pixels), run(small, pixels), model.plan()) < limit


@pytest.mark.parametrize(("case", "method"), mostly_slow(SOME, FEW))
def test_a_decision_is_final(case: str, method: str) -> None:
    """Fine-tuning with masks changes weights and scores, not the choice; the export follows."""
    model = wrapped(case, method)
    plan = model.plan()
    scatter_scores(model, seed=2)
    with torch.no_grad():
        for score in score_tensors(model):
            score[::3] = 0.0  # a kept score may become zero, and an unkept one larger than it
    later = model.plan()
    assert kept_units(later) == kept_units(plan)
    model.decide()
    assert model.plan() == later
    assert errors(run(model), run(model.export()), plan) < 1e-5


def kept_units(plan: PruningPlan) -> list[Any]:
    return [{k: v for k, v in layer.items() if k != "scales"} for layer in plan.to_dict()["layers"]]


@pytest.mark.parametrize(("case", "method"), mostly_slow(pair for pair in PAIRS if pair[1] in FIRST))
def test_unload_leaves_no_trace(case: str, method: str) -> None:
    model = make(case)
    run(model)  # transformers notes in a model that it has run
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # of a segmentation head: training moves its statistics
            module.momentum = 0.0
    model.train()
    before, shape = state_of(model), trace(model)
    model.eval()
    outputs = run(model)
    gated = wrap(model.train(), method)
    assert trace(model) != shape
    assert_same(run(gated.eval()), outputs)  # scores start at one
    gated.train()
    total_loss(gated).backward()
    scatter_scores(gated).decide()
    gated.export()
    model.zero_grad()
    assert gated.unload() is model
    assert gated.unload() is model  # twice is as good as once
    assert trace(model) == shape
    counters = {name: tensor for name, tensor in state_of(model).items() if name.endswith("num_batches_tracked")}
    assert_same(model.state_dict(), {**before, **counters})
    assert_same(run(model.eval()), outputs)


def trace(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    """Everything that wrapping could leave behind in a module."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return [
        (name, type(module), sorted(module.__dict__), *(len(getattr(module, h)) for h in hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize(("case", "method"), mostly_slow(SOME, FEW))
def test_exported_model_is_saved_and_trained_like_any_other(case: str, method: str, tmp_path: Path) -> None:
    small = wrapped(case, method).export()
    small.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(small)
    assert_same(loaded.state_dict(), dict(small.state_dict()))
    assert_same(run(loaded), run(small))

    assert all(parameter.requires_grad for parameter in small.parameters())
    loss = total_loss(small.train())
    loss.backward()
    torch.optim.SGD(small.parameters(), lr=1e-4).step()
    assert total_loss(small) < loss


@pytest.mark.parametrize(
    ("case", "method"), mostly_slow((p for p in SOME if p[1] != "SLS"), FEW)
)  # which leaves one layer
def test_an_exported_model_can_be_pruned_again(case: str, method: str) -> None:
    once = wrapped(case, method).export()
    again = scatter_scores(wrap(once, method), seed=3).eval()
    twice = again.export()
    assert errors(run(again), run(twice), again.plan()) < 1e-5
    assert errors(run(mask(once, again.plan())), run(twice), again.plan()) < 1e-5
    assert count(twice).macs < count(once).macs


@pytest.mark.parametrize(("case", "method"), [pair for pair in SOME if pair[1] in GATED])
def test_every_gate_learns(case: str, method: str) -> None:
    """The gradient is the plain product's: that of a model whose output is differentiated without our Function."""
    model = wrapped(case, method).double()
    pixels = images().double()
    total_loss(model, pixels).backward()  # in eval mode a gate is an ordinary product
    expected = [score.grad.clone() for score in model.method.gate_parameters()]
    assert all((grad != 0).any() for grad in expected)
    model.zero_grad()
    total_loss(model.train(), pixels).backward()
    for score, grad in zip(model.method.gate_parameters(), expected, strict=True):
        assert relative_error(score.grad, grad) < 1e-9


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith(("SLS", "Truncation"))])
def test_everything_moves_with_the_model(method: str) -> None:
    """A Trainer moves the model after it was wrapped: a tensor that stays behind fails on a GPU only."""
    model = wrapped(VIT, method)
    moved = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()

    def left_behind(value: Any, path: str) -> list[str]:
        if id(value) in seen:
            return []
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            return [] if id(value) in moved else [path]
        if isinstance(value, (list, tuple)):
            return [name for i, item in enumerate(value) for name in left_behind(item, f"{path}[{i}]")]
        if isinstance(value, dict):
            return [name for key, item in value.items() for name in left_behind(item, f"{path}.{key}")]
        ours = type(value).__module__.startswith("hf_vitprune") or isinstance(value, torch.nn.Module)
        return left_behind(vars(value), path) if ours and hasattr(value, "__dict__") else []

    assert left_behind(model.method, "method") == []


@pytest.mark.parametrize("method", FIRST)
def test_a_copy_has_gates_of_its_own(method: str) -> None:
    model = wrapped(VIT, method)
    outputs = run(model)
    other = copy.deepcopy(model)
    assert_same(run(other), outputs)
    scatter_scores(model, seed=4).decide()
    assert_same(run(other), outputs)
    other.unload()
    assert_same(run(other), run(make(VIT)))
    assert relative_error(run(model)["logits"], outputs["logits"]) > 1e-3


@pytest.mark.parametrize("method", FIRST)
def test_seeds_make_runs_reproducible(method: str, tmp_path: Path) -> None:
    ends = []
    for seed in (0, 0, 1):
        model = get_pruning_model(make(VIT, hidden_dropout_prob=0.1), METHODS[method]())
        trainer(model, tmp_path, seed=seed, train_dataset=Patterns()).train()
        ends.append((state_of(model), model.plan()))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert any(not torch.equal(tensor, ends[2][0][name]) for name, tensor in ends[0][0].items())
