"""SPViT: gates, nesting, cost and decision by numbers worked out by hand."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vitprune import Architecture, SPViTConfig, VTPConfig, count, get_pruning_model
from hf_vitprune.errors import InvalidPlanError
from hf_vitprune.methods.spvit.gates import BinaryGates, MixerGates, NeuronGates, nested
from pruning_runs import DROPOUT, VIT, scatter_scores, spvit
from tiny import SIZE, images, make, relative_error, run, total_loss

SWIN = "SwinForImageClassification"
SWIGLU = "Dinov2ForImageClassification-swiglu"


# ---------------------------------------------------------------------- gates
#: draws -> products, and the gates that get a gradient: not those under a product that is on
NESTED = {
    (1, 1, 1): ((1, 1, 1), (False, False, True)),
    (1, 1, 0): ((1, 1, 0), (False, True, True)),
    (1, 0, 1): ((1, 0, 0), (True, True, True)),
    (1, 0, 0): ((1, 0, 0), (True, True, True)),
    (0, 1, 1): ((0, 0, 0), (True, True, True)),
    (0, 0, 0): ((0, 0, 0), (True, True, True)),
}


@pytest.mark.parametrize("drawn", NESTED)
def test_a_mixer_needs_the_simpler_ones_and_stops_their_gradient(drawn: tuple[int, ...]) -> None:
    products, learning = NESTED[drawn]
    gates = torch.tensor(drawn, dtype=torch.float64, requires_grad=True)
    out = nested(gates, "topmost")
    assert out.tolist() == list(products)
    first, second, third = drawn
    # the products are a, ab, abc; weighed 1, 10, 100
    out.dot(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)).backward()
    expected = [1 + 10 * second + 100 * second * third, 10 * first + 100 * first * third, 100 * first * second]
    assert gates.grad is not None
    assert gates.grad.tolist() == [value * learns for value, learns in zip(expected, learning, strict=True)]


#: draws -> gradients of the three gates for branches that are worth 120.6, 71.4 and 10, under both rules
LEARNED = {
    (1, 1, 1): ((49.2, 49.2, 49.2), (0, 0, 49.2)),
    (1, 1, 0): ((61.4, 61.4, 49.2), (0, 61.4, 49.2)),
    (1, 0, 1): ((10, 61.4 + 110.6, 0), (10, 61.4 + 110.6, 0)),
    (1, 0, 0): ((10, 61.4, 0), (10, 61.4, 0)),
    (0, 1, 1): ((10 + 71.4 + 120.6, 0, 0), (10 + 71.4 + 120.6, 0, 0)),
    (0, 0, 0): ((10, 0, 0), (10, 0, 0)),
}


@pytest.mark.parametrize("drawn", LEARNED)
def test_what_gates_learn_from_the_mixed_output(drawn: tuple[int, ...]) -> None:
    """d/dp3 = 120.6 - 71.4 p2 - 10 p1 (1 - p2), d/dp2 = (71.4 - 10 p1) (1 - p3), d/dp1 = 10 (1 - p2) (1 - p3)."""
    for rule, expected in zip(("shared", "topmost"), LEARNED[drawn], strict=True):
        gates = torch.tensor(drawn, dtype=torch.float64, requires_grad=True)
        simple, middle, attention = nested(gates, rule).unbind()
        mixed = attention * 120.6 + middle * (1 - attention) * 71.4 + simple * (1 - middle) * (1 - attention) * 10
        (gradient,) = torch.autograd.grad(mixed, gates)
        assert gradient.tolist() == pytest.approx(expected, abs=1e-12)


def test_what_gates_learn_from_the_cost() -> None:
    """1 x 1: 2048 multiply-adds, 3 x 3: 8192 more, attention: 11840 more than that; all on."""
    for rule, expected in (("shared", (22080, 20032, 11840)), ("topmost", (0, 0, 11840))):
        model = spvit(gate_gradients=rule).double()
        model.method.cost.expected().backward()
        probability = 1 / (1 + math.exp(-1.5))
        soft = 1 / (1 + math.exp(0.5 - probability))
        slope = soft * (1 - soft) * probability * (1 - probability) / count(model.model).macs
        gradient = model.method.gates["layer1_mixer"].score.grad
        assert gradient.tolist() == pytest.approx([value * slope for value in expected], rel=1e-12)


def test_samples_are_of_the_logistic_relaxation() -> None:
    gates = BinaryGates(20000, torch.device("cpu"))
    gates.temperature = 2.0
    torch.manual_seed(0)
    drawn = gates.sample()
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - 0.8176) < 0.01  # sigmoid(1.5)
    drawn.sum().backward()
    torch.manual_seed(0)
    uniform = torch.rand(20000).clamp(1e-6, 1 - 1e-6)
    relaxed = 1 / (1 + torch.exp(-(1.5 + torch.log(uniform / (1 - uniform))) / 2))
    assert torch.equal(drawn, (relaxed > 0.5).float())
    torch.testing.assert_close(gates.score.grad, relaxed * (1 - relaxed) / 2, rtol=1e-4, atol=1e-6)


def test_the_likelier_value_and_its_gradient() -> None:
    gates = BinaryGates(3, torch.device("cpu"))
    gates.score.data = torch.tensor([-1.0, 0.0, 2.0])
    value = gates.likelier()
    assert value.tolist() == [0.0, 0.0, 1.0]
    value.sum().backward()
    # at 2: P = .880797, sigmoid(P - .5) = .594065; .594065 * .405935 * .880797 * .119203
    assert gates.score.grad is not None
    assert gates.score.grad[2].item() == pytest.approx(0.0253194, rel=1e-4)
    # at 0: .25 * .25
    assert gates.score.grad[1].item() == pytest.approx(0.0625)


def test_levels_and_counts() -> None:
    mixer = MixerGates(torch.device("cpu"))
    for scores, level in (([1, 1, 1], 3), ([1, 1, -1], 2), ([1, -1, 1], 1), ([-1, 1, 1], 0), ([1, 0, 1], 1)):
        mixer.score.data = torch.tensor(scores, dtype=torch.float32)
        assert mixer.level() == level
    mixer.score.data = torch.tensor([0.5, 0.3, 0.2])
    assert [mixer.level(threshold) for threshold in (0.1, 0.2, 0.4, 0.5)] == [3, 2, 1, 0]
    mixer.decide_level(2)
    mixer.score.data.fill_(-1)
    assert mixer.level() == 2

    neurons = NeuronGates(10, torch.device("cpu"), round_to=4)
    neurons.score.data = torch.tensor([1.0, -1, 3, 2, -2, 4, -3, -4, -5, -6])
    assert neurons.count() == 4 and neurons.on().nonzero().flatten().tolist() == [0, 2, 3, 5]
    neurons.score.data[0] = -0.5  # three on: rounded up, the likeliest of the rest joins
    assert neurons.on().nonzero().flatten().tolist() == [0, 2, 3, 5]
    assert neurons.count(3.5) == 0 and not neurons.on(3.5).any()
    neurons.score.data.fill_(1.0)
    assert neurons.count() == 10  # all stay all


# ---------------------------------------------------------------------- the mixer
def literal(search: Any, drawn: torch.Tensor, attended: Any, tokens: Any, grid: Any) -> torch.Tensor:
    """The nested sum with every branch computed; the convolutions as the sums over kernel positions that they are."""
    a, b, c = nested(drawn, search.gradients).unbind()
    special = search.special
    heads = len(search.branches.table)
    v = search.attention.v(tokens[:, special:]).unflatten(-1, (heads, -1))
    v = v - search.attention.v.bias.view(heads, -1)
    around = torch.nn.functional.pad(v.unflatten(1, grid), (0, 0, 0, 0, 1, 1, 1, 1))
    shares = (search.branches.table / search.branches.temperature).softmax(0)
    o = search.attention.o.weight.unflatten(1, (heads, -1))
    outputs = []
    for kind, positions in (("conv3x3", range(9)), ("conv1x1", [4])):
        hidden, back = 0, 0
        for j in positions:
            down, across = j % 3, j // 3
            shifted = around[:, down : down + grid[0], across : across + grid[1]]
            hidden = hidden + torch.einsum("h,byxhc->byxc", shares[:, j], shifted)
            hidden = hidden + shares[:, j] @ search.attention.v.bias.view(heads, -1)
            back = back + torch.einsum("h,dhc->dc", shares[:, j], o)
        norm = copy.deepcopy(search.branches.kernel_norm[kind])
        mixed = norm(hidden.permute(0, 3, 1, 2)).relu().flatten(2).transpose(1, 2)
        out = torch.nn.functional.linear(mixed, back, search.attention.o.bias)
        outputs.append(torch.cat([tokens[:, :special], out], 1))
    return c * attended + b * (1 - c) * outputs[0] + a * (1 - b) * (1 - c) * outputs[1]


@pytest.mark.parametrize("rule", ["shared", "topmost"])
@pytest.mark.parametrize("case", ["ViTForImageClassification", "DeiTForImageClassification"])
def test_the_searched_mixer_is_the_nested_sum(case: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of gates, table and weights, for every draw: branches that are left out take no part."""
    model = spvit(case, gate_gradients=rule).double().train()
    search = model.method.searches[1]
    tokens = torch.randn(2, search.special + 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = [search.attention.v.weight, search.attention.o.weight, search.attention.v.bias, search.branches.table]
    for bits in itertools.product((0.0, 1.0), repeat=3):
        results = []
        for ours in (True, False):
            drawn = torch.tensor(bits, dtype=torch.float64, requires_grad=True)
            monkeypatch.setattr(search.gates, "sample", lambda drawn=drawn: drawn)
            # stands for what attention makes of the values
            attended = search.attention.o(search.attention.v(tokens).tanh())
            inputs = (attended, tokens, (2, 3))
            out = search.mix(*inputs) if ours else literal(search, drawn, *inputs)
            grads = torch.autograd.grad(out.sin().sum(), [drawn, *parameters], allow_unused=True)
            results.append([out.detach(), *(torch.zeros(1) if g is None else g for g in grads)])
        for mine, expected in zip(*results, strict=True):
            torch.testing.assert_close(mine.expand_as(expected).double(), expected.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [VIT, "Dinov2WithRegistersForImageClassification", SWIN])
def test_any_image_size_and_checkpointing(case: str, tmp_path: Path) -> None:
    """Grids that are not square, in training too; a second forward pass of a layer draws and counts nothing anew."""
    pixels = images(3, (SIZE, 2 * SIZE)).double()
    known = {} if case == SWIN else {"interpolate_pos_encoding": True}
    if case.startswith("Dinov2"):
        known = {}
    ends = []
    for checkpointed in (False, True):
        model = spvit(case, DROPOUT).double().train()
        if checkpointed:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        loss = model(pixel_values=pixels, **known).logits.sin().sum()
        loss.backward()
        ends.append(([p.grad for p in model.parameters()], [b.clone() for b in model.method.buffers()]))
    for plain, again in zip(*ends[0:2], strict=True):
        for a, b in zip(plain, again, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12))
    scatter_scores(model).eval()
    small = model.export()
    assert relative_error(run(model, pixels, **known)["logits"], run(small, pixels, **known)["logits"]) < 1e-9


