"""Families: a user's own, and what the built-in ones promise."""

from __future__ import annotations

import pytest
from torch import nn

from hf_vitprune.errors import UnsupportedModelError
from hf_vitprune.families import add_family, all_families, family_of
from hf_vitprune.families.vit import ViTFamily
from hf_vitprune.modeling import register_family
from hf_vitprune.modeling.outer import norm_kind
from hf_vitprune.spec.architecture import Architecture
from processes import run_python
from tiny import CASES, CLASSIFIERS, make

#: ViViT has ViT's layers over tubes of patches: a few lines make it prunable, saveable and countable
OWN_FAMILY = """
import tempfile, torch, transformers
from transformers import AutoModelForVideoClassification, VivitConfig, VivitForVideoClassification
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from hf_vitprune.cost import count
from hf_vitprune.families.vit import ViTFamily
from hf_vitprune.modeling import register_family
from hf_vitprune.modeling.outer import norm_kind
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from tiny import WITH_MLP, assert_same, relative_error, reset_weights, run

class VivitFamily(ViTFamily):
    def attention_tokens(self, config, grid, stage):
        frames, rows, columns = config.tubelet_size
        n = config.num_frames // frames * (config.image_size // rows) * (config.image_size // columns) + 1
        return n, n, n * n

    def grid(self, config, image_size):
        return config.image_size // config.tubelet_size[1], config.image_size // config.tubelet_size[2]

    def inputs(self, config, size=None, device="cpu", task="Model"):
        frames = (1, config.num_frames, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(frames, device=device)}

register_family(VivitFamily(model_type="vivit", root="vivit", convolutions=False))

sizes = {k: v for k, v in WITH_MLP.items() if k != "patch_size"}
config = VivitConfig(**sizes, num_frames=4, tubelet_size=[2, 8, 8], num_labels=5)
model = reset_weights(VivitForVideoClassification(config)).eval()
plan = PruningPlan.random(model, 0.4)
small = prune(model, plan, stock=False)
assert type(small).__name__ == "PrunedVivitForVideoClassification"
video = torch.randn(2, 4, 3, 16, 16)
with torch.no_grad():
    ours, full = small(video).logits, mask(model, plan)(video).logits
assert relative_error(ours, full) < 1e-5
assert count(small).params == sum(p.numel() for p in small.parameters())
with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(AutoModelForVideoClassification.from_pretrained(folder)(video).logits, ours)
print("registered")
"""


@pytest.mark.slow
def test_registering_ones_own_family() -> None:
    assert run_python(OWN_FAMILY) == "registered\n"


def test_a_model_type_is_registered_once() -> None:
    for register in (add_family, register_family):
        with pytest.raises(ValueError, match="'vit' is registered already"):
            register(ViTFamily(model_type="vit", root="vit"))
    assert len({family.model_type for family in all_families()}) == len(all_families()) >= 18


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
            assert norm_kind(model.get_submodule(norm))
    for norm in family.stream_norms(model):
        assert norm_kind(model.get_submodule(norm))


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_family_of_models_and_configs(case: str) -> None:
    model = make(case)
    assert family_of(model) is family_of(model.config)
    assert Architecture.of(model) == Architecture.dense(model.config, Architecture.of(model).task)


def test_refusal_lists_what_is_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="clip, .*dinov2, .*swin, .*vit, "):
        family_of(nn.Linear(1, 1))
