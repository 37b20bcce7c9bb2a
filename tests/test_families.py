"""Families: a user's own, and what the built-in ones promise."""

from __future__ import annotations

import pytest
from torch import nn

from hf_vitprune.errors import UnsupportedModelError
from hf_vitprune.families import add_family, all_families, family_of
from hf_vitprune.families.vit import ViTFamily
from hf_vitprune.modeling import register_family
from hf_vitprune.spec.architecture import Architecture
from tiny import CASES, CLASSIFIERS, make, run_python

#: ViTMSN has ViT's layers under another name: one line makes it prunable, saveable and countable
OWN_FAMILY = """
import tempfile, torch, transformers
from transformers import AutoModelForImageClassification, IJepaConfig, IJepaModel
from transformers import ViTMSNConfig, ViTMSNForImageClassification
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from hf_vitprune.cost import count
from hf_vitprune.families.vit import ViTFamily
from hf_vitprune.modeling import register_family
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from tiny import WITH_MLP, assert_same, relative_error, reset_weights, run

class IJepaFamily(ViTFamily):
    # no CLS token, no pooler: only what differs is said
    def outer_parts(self, config, width, task, grid):
        parts = [
            self.patch_part(config, width, grid),
            self.table_part("positions", self.positions(config), width),
            self.table_part("final norm", 2, width),
        ]
        if task == "ForImageClassification":
            parts.append(self.linear_part("classifier", width, config.num_labels))
        return parts

register_family(ViTFamily(model_type="vit_msn", root="vit"))
register_family(IJepaFamily(model_type="ijepa", root="ijepa", extra_tokens=0))

models = {
    "ViTMSN": ViTMSNForImageClassification(ViTMSNConfig(**WITH_MLP, num_labels=5)),
    "IJepa": IJepaModel(IJepaConfig(**WITH_MLP), add_pooling_layer=False),
}
for name, model in models.items():
    reset_weights(model).eval()
    plan = PruningPlan.random(model, 0.4)
    small = prune(model, plan, stock=False)
    assert type(small).__name__ == f"Pruned{type(model).__name__}"
    assert relative_error(next(iter(run(prune(model, plan)).values())), next(iter(run(small).values()))) < 1e-5
    ours, full = run(small), run(mask(model, plan))
    first = next(iter(ours))
    expected = full[first] if first == "logits" else full[first][..., list(plan.embedding)]
    assert relative_error(ours[first], expected) < 1e-5
    cost = count(small)
    assert cost.params == sum(p.numel() for p in small.parameters())
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        assert_same(run(type(small).from_pretrained(folder).eval()), ours)
        if name == "ViTMSN":
            auto = AutoModelForImageClassification.from_pretrained(folder)
            assert_same(run(auto), ours)
print("registered")
"""


def test_registering_ones_own_family() -> None:
    assert run_python(OWN_FAMILY) == "registered\n"


def test_a_model_type_is_registered_once() -> None:
    for register in (add_family, register_family):
        with pytest.raises(ValueError, match="'vit' is registered already"):
            register(ViTFamily(model_type="vit", root="vit"))
    assert len(all_families()) == 9


@pytest.mark.parametrize("case", CASES)
def test_paths_lead_to_the_parts(case: str) -> None:
    model = make(case)
    architecture = Architecture.of(model)
    family = architecture.family
    prefix = family.encoder_path(model)
    for i, name in enumerate(architecture.layer_names()):
        paths = family.layer_paths(prefix, name, architecture.config)
        shape, width = architecture.layers[i], architecture.width(i)
        sizes = {path: model.get_submodule(path) for path in (paths.q, paths.k, paths.v, *paths.fc1)}
        assert all(isinstance(module, nn.Linear) and module.in_features == width for module in sizes.values())
        assert sizes[paths.q].out_features == shape.heads * shape.qk_dim
        assert model.get_submodule(paths.o).out_features == model.get_submodule(paths.fc2).out_features == width
        assert model.get_submodule(paths.fc2).in_features == shape.mlp
        for norm in (paths.norm1, paths.norm2):
            assert isinstance(model.get_submodule(norm), nn.LayerNorm)
    for norm in family.norms:
        assert isinstance(model.get_submodule(prefix + norm), nn.LayerNorm)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_family_of_models_and_configs(case: str) -> None:
    model = make(case)
    assert family_of(model) is family_of(model.config)
    assert Architecture.of(model).is_dense


def test_refusal_lists_what_is_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="clip, .*dinov2, .*swin, vit"):
        family_of(nn.Linear(1, 1))
