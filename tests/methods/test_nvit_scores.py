"""NViT's scores: the sums behind them are exact, whatever the batches, processes, precision, and frozen weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from transformers import DeiTConfig, Trainer

from hf_vitprune import Architecture, NViTConfig, PruningCallback, get_pruning_model
from hf_vitprune.errors import InvalidConfigError, MissingGradientsError
from hf_vitprune.methods.nvit.groups import GroupedSet, grouped_sets
from hf_vitprune.methods.nvit.scores import ActivationSums, RunningScores, WeightSums, divisors
from hf_vitprune.modeling.peft_twin import merged_twin
from hf_vitprune.modeling.structure import layer_paths
from pruning_runs import DROPOUT, SMALL_GROUPS, VIT, Images, lora_model, nvit, state_of, trainer
from tiny import CLASSIFIERS, images, make, relative_error, total_loss

DOUBLE = torch.float64
TWO_HEADS = "DeiTForImageClassificationWithTeacher"
FAMILIES = [*CLASSIFIERS, TWO_HEADS]


def sums_of(model: Any, config: NViTConfig | None = None) -> tuple[Architecture, tuple[GroupedSet, ...], torch.Tensor]:
    """A model after one backward pass in double precision, and its Taylor sums."""
    model.double()
    architecture = Architecture.of(model)
    sets = grouped_sets(architecture, config or NViTConfig(target=0.5, group_sizes=SMALL_GROUPS))
    total_loss(model, images().double()).backward()
    return architecture, sets, WeightSums(model, architecture, sets).take(1.0)


def row_sums(linear: Any) -> torch.Tensor:
    sums = (linear.weight * linear.weight.grad).flatten(1).sum(1)
    return sums if linear.bias is None else sums + linear.bias * linear.bias.grad


# ---------------------------------------------------------------------- identities, in double precision
@pytest.mark.parametrize("case", FAMILIES)
def test_identities_of_attention(case: str) -> None:
    """q and k agree channel by channel, v and the columns behind it too, and a key bias does nothing."""
    model = make(case)
    architecture, sets, sums = sums_of(model)
    scored = {(one.layer, one.unit): sums[one.places] for one in sets}
    for i, (paths, shape) in enumerate(zip(layer_paths(model, architecture), architecture.layers, strict=True)):
        q, k, v, o = (model.get_submodule(path) for path in (paths.q, paths.k, paths.v, paths.o))

        def channels(values: torch.Tensor, heads: int = shape.heads) -> torch.Tensor:
            return values.view(heads, -1).sum(0)

        assert relative_error(scored[i, "qk"], channels(row_sums(k))) < 1e-9
        columns = (o.weight * o.weight.grad).sum(0)
        assert relative_error(scored[i, "v"], channels(columns)) < 1e-9
        heads = (row_sums(q) + row_sums(k) + row_sums(v)).view(shape.heads, -1).sum(1)
        assert relative_error(scored[i, "heads"], heads) < 1e-12
        if k.bias is not None:
            assert k.bias.grad.abs().max() < 1e-9 * k.weight.grad.abs().max()


class Factor:
    """Multiplies what comes out of a module by a parameter of ones."""

    def __init__(self, ones: torch.Tensor, repeats: int = 1) -> None:
        self.ones, self.repeats = ones, repeats

    def __call__(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * self.ones.repeat_interleave(self.repeats)


@pytest.mark.parametrize("case", FAMILIES)
def test_sums_are_gradients_of_masks(case: str) -> None:
    """That is what first order means: how the loss begins to change as the unit's outputs shrink."""
    model = make(case)
    architecture, sets, sums = sums_of(model)
    masks: dict[tuple[int | None, str], torch.Tensor] = {}
    for i, (paths, shape) in enumerate(zip(layer_paths(model, architecture), architecture.layers, strict=True)):
        places = {"heads": (paths.q, paths.k, paths.v), "mlp": paths.fc1}
        for kind, size, repeats in (("heads", shape.heads, shape.qk_dim), ("mlp", shape.mlp, 1)):
            masks[i, kind] = torch.ones(size, dtype=DOUBLE, requires_grad=True)
            for path in places[kind]:
                model.get_submodule(path).register_forward_hook(Factor(masks[i, kind], repeats))
    total_loss(model, images().double()).backward()
    for one in sets:
        if (one.layer, one.unit) in masks:
            assert relative_error(sums[one.places], masks[one.layer, one.unit].grad) < 1e-9