def test_a_model_that_was_pruned_before(tmp_path: Path) -> None:
    """Attention that reads some channels, with other sizes a layer: convolutions read the same channels."""
    once = scatter_scores(get_pruning_model(make(VIT), VTPConfig(pruning_ratio=0.3, round_to=4))).eval().export()
    model = get_pruning_model(once, SPViTConfig(target=0.95)).eval()
    for search in model.method.searches.values():
        search.gates.score.data = torch.tensor([1.0, 1.0, -1.0])
    small = model.export()
    assert {shape.mixer for shape in Architecture.of(small).layers} == {"conv3x3"}
    assert {shape.conv_channels for shape in Architecture.of(small).layers} != {8}
    assert relative_error(run(model)["logits"], run(small)["logits"]) < 1e-5


def test_mixed_precision_and_no_gradient() -> None:
    model = spvit().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = total_loss(model)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert run(model)["logits"].isfinite().all()
    half = get_pruning_model(make(VIT).bfloat16(), SPViTConfig(target=0.7))
    total_loss(half, images().bfloat16()).backward()
    small = scatter_scores(half).eval().export()
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    pixels = images().bfloat16()
    assert relative_error(run(half, pixels)["logits"].float(), run(small, pixels)["logits"].float()) < 0.05


# ---------------------------------------------------------------------- cost
def test_cost_of_a_layer_by_hand() -> None:
    """d = 32, 4 heads of 8, 2 x 2 patches, 5 tokens, 48 neurons, 3 layers."""
    model = spvit()
    cost = model.method.cost
    unit = count(make(VIT)).macs
    attention = 4 * 5 * 32**2 + 2 * 32 * 5**2
    steps = (torch.tensor([2 * 32 * 8 * 4, 8 * 32 * 8 * 4, 0]) / unit).tolist()  # 1 x 1; 3 x 3 has 10 d d_h HW in all
    steps[2] = attention / unit - steps[0] - steps[1]
    for level in range(4):
        saved = attention / unit - sum(steps[:level])
        assert cost.at([level, 3, 3], [48] * 3) == pytest.approx(1 - saved)
    assert cost.at([3] * 3, [47, 48, 48]) == pytest.approx(1 - 2 * 32 * 5 / unit)
    assert cost.lowest == pytest.approx(1 - 3 * (attention + 2 * 32 * 48 * 5) / unit)


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("case", [VIT, SWIN, SWIGLU, "SiglipForImageClassification"])
def test_expected_cost_is_the_count(case: str, metric: str) -> None:
    model = spvit(case, target=0.97, target_metric=metric, round_to=1)
    dense = getattr(count(model.model), metric)
    for seed in range(4):
        scatter_scores(model, seed)
        method = model.method
        now = getattr(count(method.choose().architecture), metric)
        assert method.cost.expected().item() == pytest.approx(now / dense, rel=1e-12)
        counts = [columns.gates.count() for columns in method._columns.values()]
        levels = [search.gates.level() for search in method.searches.values()]
        assert method.cost.at(levels, counts) == pytest.approx(now / dense, rel=1e-12)


