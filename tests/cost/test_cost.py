"""Closed-form parameters and multiply-adds against counts of what is stored and executed, and published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, ViTConfig

from benchmarks.published_spvit import DENSE, PUBLISHED, published, unfolded_params
from hf_vitprune.cost import count
from hf_vitprune.cost.closed_form import cost_parts, removed_macs
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.modeling import build
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.spec.architecture import Architecture
from plans import PLANS, plan_named
from quick import mostly_slow
from tiny import CASES, CLASSIFIERS, WITH_GRID, feed, hybrid, images, make

aten = torch.ops.aten
#: parameters that are two-dimensional or more without being weight matrices
NO_WEIGHTS = ("token", "position", "pos_embed", "probe", "logit_scale")
#: sees as many tubes as its mask says, which its config does not
MASKED_BY_ARGUMENT = "VideoMAEForPreTraining"


class CountMatmuls(TorchDispatchMode):
    """Multiply-adds of every matrix product and convolution that is executed."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in (aten.mm, aten.bmm):
            self.macs += out.numel() * args[0].shape[-1]
        elif packet in (aten.addmm, aten.baddbmm):
            self.macs += out.numel() * args[1].shape[-1]
        elif packet is aten.convolution:
            transposed = args[6]  # every input goes into so many outputs, not the reverse
            self.macs += (args[0] if transposed else out).numel() * args[1][0].numel()
        else:
            name = packet.__name__.replace("bilinear", "")  # interpolation of positions
            assert not any(word in name for word in ("attention", "linear", "matmul", "conv")), name
        return out


@contextmanager
def counted_matmuls() -> Iterator[CountMatmuls]:
    """Counts below autograd, with attention as plain matrix products (fused kernels cannot be counted)."""
    with sdpa_kernel(SDPBackend.MATH), CountMatmuls() as counter:
        yield counter


def executed_macs(model: PreTrainedModel, size: int | tuple[int, int] = 16) -> int:
    model.set_attn_implementation("eager")
    kwargs = {}
    if size != 16 and CASES_BY_CLASS[type(model).__name__.removeprefix("Pruned")] not in ("Swin", "Dinov2"):
        kwargs["interpolate_pos_encoding"] = True
    with counted_matmuls() as counter:
        model(**feed(model, images(1, size)), **kwargs)
    return counter.macs


CASES_BY_CLASS = {
    case.model_class: "Dinov2" if case.family.startswith("Dinov2") else case.family for case in CASES.values()
}


@pytest.mark.parametrize(
    ("case", "plan_name"),
    [
        *((case, None) for case in CASES),
        *mostly_slow((case, plan) for case in CASES for plan in ("everything", "removed branches")),
    ],
)
def test_counts_are_exact(case: str, plan_name: str | None) -> None:
    model = make(case)
    if plan_name is not None:
        model = prune(model, plan_named(plan_name, model))
    cost = count(model)
    assert cost.params == sum(p.numel() for p in model.parameters())
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and not any(w in n for w in NO_WEIGHTS)]
    assert cost.weight_params == sum(p.numel() for _, p in matrices)
    if case != MASKED_BY_ARGUMENT:
        assert cost.macs == executed_macs(model)
    assert count(Architecture.of(model)) == cost


@pytest.mark.parametrize("case", WITH_GRID)
def test_counts_of_other_mixers_are_exact(case: str) -> None:
    model = hybrid(case)
    cost = count(model)
    assert cost.params == sum(p.numel() for p in model.parameters())
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and not any(w in n for w in NO_WEIGHTS)]
    assert cost.weight_params == sum(p.numel() for _, p in matrices)
    assert cost.macs == executed_macs(model)


@pytest.mark.parametrize("plan_name", sorted(set(PLANS) - {"everything", "removed branches"}))
def test_counts_of_every_cut(plan_name: str) -> None:
    model = make("ViTForImageClassification")
    small = prune(model, plan_named(plan_name, model))
    assert count(small).params == sum(p.numel() for p in small.parameters())
    assert count(small).macs == executed_macs(small)


@pytest.mark.parametrize("case", CLASSIFIERS)
@pytest.mark.parametrize("size", [(32, 16), 24])
def test_counts_at_other_image_sizes(case: str, size: int | tuple[int, int]) -> None:
    model = make(case)
    small = prune(model, PruningPlan.random(model, 0.4))
    for counted in (small, hybrid(case)):
        assert count(counted, image_size=size).macs == executed_macs(counted, size)
    assert count(small, image_size=size).params == count(small).params


@pytest.mark.parametrize("size", [13, 20, (18, 26)])
@pytest.mark.parametrize("window", [2, 3])
def test_swin_counts_padded_windows(size: int | tuple[int, int], window: int) -> None:
    model = make("SwinForImageClassification", window_size=window)
    mixed = hybrid("SwinForImageClassification", window_size=window)
    for counted in (model, prune(model, PruningPlan.random(model, 0.4)), mixed):
        assert count(counted, image_size=size).macs == executed_macs(counted, size)


@pytest.mark.parametrize("name", ["Data2VecVisionForSemanticSegmentation", "VitPoseBackbone"])
def test_images_of_another_size_than_a_model_takes_are_refused(name: str) -> None:
    with pytest.raises(InvalidConfigError, match="takes images of 16 x 16 only: leave image_size out"):
        count(make(name), image_size=32)
    assert count(make(name), image_size=16) == count(make(name))


def test_parts_add_up_and_name_every_layer() -> None:
    model = make("ViTForImageClassification")
    parts = cost_parts(model)
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.macs for part in parts) == count(model).macs
    assert {f"layer {i} {what}" for i in range(3) for what in ("attention", "mlp")} <= {part.name for part in parts}


