"""Pruning without labels: images, or the scores of an earlier run, to a small model; trained on features, or not."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import get_max_memory
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model
from transformers import AutoTokenizer
from transformers.utils import cached_file

from hf_vitprune.compensate import Compensation
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.methods import OneShotScores, OneShotSettings
from hf_vitprune.methods.oneshot import check_target
from hf_vitprune.modeling.streamed import load_streamed
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.towers import tower_module
from hf_vitprune.training.recovery import Recovery, hold_out, recover
from hf_vitprune.utils.data import read_folder

from .app import SETTINGS, UNFINISHED, say
from .progress import NamedProgress
from .saved import (
    holds_towers,
    load_any_config,
    load_config,
    load_model,
    load_processor,
    load_skeleton,
    model_class_of,
)
from .workflow import PrunedResult, finish

#: images that are drawn from the folder to train on; of those that are not held out, so many are calibrated with
NUM_TRAINED, NUM_CALIBRATED = 1024, 512
#: of an image at the most, where there are fewer
NUM_VIEWS = 4


def prune_from_images(
    model: str,
    out: Path,
    images: Path | None,
    scores_file: Path | None,
    goal: dict[str, Any],
    *,
    round_to: int,
    batch_size: int,
    recovery: Recovery | None = None,
    part: str | None = None,
    copies: str,
) -> None:
    """Prune, save, and print what came of it.

    The layers of a whole model that is larger than the memory stay on the disk, where nothing is trained; no latency
    is measured then. With ``recovery``, a run that is cut off leaves in ``out`` what the same run, started again, goes
    on with. Started by torchrun or ``accelerate launch``, every process sees a part of the images; the first one
    writes.

    Args:
        images: folder of images; None reads ``scores_file`` instead.
        scores_file: where the scores are kept; None for nowhere.
        goal: ``target``, ``target_metric``, ``latency_table``.
        recovery: train the small model on the features of the dense one; None: no training.
        copies: folder for what has to be rewritten of layers that stay on the disk.

    Raises:
        InvalidDataError: too few images to train on some and hold others out.
        InvalidConfigError: ``recovery`` on several processes; ``out`` has what another run has left.
    """
    state = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if recovery is not None:
            raise InvalidConfigError("features are learned by one process: start it without torchrun, or prune first")
        state = PartialState(cpu=not torch.accelerator.is_available())
    first = state is None or state.is_main_process
    device = torch.device("cpu") if state is None else state.device
    streamed = recovery is None and part is None and not _fits_twice(model, state.num_processes if state else 1)
    if streamed:
        say(f"{model} and a copy are larger than the free memory: layers are read from the disk, one at a time")
        dense = load_streamed(model_class_of(load_config(model)), model, copies=copies, device=device)
    else:
        dense = load_model(model).to(device)
    processor = load_processor(model, images is not None)
    check_target(Architecture.of(dense, part), OneShotSettings(), round_to=round_to, **goal)
    asked: dict[str, Any] = {"model": model, "part": part, "round_to": round_to, "batch_size": batch_size, **goal}
    recovered = kept = None
    if images is None:
        scores = OneShotScores.load(scores_file or "")
        scores.check(dense)
        plan = scores.plan(round_to=round_to, **goal)
        small = prune(dense, scores.compensate(dense, plan))
        seen = f"{scores.images} unlabelled images seen when {scores_file} was made"
    else:
        drawn = read_folder(images, processor, NUM_CALIBRATED if recovery is None else NUM_TRAINED)
        training, apart = hold_out(len(drawn), recovery.held_out) if recovery else (list(range(len(drawn))), [])
        pixels = drawn[training[:: -(-len(training) // NUM_CALIBRATED)]]
        seen = f"{len(pixels)} unlabelled images"
        if recovery is not None:
            asked |= {"images": images.resolve(), "number": len(drawn), "recovery": asdict(recovery)}
            kept = Unfinished(out, asked)
        if kept is not None and kept.has_start:
            say(f"going on with the training that {kept.folder} was left by")
            plan, small = kept.load(dense)
        else:
            plan, small = _one_shot(dense, pixels, scores_file, first, asked, goal)
        if kept is not None and recovery is not None:
            kept.save(plan, small)
            recovered = recover(
                tower_module(small, plan.part),
                tower_module(dense, plan.part),
                drawn[training],
                recovery,
                held_out=drawn[apart],
                plan=plan.of_part(None),
                callbacks=[NamedProgress("learning features")],
                folder=kept.folder,
            )
    if first:
        if cached_file(model, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None:
            AutoTokenizer.from_pretrained(model).save_pretrained(out)  # what reads texts goes on doing so
        finish(model, out, dense, "pruned", PrunedResult(small, plan, {}), processor, None, not streamed)
        if kept is not None:
            shutil.rmtree(kept.folder)
        how = "without training" if recovered is None else "and trained on the dense model's features"
        say(f"saved to {out}: pruned {how}, from {seen}")
        if recovered is not None:
            say(recovered.one_line)
    if state is not None:
        state.wait_for_everyone()
        state.destroy_process_group()


def _fits_twice(model: str, processes: int) -> bool:
    """Whether the memory has room for what so many processes hold: a model, and the copy that pruning makes of it.

    Of a bigger model around a tower no copy is made.
    """
    config = load_any_config(model)
    dtype: Any = config.dtype or torch.float32
    size = sum(tensor.numel() for tensor in load_skeleton(model).parameters()) * dtype.itemsize
    return 2 * processes * size < _free_memory() or holds_towers(config)


def _free_memory() -> int:
    """Bytes that this process can still have: of the machine, and of the container it runs in."""
    free = get_max_memory()["cpu"]
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _one_shot(
    dense: Any, pixels: Any, scores_file: Path | None, writes: bool, asked: dict[str, Any], goal: dict[str, Any]
) -> tuple[PruningPlan, Any]:
    """The plan by the scores, and the model compensated from the same images."""
    batch_size = asked["batch_size"]
    settings = OneShotSettings(images=None, batch_size=batch_size, statistics=scores_file is not None)
    scores = OneShotScores.measure(dense, pixels, settings, name=asked["model"], part=asked["part"])
    if scores_file is not None and writes:
        scores.save(scores_file)
    plan = scores.plan(round_to=asked["round_to"], **goal)
    views = max(1, min(NUM_VIEWS, NUM_CALIBRATED // len(pixels))) if plan.source.family.reads == "images" else 1
    compensation = Compensation(images=None, batch_size=batch_size, views=views)
    return plan, prune(dense, plan, calibration=pixels, compensate=compensation)


class Unfinished:
    """What a training that is cut off leaves in ``out``: the small model that it starts with, its plan, checkpoints.

    Raises:
        InvalidConfigError: what is there is of a run with other ``settings``.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.folder = out / UNFINISHED
        self.settings = json.loads(json.dumps(settings, default=str))
        self._start, self._plan, self._file = (
            self.folder / name for name in ("start.safetensors", "plan.json", SETTINGS)
        )
        if self._file.exists():
            before = json.loads(self._file.read_text())
            changed = [key for key, value in self.settings.items() if before.get(key) != value]
            if changed:
                raise InvalidConfigError(
                    f"{out} holds a training that was cut off and had other settings ({changed[0]}: "
                    f"{before.get(changed[0])!r}, not {self.settings[changed[0]]!r}): give those, or --force to start "
                    "anew"
                )

    @property
    def has_start(self) -> bool:
        """Whether the model was pruned and compensated already."""
        return self._file.exists()

    def load(self, dense: Any) -> tuple[PruningPlan, Any]:
        """The plan, and the small model that the training starts with."""
        plan = PruningPlan.load(self._plan)
        small = prune(dense, plan)
        load_weights(small, str(self._start))
        return plan, small

    def save(self, plan: PruningPlan, small: Any) -> None:
        """What the training starts with, unless it is there."""
        if self.has_start:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(small, str(self._start))
        plan.save(self._plan)
        self._file.write_text(json.dumps(self.settings, indent=1))  # last: with it, the start is whole
