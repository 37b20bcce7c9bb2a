"""Measuring speed: what is measured and in which order. How fast this machine is is nobody's test."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.latency import measure as latency
from hf_vitprune.latency.measure import Timing, device_name, environment, measure_speed
from tiny import make


class Recorder(nn.Module):
    """Writes down its name, and what it is called with, whenever it runs."""

    def __init__(self, name: str, calls: list[tuple[str, Any]]):
        super().__init__()
        self.name, self.calls = name, calls
        self.linear = nn.Linear(2, 2)
        self.frozen = nn.Dropout()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return Recorder(self.name + " (copy)", self.calls).train(self.training)

    def forward(self, pixel_values: torch.Tensor) -> None:
        weight = self.linear.weight
        self.calls.append((self.name, (tuple(pixel_values.shape), pixel_values.dtype, weight.dtype, self.training)))
        assert not torch.is_grad_enabled()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    monkeypatch.setattr(latency, "MIN_SAMPLE_SECONDS", 0.0)  # one pass a sample
    return []


def measured(calls: list[tuple[str, Any]], **kwargs: Any) -> dict[str, Timing]:
    models = {name: Recorder(name, calls) for name in "AB"}
    return measure_speed(models, **{"batch_size": 2, "image_size": 8, "rounds": 4, "progress": False, **kwargs})


def test_models_take_turns(calls: list[tuple[str, Any]]) -> None:
    timings = measured(calls)
    order = "".join(name for name, _ in calls)
    assert order == "AAABBB" + "AB" * 4
    assert {details for _, details in calls} == {((2, 3, 8, 8), torch.float32, torch.float32, False)}
    assert list(timings) == ["A", "B"]
    assert len(timings["B"].samples) == 4


def test_what_the_numbers_are(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, Any]]) -> None:
    clock = iter([*[0.0] * 12, *[0, 4, 0, 2, 0, 4, 0, 1, 0, 8, 0, 2]])  # warm-up, then three rounds of A and B
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    timings = measured(calls, rounds=3)
    assert timings["A"].samples == (4, 4, 8) and timings["B"].samples == (2, 1, 2)
    assert (timings["A"].seconds, timings["A"].spread, timings["A"].speedup) == (4, 2, 1)
    assert (timings["B"].seconds, timings["B"].speedup, timings["B"].images_per_second) == (2, 4, 1)


def test_short_passes_are_repeated(calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MIN_SAMPLE_SECONDS", 1e9)
    monkeypatch.setattr(latency, "MAX_REPEATS", 5)
    measured(calls, rounds=2)
    assert "".join(name for name, _ in calls) == "AAABBB" + ("AAAAA" + "BBBBB") * 2


def test_record_is_json_and_names_the_machine(calls: list[tuple[str, Any]]) -> None:
    record = json.loads(json.dumps(measured(calls, image_size=(8, 4))["A"].to_dict()))
    assert record["setting"].items() >= {"batch_size": 2, "image_size": [8, 4], "dtype": "float32"}.items()
    assert record["setting"]["device"] == device_name() != ""
    assert record["setting"]["torch"] == torch.__version__
    assert record["setting"]["threads"] == torch.get_num_threads()
    assert {"transformers", "python", "platform"} <= environment().keys()


def test_mode_is_given_back_part_by_part(calls: list[tuple[str, Any]]) -> None:
    model = Recorder("A", calls).train()
    model.frozen.eval()
    measure_speed({"A": model}, image_size=8, rounds=1, progress=False)
    assert model.training and model.linear.training and not model.frozen.training


def test_another_dtype_is_measured_on_a_copy(calls: list[tuple[str, Any]]) -> None:
    model = Recorder("A", calls)
    timings = measure_speed({"A": model}, image_size=8, rounds=1, dtype=torch.bfloat16, progress=False)
    assert {name for name, _ in calls} == {"A (copy)"}
    assert {details[1:3] for _, details in calls} == {(torch.bfloat16, torch.bfloat16)}
    assert model.linear.weight.dtype == torch.float32
    assert timings["A"].setting["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinModel", "CLIPForImageClassification"])
def test_real_models_at_their_own_size(name: str) -> None:
    model = make(name).train()
    timings = measure_speed({"dense": model, "again": model}, batch_size=1, rounds=2, progress=False)
    assert timings["dense"].setting["image_size"] == [16, 16]
    assert all(second > 0 for timing in timings.values() for second in timing.samples)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_impossible_requests(calls: list[tuple[str, Any]]) -> None:
    with pytest.raises(InvalidConfigError, match="at least one model"):
        measure_speed({})
    for wrong in ({"batch_size": 0}, {"rounds": 1.5}, {"rounds": True}):
        with pytest.raises(InvalidConfigError, match=next(iter(wrong))):
            measured(calls, **wrong)
    with pytest.raises(InvalidConfigError, match="give image_size"):
        measured(calls, image_size=None)
    assert not calls
