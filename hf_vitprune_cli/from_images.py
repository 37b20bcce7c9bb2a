"""Pruning without labels: images, or the scores of an earlier run, to a small model; trained on features, or not."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import get_max_memory
from rich.console import Console

from hf_vitprune.compensate import Compensation
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.latency.measure import device_name, measure_speed
from hf_vitprune.methods import OneShotScores, OneShotSettings
from hf_vitprune.methods.oneshot import check_target
from hf_vitprune.modeling.streamed import load_streamed
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.publish.report import comparison_table
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.towers import tower_module
from hf_vitprune.training.recovery import Recovery, hold_out, recover
from hf_vitprune.utils.data import read_folder

from .app import say
from .progress import NamedProgress
from .saved import (
    holds_towers,
    load_any_config,
    load_config,
    load_processor,
    load_skeleton,
    model_class_of,
    take_tokenizer,
)
from .unfinished import Unfinished
from .workflow import PrunedResult, model_row, save_result

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
    on with.

    Started by torchrun or ``accelerate launch``, every process sees a part of the images; the first one writes.

    Args:
        model: folder or Hub id.
        out: folder for the pruned model.
        images: folder of images; None reads ``scores_file`` instead.
        scores_file: where the scores are kept; None for nowhere.
        goal: ``target``, ``target_metric``, ``latency_table``.
        round_to: kept sizes are multiples of it.
        batch_size: images a forward pass.
        recovery: train the small model on the features of the dense one; None: no training.
        part: which tower of a bigger model; its only one by default.
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
        dense = model_class_of(load_any_config(model)).from_pretrained(model).eval().to(device)
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
        _finish(model, out, dense, small, plan, processor, measured=not streamed)
        if kept is not None:
            kept.remove()
        how = "without training" if recovered is None else "and trained on the dense model's features"
        say(f"saved to {out}: pruned {how}, from {seen}")
        if recovered is not None:
            say(recovered.one_line)
    if state is not None:
        state.wait_for_everyone()
        state.destroy_process_group()


def _fits_twice(model: str, processes: int) -> bool:
    """Whether the memory has room for a model, or a bigger one around a tower, and the copy that pruning makes of it.

    Args:
        processes: that hold it on this machine.
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


def _finish(model: str, out: Path, dense: Any, small: Any, plan: PruningPlan, processor: Any, measured: bool) -> None:
    """Measure, save, and print a table."""
    towers = {key: tower_module(one, plan.part) for key, one in (("dense", dense), ("pruned", small))}
    timings = measure_speed(towers, batch_size=8) if measured else {}
    rows = [model_row(key, one, None, timings.get(key)) for key, one in towers.items()]
    macs, params = (rows[1][key] / rows[0][key] for key in ("macs", "params"))
    pair = {"before": timings["dense"], "after": timings["pruned"]} if measured else None
    take_tokenizer(model, out)
    save_result(out, PrunedResult(small, plan, {}, macs, params), processor, pair, dataset=None, base_model=model)
    where = f", measured on {device_name()}, batch 8" if measured else ""
    Console().print(comparison_table(rows, title=f"{model}{where}"))
