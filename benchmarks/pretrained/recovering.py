"""Recovery of the pruned tower by its features, on whatever device: rows that are written as soon as they are there.

A *job* is a start (a pruned tower, or a smaller stock one) and a training. All learn by the library's own ``recover``.
"""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from hf_vitprune import Compensation, OneShotScores, count, prune
from hf_vitprune.latency.measure import device_name, measure_speed
from hf_vitprune.training.recovery import Recovery, recover

from ..common import StepClock
from .drawings import Drawings, Split, normalised
from .measures import cosines, features, judged
from .methods import magnitude, scored
from .tower import Decoder

#: images that starts are scored and compensated with; all of them are trained on but those held out
CALIBRATED, HELD_OUT = 512, 256


class Bench:
    """The dense tower, its images (as bytes) at one size, and the starts.

    ``output``: file of the rows, a line of JSON each; it grows. ``deadline``: second of ``time.monotonic`` by which
    the last training is over.
    """

    def __init__(
        self, model: Any, decoder: Decoder, split: Split, size: int, device: str, output: Path, deadline: float,
        round_to: int = 8,
    ) -> None:  # fmt: skip
        self.model, self.decoder = model.to(device), decoder.to(device)
        self.size, self.device, self.output, self.deadline = size, device, output, deadline
        self.round_to = round_to
        self.split = Split(*(_placed(part, size, device) for part in split))
        pixels = self.split.calibration.pixels
        held = min(HELD_OUT, len(pixels) // 4)
        self.held_out, self.training = pixels[:held], pixels[held:]
        self.calibrated = self.training[:CALIBRATED]
        self.dense = features(self.model, self.split.gallery.pixels), features(self.model, self.split.queries.pixels)
        self.macs = count(self.model, image_size=size).macs
        output.parent.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    # ------------------------------------------------------------------ starts
    @functools.cached_property
    def scores(self) -> OneShotScores:
        return scored(self.model, self.calibrated)

    @functools.lru_cache(maxsize=8)  # noqa: B019  # a bench lives as long as the process
    def one_shot(self, target: float) -> Any:
        """Sizes by the scores, then compensation."""
        plan = self.scores.plan(target, image_size=self.size, round_to=self.round_to)
        return prune(self.model, plan, calibration=self.calibrated, compensate=Compensation(images=None))

    def refitted(self, target: float, **settings: Any) -> Any:
        """The same sizes, compensated from all unlabelled drawings but those held out."""
        plan = self.scores.plan(target, image_size=self.size, round_to=self.round_to)
        return prune(self.model, plan, calibration=self.training, compensate=Compensation(images=None, **settings))

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def magnitude(self, target: float) -> Any:
        """The smallest weights of every set go; the rest is sliced."""
        return magnitude(None, self.round_to)(self.model, self.calibrated, target, self.size)

    def stock(self, target: float, first: bool = False) -> Any:
        """A stock model of the tower's width with fewer layers: random, or the tower's own, evenly spaced.

        It has the number of layers whose cost is nearest to the target, which may be a little above it; and, at
        random too, the tower's embeddings.
        """
        whole = self.model.config
        layers = max(1, round(target * whole.num_hidden_layers))
        config = Dinov2Config(  # type: ignore[call-arg]
            hidden_size=whole.hidden_size, num_attention_heads=whole.num_attention_heads, num_hidden_layers=layers,
            patch_size=whole.patch_size, image_size=whole.image_size,
        )  # fmt: skip
        torch.manual_seed(0)
        small = Dinov2Model(config).to(self.device).eval()
        small.embeddings.load_state_dict(self.model.embeddings.state_dict())
        if first:
            small.layernorm.load_state_dict(self.model.layernorm.state_dict())
            dense = self.model.encoder.layer
            for i, layer in enumerate(small.encoder.layer):
                layer.load_state_dict(dense[(i + 1) * len(dense) // layers - 1].state_dict())
        return small

    # ------------------------------------------------------------------ rows
    def write(self, name: str, row: dict[str, Any]) -> None:
        """Into the file, and printed."""
        row = {"name": name, "size": self.size, "device": device_name(self.device), **row}
        with self.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def judge(self, small: Any) -> dict[str, float]:
        """All measures, and the share of the MACs."""
        found = judged(small, self.decoder, self.split, self.dense)
        return {"macs": count(small, image_size=self.size).macs / self.macs, **found}

    def latency(self, targets: list[float], batches: tuple[int, ...], dtype: torch.dtype) -> None:
        """The towers take turns; a row a batch."""
        models = {"dense": self.model, **{f"one-shot {target}": self.one_shot(target) for target in targets}}
        for batch in batches:
            times = measure_speed(models, batch, self.size, rounds=10, dtype=dtype, progress=False)
            row = {key: {"ms": 1e3 * one.seconds, "speedup": one.speedup} for key, one in times.items()}
            self.write(f"latency, batch {batch}", {"batch": batch, "dtype": str(dtype), "models": row})

    def train(self, name: str, start: Callable[[], Any], settings: Recovery, seconds_a_step: float) -> Any:
        """Recover a start, which is copied, and write what it came to, unless time is too short for the steps."""
        if settings.steps * seconds_a_step > self.left:
            print(f"{name}: skipped, {self.left:.0f} s are left for {settings.steps} steps", flush=True)
            return None
        small = copy.deepcopy(start())
        begun, curve = self.judge(small), _Curve(self.split.queries.pixels, self.dense[1])
        clock, processors = time.monotonic(), time.process_time()
        done = recover(small, self.model, self.training, settings, held_out=self.held_out, callbacks=[curve])
        seconds, processors = time.monotonic() - clock, time.process_time() - processors
        row = {"start": begun, "end": self.judge(small), "settings": asdict(settings), "images": len(self.training)}
        row |= {"losses": done.losses, "best": done.best, "curve": curve.found, "seconds": seconds}
        self.write(name, {**row, "cpu_seconds": processors, "seconds_a_step": sum(curve.seconds) / settings.steps})
        return done

    def step_time(self, start: Callable[[], Any], settings: Recovery, steps: int = 30) -> float:
        """Seconds of one step."""
        few, held_out = replace(settings, steps=min(steps, settings.steps), checks=1), self.held_out[:8]
        for _ in range(2):  # the first warms up
            clock = _Curve(held_out, features(self.model, held_out))
            recover(copy.deepcopy(start()), self.model, self.training, few, held_out=held_out, callbacks=[clock])
        return sum(clock.seconds) / few.steps


class _Curve(StepClock):
    """Cosines of the asked images' features at every evaluation; nothing is chosen by them. And what steps take."""

    def __init__(self, pixels: torch.Tensor, dense: torch.Tensor) -> None:
        super().__init__(time.monotonic)
        self.pixels, self.dense = pixels, dense
        self.found: dict[int, tuple[float, float]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        mode = model.training
        self.found[state.global_step] = cosines(self.dense, features(model.eval(), self.pixels))
        model.train(mode)


def _placed(part: Drawings, size: int, device: str) -> Drawings:
    pixels = torch.cat([_resized(batch.to(device), size) for batch in part.pixels.split(256)])
    return Drawings(pixels, part.labels.to(device))


def _resized(pixels: torch.Tensor, size: int) -> torch.Tensor:
    pixels = normalised(pixels)
    if pixels.shape[-1] == size:
        return pixels
    return nn.functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