@pytest.mark.parametrize(
    ("width", "heads", "weights", "macs"),
    [(768, 12, 86.29e6, 17.564e9), (384, 6, 21.91e6, 4.599e9), (192, 3, 5.648e6, 1.2537e9)],
    ids=["DeiT-B", "DeiT-S", "DeiT-Ti"],
)
def test_published_numbers_of_dense_models(width: int, heads: int, weights: float, macs: float) -> None:
    config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)
    cost = count(Architecture.dense(config))
    assert cost.weight_params == pytest.approx(weights, rel=5e-4)
    assert cost.macs == pytest.approx(macs, rel=5e-4)


def test_published_numbers_of_a_mixed_shape() -> None:
    """A shape found by a published global search over ViT-B/16: every layer has its own heads, q/k, v and MLP."""
    heads = [2, 4, 4, 10, 10, 10, 6, 10, 12, 6, 8, 10]
    qk = [8, 24, 40, 48, 56, 56, 48, 48, 56, 32, 24, 40]
    v = [8, 64, 48, 64, 64, 64, 64, 64, 64, 64, 56, 64]
    mlp = [944, 800, 1440, 2240, 2432, 2384, 2448, 2496, 1840, 1488, 1184, 1056]
    rows = [
        dict(zip(("heads", "qk_dim", "v_dim", "mlp"), row, strict=True)) for row in zip(heads, qk, v, mlp, strict=True)
    ]
    cost = count(Architecture.from_layers(ViTConfig(num_labels=1000), rows, hidden_size=544))
    assert cost.weight_params == pytest.approx(34.14e6, rel=5e-4)
    assert cost.macs == pytest.approx(6.997e9, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "folded", "unfolded", "macs"),
    [
        ("SPViT-DeiT-Ti", 4.77e6, 4.87e6, 1.039e9),
        ("SPViT-DeiT-S", 15.87e6, 16.12e6, 3.353e9),
        ("SPViT-DeiT-B", 41.58e6, 46.21e6, 8.409e9),
        ("SPViT-DeiT-B-10G", 58.32e6, 62.26e6, 11.764e9),
        ("SPViT-Swin-Ti", 26.23e6, 26.31e6, 3.330e9),
        ("SPViT-Swin-S", 38.92e6, 39.21e6, 6.138e9),
        ("SPViT-Swin-B", 67.54e6, 68.03e6, 11.385e9),
    ],
)
def test_published_numbers_of_convolution_shapes(name: str, folded: float, unfolded: float, macs: float) -> None:
    architecture = published(name)
    with torch.device("meta"):
        model = build(DENSE[name], architecture)
    cost = count(model)
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert cost.params == pytest.approx(folded, rel=2e-3)
    assert unfolded_params(architecture) == pytest.approx(unfolded, rel=2e-3)
    assert cost.macs == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize(
    "size", ["224", 0, -1, 22.4, True, (32,), (32, 32, 3), [32, "32"], {"height": 32, "width": 32}]
)
def test_image_sizes_that_are_none(size: Any) -> None:
    model = make("ViTForImageClassification")
    for call in (lambda: count(model, size), lambda: ClosedFormMeter("macs", Architecture.of(model), size)):
        with pytest.raises(InvalidConfigError, match="image_size is a number of pixels or"):
            call()


#: shares of the multiply-adds that are gone of attention and of MLPs, and attention's part of what is gone
SHARES = {
    "SPViT-DeiT-Ti": (0.148, 0.196, 0.364),
    "SPViT-DeiT-S": (0.078, 0.398, 0.109),
    "SPViT-DeiT-B": (0.377, 0.608, 0.259),
    "SPViT-DeiT-B-10G": (0.309, 0.346, 0.335),
    "SPViT-Swin-Ti": (0.342, 0.230, 0.450),
    "SPViT-Swin-S": (0.252, 0.333, 0.291),
    "SPViT-Swin-B": (0.210, 0.299, 0.272),
}


def test_shares_of_attention_and_mlps_in_the_published_shapes() -> None:
    assert SHARES.keys() == PUBLISHED.keys()
    for name, shares in SHARES.items():
        assert list(removed_macs(published(name)).values()) == pytest.approx(shares, abs=6e-4)
    # by hand for the MLPs of DeiT-S: 11100 of 18432 neurons are left
    hidden = PUBLISHED["SPViT-DeiT-S"]["mlp_hidden"]
    assert sum(hidden) == 11100 and 0.3974 < 1 - 11100 / 18432 < 0.3986


def test_statements_about_the_published_shapes() -> None:
    """Of the paper's figure 3: what its text says, as far as the shapes show it."""
    for name, row in PUBLISHED.items():
        stages = row["mixer"] if "Swin" in name else [row["mixer"]]
        hidden = row["mlp_hidden"] if "Swin" in name else [row["mlp_hidden"]]
        assert stages[-1][-2:] == ["attention", "attention"]
        if "Swin" in name:  # the first MLP of a stage is wider than its last
            assert [s for s, stage in enumerate(hidden) if stage[0] < stage[-1]] == [0] * (name == "SPViT-Swin-S")
        elif name != "SPViT-DeiT-B-10G":  # the last MLP loses most
            assert min(hidden[0]) == hidden[0][-1]


def test_images_smaller_than_a_patch() -> None:
    with pytest.raises(InvalidConfigError, match="an image of 7 x 32 pixels holds no patch of a vit"):
        count(make("ViTForImageClassification"), (7, 32))