def test_the_penalty_in_both_forms() -> None:
    """And its gradient: an attention that is on is asked about, not the convolutions below it."""
    for settings in ({"target": 0.6, "cost_weight": 3.0}, {"target_gmacs": 1e-4, "target": None, "cost_weight": 2e6}):
        model = spvit(**{**settings, "cost_warmup": 0.5, "gate_gradients": "topmost"})
        macs = count(model.model).macs
        goal = 0.6 * macs if settings["target"] else 1e5
        difference = (macs - goal) / macs if settings["target"] else (macs - goal) / 1e9
        for progress, ramp in ((0.1, 0.2), (0.5, 1.0), (1.0, 1.0)):
            expected = settings["cost_weight"] * ramp * difference**2
            assert model.method.before_step(None, progress, 1.0).item() == pytest.approx(expected, rel=1e-6)
        model.method.before_step(None, 1.0, 1.0).backward()
        for name, gate in model.method.gates.items():
            moved = (gate.score.grad > 0).tolist()
            assert moved == ([False, False, True] if name.endswith("mixer") else [True] * 48)


# ---------------------------------------------------------------------- decision
def test_what_is_over_the_target_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_vitprune.methods.spvit.method.logger.warning", said.append)
    model = spvit(target=0.5, round_to=1).eval()
    generator = torch.Generator().manual_seed(0)
    for gate in model.method.gates.values():
        gate.score.data = torch.rand(gate.score.shape, generator=generator) + 0.1  # all on
    model.decide()
    plan = model.plan()
    ratio = count(plan.architecture).macs / count(model.model).macs
    assert len(said) == 1 and 0.48 < ratio <= 0.5
    # it is a threshold: nothing that went was likelier than anything that stayed
    gates = [g for g in model.method.gates.values() if isinstance(g, NeuronGates)]
    gone = max(g.score[~g.kept].max() for g in gates if not g.kept.all())
    assert all((g.score[g.kept] > gone).all() for g in gates)
    assert relative_error(run(model)["logits"], run(model.export())["logits"]) < 1e-5


