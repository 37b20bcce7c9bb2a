"""Time as measured: everything takes turns, round after round, so that a slow minute hits all alike.

``torch.utils.benchmark`` times one thing to its end before the next, and warms up again before every sample: a machine
whose speed drifts would favour some.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from ..errors import InvalidConfigError, LatencyTableError
from ..families import family_of
from ..families.base import pair
from ..utils.modes import evaluating
from ..utils.settings import check_count, check_image_size

#: one sample takes at least this long, by repeating the call, so that the clock's grain does not show
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
    back as they were; where another device or dtype is asked for than the first model's, copies are measured.

    Args:
        models: name -> model that takes ``pixel_values``; the first one is what ``speedup`` compares with.
        image_size: side, or (height, width), in pixels; by default what the first model's config says.
        rounds: samples of every model.

    Raises:
        InvalidConfigError: no model, an impossible number, or no image size and no config that has one.
    """
    if not models:
        raise InvalidConfigError("give at least one model to measure")
    check_count("batch_size", batch_size)
    check_count("rounds", rounds)
    first = next(iter(models.values()))
    parameter = next((p for p in first.parameters() if p.is_floating_point()), torch.empty(0))
    at = torch.device(device) if device is not None else parameter.device
    kind = parameter.dtype if dtype is None else dtype
    check_image_size(image_size)
    height, width, channels = _image_shape(first, image_size)
    pixels = torch.randn(batch_size, channels, height, width).to(at, kind)
    with contextlib.ExitStack() as stack:
        ready = [_placed(model, at, kind) for model in models.values()]
        for model in ready:
            stack.enter_context(evaluating(model))
        calls = [partial(model, pixel_values=pixels) for model in ready]
        done = timed_rounds(calls, rounds, at, MIN_SAMPLE_SECONDS, progress=progress)
    setting = {"batch_size": batch_size, "image_size": [height, width], "dtype": str(kind).removeprefix("torch.")}
    setting |= environment(at)
    timings = {}
    for name, row in zip(models, map(list, zip(*done, strict=True)), strict=True):
        low, _, high = quantiles(row, n=4, method="inclusive") if rounds > 1 else row * 3
        speedup = median(turn[0] / seconds for turn, seconds in zip(done, row, strict=True))
        seconds = median(row)
        timings[name] = Timing(seconds, high - low, speedup, batch_size / seconds, tuple(row), setting)
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


# ---------------------------------------------------------------------- rounds
@dataclass(frozen=True)
class PartialFile:
    """The finished rounds of a measurement that may be cut off; all or nothing: a killed run leaves the rounds before.

    ``header`` says what the times are of, JSON-ready; a file of anything else is refused.
    """

    path: Path
    header: dict[str, Any]

    def read(self, calls: int) -> list[list[float]]:
        """Raises:
        LatencyTableError: the file is damaged, or holds times of something else.
        """
        if not self.path.exists():
            return []
        try:
            record = json.loads(self.path.read_text())
            theirs, rounds = record["header"], [[float(t) for t in row] for row in record["rounds"]]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise LatencyTableError(f"{self.path} is damaged ({error!r}); delete it to measure anew") from error
        differing = sorted(key for key in {*theirs, *self.header} if theirs.get(key) != self.header.get(key))
        if differing or any(len(row) != calls for row in rounds):
            raise LatencyTableError(
                f"{self.path} holds the first rounds of another measurement (other {', '.join(differing) or 'grid'}); "
                "delete it to measure anew"
            )
        return rounds

    def write(self, rounds: list[list[float]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text(json.dumps({"header": self.header, "rounds": rounds}))
        os.replace(fresh, self.path)


def timed_rounds(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    device: torch.device,
    least_seconds: float,
    kept: PartialFile | None = None,
    progress: bool = True,
    shuffled: bool = False,
) -> list[list[float]]:
    """Seconds of every call in every round, one list a round; each round takes all of them once.

    Args:
        least_seconds: a sample takes so long, by repeating.
        kept: taken up if it is there.
        shuffled: each round has an order of its own.
    """
    done = [] if kept is None else kept.read(len(calls))[:rounds]
    bar = tqdm(
        total=len(calls) * (rounds - len(done) + 1),
        desc="measuring",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        disable=not progress,
        leave=False,
    )
    with torch.inference_mode(), bar:
        repeats = []
        for call in calls:
            repeats.append(warm_up(call, device, least_seconds) if len(done) < rounds else 1)
            bar.update()
        while len(done) < rounds:
            order = list(range(len(calls)))
            if shuffled:
                random.Random(len(done)).shuffle(order)
            row = [0.0] * len(calls)
            for i in order:
                row[i] = sample(calls[i], device, repeats[i])
                bar.update()
            done.append(row)
            if kept is not None:
                kept.write(done)
    if kept is not None:
        kept.path.unlink()
    return done


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
