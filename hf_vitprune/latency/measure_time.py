"""Time as measured: several models in turn, round after round, so that a slow minute hits all of them alike."""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from ..errors import InvalidConfigError
from ..families import family_of
from ..families.base import pair
from ..utils.modes import evaluating

#: one sample takes at least this long, by repeating the forward pass, so that the clock's grain does not show
MIN_SAMPLE_SECONDS = 0.02
MAX_REPEATS = 100
WARM_UPS = 3


@dataclass(frozen=True)
class Timing:
    """How long one forward pass of a batch takes.

    Attributes:
        seconds: median over the rounds.
        spread: distance between the quartiles, in seconds.
        speedup: how many times faster than the first model measured with it: median of the rounds' ratios.
        images_per_second: batch size over ``seconds``.
        samples: seconds a pass, round by round.
        setting: batch size, image size, dtype, device, threads and library versions.
    """

    seconds: float
    spread: float
    speedup: float
    images_per_second: float
    samples: tuple[float, ...]
    setting: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**asdict(self), "samples": list(self.samples)}


def measure_speed(
    models: Mapping[str, nn.Module],
    batch_size: int = 8,
    image_size: int | tuple[int, int] | None = None,
    rounds: int = 15,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Timing]:
    """Measure the forward pass of several models on the same random images.

    Every round times every model once, in turn. The models are in eval mode while they are measured, and are given
    back as they were; where another device or dtype is asked for, copies are measured.

    Args:
        models: name -> model that takes ``pixel_values``; the first one is what ``speedup`` compares with.
        batch_size: images a forward pass.
        image_size: side, or (height, width), in pixels; by default what the first model's config says.
        rounds: samples of every model.
        device: where to measure; by default where the first model is.
        dtype: in which type to measure; by default that of the first model.
        progress: show a progress bar.

    Raises:
        InvalidConfigError: no model, an impossible number, or no image size and no config that has one.
    """
    if not models:
        raise InvalidConfigError("give at least one model to measure")
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if type(value) is not int or value < 1:
            raise InvalidConfigError(f"{name} is a whole number of at least 1, got {value!r}")
    first = next(iter(models.values()))
    parameter = next((p for p in first.parameters() if p.is_floating_point()), torch.empty(0))
    at = torch.device(device) if device is not None else parameter.device
    kind = parameter.dtype if dtype is None else dtype
    height, width, channels = _image_shape(first, image_size)
    pixels = torch.randn(batch_size, channels, height, width).to(at, kind)
    samples: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        ready = {name: _placed(model, at, kind) for name, model in models.items()}
        for model in ready.values():
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        bar = stack.enter_context(
            tqdm(total=(rounds + 1) * len(models), desc="measuring", disable=not progress, leave=False)
        )
        repeats = {}
        calls = {name: partial(model, pixel_values=pixels) for name, model in ready.items()}
        for name, call in calls.items():
            repeats[name] = warm_up(call, at, MIN_SAMPLE_SECONDS)
            bar.update()
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(sample(call, at, repeats[name]))
                bar.update()
    setting = {"batch_size": batch_size, "image_size": [height, width], "dtype": str(kind).removeprefix("torch.")}
    return _summarised(samples, batch_size, {**setting, **environment(at)})


def _summarised(samples: dict[str, list[float]], batch_size: int, setting: dict[str, Any]) -> dict[str, Timing]:
    reference = next(iter(samples.values()))
    timings = {}
    for name, row in samples.items():
        low, _, high = quantiles(row, n=4, method="inclusive") if len(row) > 1 else (row[0], row[0], row[0])
        seconds = median(row)
        ratio = median(a / b for a, b in zip(reference, row, strict=True))
        timings[name] = Timing(seconds, high - low, ratio, batch_size / seconds, tuple(row), setting)
    return timings


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What a measured time depends on besides the model: device, threads, versions. JSON-ready."""
    device = torch.device(device)
    record: dict[str, Any] = {"device": device_name(device), "device_type": device.type}
    if device.type == "cpu":
        record["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        record["cuda"] = torch.version.cuda
    return {
        **record,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def device_name(device: str | torch.device = "cpu") -> str:
    """Name of the processor or accelerator, as people know it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------- one model
def _image_shape(model: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """(height, width, channels) of the model's images."""
    config: Any = getattr(model, "config", None)
    if config is None:
        if image_size is None:
            raise InvalidConfigError(f"{type(model).__name__} has no config; give image_size")
        return (*pair(image_size), 3)
    sizes = family_of(config).sizes_config(config)
    return (*pair(sizes.image_size if image_size is None else image_size), sizes.num_channels)


def _placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model itself where it already is as asked, else a copy."""
    tensors = [t for t in (*model.parameters(), *model.buffers())]
    if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors):
        return model
    return copy.deepcopy(model).to(device, dtype)


def warm_up(call: Callable[[], Any], device: torch.device, least_seconds: float) -> int:
    """Run something until caches and kernels are settled; how often to repeat it for a sample of ``least_seconds``."""
    seconds = min(sample(call, device, 1) for _ in range(WARM_UPS))
    return max(1, min(MAX_REPEATS, round(least_seconds / max(seconds, 1e-9))))


def sample(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds a call, over ``repeats`` calls in a row."""
    _finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(device)
    return (time.perf_counter() - start) / repeats


def _finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