def test_what_is_little_over_the_target_goes_from_the_mlps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vitprune.methods.spvit.method.logger.warning", lambda _: pytest.fail("nothing to say"))
    monkeypatch.setattr("hf_vitprune.methods.spvit.method.TOLERANCE", 0.1)
    model = spvit(target=0.7, round_to=1).eval()
    method = model.method
    generator = torch.Generator().manual_seed(0)
    for search in method.searches.values():
        search.gates.score.data = torch.full((3,), 0.01)  # the least likely of all
    for columns in method._columns.values():
        columns.gates.score.data = torch.rand(48, generator=generator) - 0.82
    assert 0.7 < method.cost.expected() < 0.77
    model.decide()
    assert [entry.mixer for entry in model.plan().layers] == ["attention"] * 3
    assert 0.69 < count(model.plan().architecture).macs / count(model.model).macs <= 0.7


def test_a_soft_target_is_not_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the paper's searches, which end above it: every gate that is likelier on stays."""
    monkeypatch.setattr("hf_vitprune.methods.spvit.method.logger.warning", lambda _: pytest.fail("nothing to say"))
    model = spvit(target=0.5, round_to=1, enforce_target=False).eval()
    generator = torch.Generator().manual_seed(0)
    for gate in model.method.gates.values():
        gate.score.data = torch.rand(gate.score.shape, generator=generator) + 0.1
    model.method.gates["layer0_neurons"].score.data[3] = -0.1
    assert [len(entry.mlp) for entry in model.plan().layers] == [47, 48, 48]
    assert count(model.plan().architecture).macs / count(model.model).macs > 0.98
    assert "switched gates off" in model.method.reference()


