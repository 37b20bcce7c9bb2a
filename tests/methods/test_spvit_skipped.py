"""SPViT: mixers whose factor is zero leave the same gradients as if all of them were remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_vitprune import SPViTConfig, get_pruning_model
from hf_vitprune.methods.spvit import hooks, mixing
from hf_vitprune.methods.spvit.gates import nested
from tiny import make


def attend_always(self: mixing.MixerSearch, run: Any, tokens: torch.Tensor, others: Any) -> Any:
    return run()


def sum_of_all(
    self: mixing.MixerSearch, attended: torch.Tensor, tokens: torch.Tensor, grid: Any, as_attended: Any = None
) -> torch.Tensor:
    """g3 MSA + g2 (1 - g3) Conv3 + g1 (1 - g2) (1 - g3) Conv1, as it is written; convolutions with a part in it."""
    drawn = self.gates.sample()
    simple, middle, attention = nested(drawn, self.gradients)
    shares = {"conv3x3": middle * (1 - attention), "conv1x1": simple * (1 - middle) * (1 - attention)}
    mixed = attention * attended
    for kind, share in shares.items():
        if kind in mixing._read(*(value > 0.5 for value in drawn.tolist())):
            part = self._convolved(kind, tokens, grid)
            mixed = mixed + share * (part if as_attended is None else as_attended(part))
    return mixed


def gradients(name: str, settings: Any, remembered: bool, seed: int, monkeypatch: Any, **checkpointing: Any) -> Any:
    torch.manual_seed(7)
    with monkeypatch.context() as patch:
        if remembered:
            patch.setattr(mixing.MixerSearch, "attend", attend_always)
            patch.setattr(mixing.MixerSearch, "mix", sum_of_all)
        model = make(name)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        wrapped = get_pruning_model(model, SPViTConfig(target=0.6, **settings)).double().train()
        torch.manual_seed(seed)
        pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        outputs = wrapped(pixel_values=pixels).logits
        outputs.square().sum().backward()
    running = {key: value.clone() for key, value in wrapped.named_buffers() if "running" in key}
    return {key: p.grad for key, p in wrapped.named_parameters()} | running | {"logits": outputs.detach()}


NAMES = ["ViTForImageClassification", "SwinForImageClassification", "BeitForImageClassification"]
SETTINGS = [{"single_path": True}, {"single_path": False}, {"gate_gradients": "shared"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_gradients(name: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = 0
    for seed in range(4):
        expected = gradients(name, settings, True, seed, monkeypatch)
        found = gradients(name, settings, False, seed, monkeypatch)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (found[key] is None) == (gradient is None), key
            if gradient is not None:
                torch.testing.assert_close(
                    found[key], gradient, rtol=1e-12, atol=1e-12, msg=lambda m, key=key: key + m
                )
                learned += "branches" in key and bool(gradient.count_nonzero())
    assert learned  # at some draw a convolution is what counts


def test_the_same_gradients_when_layers_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        through = gradients("ViTForImageClassification", {}, False, seed, monkeypatch)
        again = gradients("ViTForImageClassification", {}, False, seed, monkeypatch, checkpointing=True)
        for key, gradient in through.items():
            torch.testing.assert_close(again[key], gradient, rtol=1e-12, atol=1e-12)


def test_attention_that_somebody_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run as ever, whatever is drawn, and learns nothing where it is times zero."""
    whole = gradients("ViTForImageClassification", {}, False, 1, monkeypatch)
    monkeypatch.setattr(hooks._Attend, "attach", lambda self: self)
    found = gradients("ViTForImageClassification", {}, False, 1, monkeypatch)
    for key, gradient in whole.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-12, atol=1e-12)


def test_less_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(remembered: bool) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            gradients("ViTForImageClassification", {}, remembered, 0, monkeypatch)
        return sum(sizes)

    assert saved(False) < saved(True)


@torch.no_grad()
def test_attention_that_nothing_reads_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = get_pruning_model(make("ViTForImageClassification"), SPViTConfig(target=0.6)).eval()
    search = wrapped.method.searches[0]
    ran: list[int] = []
    search.attention.v.register_forward_hook(lambda *_: ran.append(1))
    for score, runs in ((1.5, 1), (-1.5, 1)):
        search.gates.score.data.fill_(score)
        wrapped(pixel_values=torch.randn(1, 3, 16, 16))
        assert len(ran) == runs