@pytest.mark.parametrize("case", [name for name in FAMILIES if not name.startswith("Swin")])
def test_the_embeddings_sum_is_over_the_tensors_of_the_page(case: str) -> None:
    model = make(case)
    architecture, sets, sums = sums_of(model)
    expected = row_sums(model.get_submodule(architecture.family.patch_path(model)))
    for paths in layer_paths(model, architecture):
        for path in (paths.q, paths.k, paths.v, *paths.fc1):
            linear = model.get_submodule(path)
            expected = expected + (linear.weight * linear.weight.grad).sum(0)
        expected = expected + row_sums(model.get_submodule(paths.o)) + row_sums(model.get_submodule(paths.fc2))
    assert sets[0].unit == "embedding" and relative_error(sums[sets[0].places], expected) < 1e-12


@pytest.mark.parametrize("case", FAMILIES)
def test_activations_give_the_same_sums_as_weights(case: str) -> None:
    model = make(case).double()
    architecture = Architecture.of(model)
    sets = grouped_sets(architecture, NViTConfig(target=0.5, group_sizes=SMALL_GROUPS))
    weights, activations = (kind(model, architecture, sets) for kind in (WeightSums, ActivationSums))
    activations.attach(model)
    for seed in (1, 2):  # two micro-batches
        total_loss(model, images(seed=seed).double()).backward()
    assert relative_error(activations.take(1.0), weights.take(1.0)) < 1e-12


def test_swin_has_no_embedding_and_a_part_can_be_asked_for() -> None:
    swin = make("SwinForImageClassification")
    assert "embedding" not in {one.unit for one in sums_of(swin)[1]}
    everything, only = make(VIT), make(VIT)
    _, sets, sums = sums_of(everything)
    config = NViTConfig(target=0.9, group_sizes=SMALL_GROUPS, units=["v", "mlp"])
    _, few, part = sums_of(only, config)
    assert {one.unit for one in few} == {"v", "mlp"}
    whole = {(one.layer, one.unit): sums[one.places] for one in sets}
    torch.testing.assert_close(part, torch.cat([whole[one.layer, one.unit] for one in few]))


def test_divisors() -> None:
    deit = Architecture.dense(DeiTConfig(num_hidden_layers=4))
    swiglu = Architecture.of(make("Dinov2ForImageClassification-swiglu"))
    for architecture, embedding, mlp in ((deit, 4.0, 1.0), (swiglu, 3.0, 2.0)):
        sets = grouped_sets(architecture, NViTConfig(target=0.5, group_sizes=SMALL_GROUPS))
        for reference, expected in (
            (False, {"embedding": embedding, "heads": 6.0, "qk": 2.0, "v": 2.0, "mlp": mlp}),
            (True, {"embedding": 12.0, "heads": 12.0, "qk": 2.0, "v": 2.0, "mlp": 1.0}),
        ):
            table = divisors(architecture, sets, reference)
            for one in sets:
                assert set(table[one.places].tolist()) == {expected[one.unit]}


# ---------------------------------------------------------------------- over time
def test_moving_average() -> None:
    """Two prune steps of two updates each, and one update more; by hand, with momentum 0.9."""
    windows = [[1.0, 3.0], [5.0, 5.0], [4.0]]
    default = [2.0, (0.9 * 0.2 + 0.1 * 5) / (1 - 0.9**2), (0.9 * 0.68 + 0.1 * 4) / (1 - 0.9**3)]
    reference = [2.0, 0.1 * 5, 0.9 * 0.5 + 0.1 * 4]
    for published, expected in ((False, default), (True, reference)):
        scores = RunningScores(2, 0.9, published, torch.device("cpu"))
        assert scores.empty
        for window, value in zip(windows, expected, strict=True):
            for score in window:
                scores.add(torch.tensor([score, 2 * score]))
            torch.testing.assert_close(scores.current(), torch.tensor([value, 2 * value]))
            scores.roll()
            torch.testing.assert_close(scores.current(), torch.tensor([value, 2 * value]))  # nothing new since


def test_scores_that_are_not_finite_count_as_nothing_and_are_reported() -> None:
    model = nvit()
    model.method.scores.add(torch.full_like(model.method.scores.window, 1.0))
    broken = torch.full_like(model.method.scores.window, 3.0)
    broken[5], broken[7] = torch.nan, torch.inf
    model.method.scores.add(broken)
    current = model.method.scores.current()
    assert current[5] == current[7] == 0.5 and current[6] == 2.0
    assert model.method.logs()["scores_not_finite"] == 2


# ---------------------------------------------------------------------- in training
def scored(folder: Path, model: Any = None, kind: type[Trainer] | None = None, **changes: Any) -> torch.Tensor:
    """The scores of one update of eight images, in double precision."""
    model = nvit().double() if model is None else model
    data = {"train_dataset": Images(8, DOUBLE), "max_steps": 1, "per_device_train_batch_size": 8}
    extra = {"kind": kind, "callbacks": [PruningCallback()]} if kind else {}
    trainer(model, folder, **{**data, **extra, **changes}).train()
    assert model.method.scores.prune_steps == 1
    return model.method.scores.current()