def test_an_mlp_without_neurons_and_a_layer_without_anything() -> None:
    model = spvit(target=0.9).eval()
    model.method.gates["layer1_mixer"].score.data.fill_(-1.0)
    model.method.gates["layer1_neurons"].score.data.fill_(-1.0)
    before = run(model)
    small = model.export()
    shape = Architecture.of(small).layers[1]
    assert (shape.mixer, shape.mlp) == ("none", 0)
    assert relative_error(before["logits"], run(small)["logits"]) < 1e-5


def test_export_from_other_weights() -> None:
    """The found architecture on the weights from before the search, or on any of the same shape."""
    model = scatter_scores(spvit(target=0.9), seed=3).eval()
    assert {layer.mixer for layer in model.plan().layers} & {"conv3x3", "conv1x1"}
    small, same = model.export(), model.export(weights=model.model)
    assert relative_error(run(small)["logits"], run(same)["logits"]) == 0
    other = make(VIT, seed=9)
    tuned = model.export(weights=other)
    assert Architecture.of(tuned) == Architecture.of(small)
    assert torch.equal(tuned.classifier.weight, other.classifier.weight)
    i, mixer = next((i, e.mixer) for i, e in enumerate(model.plan().layers) if e.mixer.startswith("conv"))
    assert not torch.equal(tuned.vit.layers[i].attention.conv.weight, small.vit.layers[i].attention.conv.weight)
    # the same as if the search had been over these weights
    searched = copy.deepcopy(model)
    searched.model.load_state_dict(other.state_dict())
    assert relative_error(run(searched)["logits"], run(tuned)["logits"]) < 1e-5
    with pytest.raises(InvalidPlanError, match="another shape"):
        model.export(weights=make(VIT, num_hidden_layers=2))