def test_scores_are_those_of_the_whole_unclipped_batch(tmp_path: Path) -> None:
    expected = scored(tmp_path)
    assert (expected > 0).any()
    for changes in (
        {"max_grad_norm": 1e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"kind": Trainer},
        {"activation_checkpointing": True},
    ):
        assert relative_error(scored(tmp_path, **changes), expected) < 1e-9, changes
    plain = nvit(criterion="taylor").double()
    assert relative_error(scored(tmp_path, plain), expected.sqrt()) < 1e-9


def test_scores_under_bf16_autocast(tmp_path: Path) -> None:
    exact = scored(tmp_path, nvit(), train_dataset=Images(8))
    rough = scored(tmp_path, nvit(), train_dataset=Images(8), bf16=True)
    for one in nvit().method.sets:
        ours, theirs = rough[one.places].sqrt(), exact[one.places].sqrt()
        assert not torch.equal(ours, theirs)
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98, one


def test_a_plain_trainer_must_not_clip(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="clips them first.*max_grad_norm=0"):
        scored(tmp_path, kind=Trainer, max_grad_norm=1.0)


class DropsGradients(torch.optim.SGD):
    """As optimizers do that step inside the backward pass."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def test_dropped_gradients_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingGradientsError, match="no gradient when the optimizer is about to step.*backward pass"):
        scored(tmp_path, optimizer_cls_and_kwargs=(DropsGradients, {"lr": 0.1}))
    model = nvit().double()
    model.model.vit.layers[1].mlp.fc1.weight.requires_grad_(False)
    with pytest.raises(MissingGradientsError, match=r"layers\.1\.mlp\.fc1\.weight.*wrap the model again"):
        scored(tmp_path, model)
    with pytest.raises(MissingGradientsError, match="no gradients were scored yet"):
        nvit().decide()


# ---------------------------------------------------------------------- frozen weights
def ia3_model() -> Any:
    model = get_peft_model(
        make(VIT), IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"])
    )
    for name, parameter in model.named_parameters():
        if "ia3_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("make_model", [lora_model, lambda: lora_model(use_dora=True), ia3_model])
def test_adapters_score_like_the_model_they_are_merged_into(make_model: Any) -> None:
    torch.manual_seed(0)
    model = make_model().eval().double()
    wrapped = get_pruning_model(model, NViTConfig(target=0.5, group_sizes=SMALL_GROUPS))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    total_loss(wrapped, images().double()).backward()
    actual = wrapped.method._sums.take(1.0)
    assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not any(model.get_parameter(name).grad is not None for name in frozen)
    merged = copy.deepcopy(merged_twin(model)).requires_grad_()
    assert relative_error(actual, sums_of(merged)[2]) < 1e-9


def test_lora_is_pruned_while_it_trains(tmp_path: Path) -> None:
    model = lora_model()
    before = state_of(model)
    wrapped = get_pruning_model(model, NViTConfig(target=0.6, group_sizes=SMALL_GROUPS))
    trainer(wrapped, tmp_path, max_steps=4, gradient_accumulation_steps=2).train()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)  # the base is as it was
    assert wrapped.method.reached and wrapped.method.scores.prune_steps == 2
    small = wrapped.eval().export()
    pixels = images()
    assert relative_error(small(pixel_values=pixels).logits, wrapped(pixel_values=pixels).logits) < 1e-5


def test_partly_frozen_models_are_scored_too(tmp_path: Path) -> None:
    model = make(VIT, **DROPOUT)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name or "layers.2" in name)
    wrapped = get_pruning_model(model, NViTConfig(target=0.5, group_sizes=SMALL_GROUPS))
    trainer(wrapped, tmp_path).train()
    assert isinstance(wrapped.method._sums, ActivationSums)
    scores = wrapped.method.scores.current()
    assert all((scores[one.places] > 0).any() for one in wrapped.method.sets)


def test_fp16_scales_what_frozen_weights_are_scored_by(tmp_path: Path) -> None:
    wrapped = get_pruning_model(lora_model(), NViTConfig(target=0.5, group_sizes=SMALL_GROUPS))
    args = trainer(wrapped, tmp_path).args
    args.fp16 = True
    with pytest.raises(InvalidConfigError, match="fp16 scales.*bf16"):
        wrapped.method.check_training(args, 100)
    nvit().method.check_training(args, 100)
