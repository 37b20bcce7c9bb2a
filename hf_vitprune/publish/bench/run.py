"""Every form of every model, checked, then timed in turns: each in a process of its own, dense and pruned alike."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...cost import count
from ...errors import InvalidConfigError, MissingExtraError
from ...families.base import pair
from ...latency.measure import environment
from ...utils.settings import check_count
from ..exporters.formats import check_format
from ..exporters.inputs import example_inputs, own_size
from ..exporters.run import export, prepared
from .processes import timed

FORMS = ("eager", "compile", "onnx", "openvino", "onnx-int8", "openvino-int8")
#: images that int8 is calibrated and compared on where none are given; times do not depend on them
RANDOM_IMAGES = 8


@dataclass(frozen=True)
class Measured:
    """One model in one form.

    Attributes:
        name, form, batch_size: which.
        seconds: of a forward pass, the median over the rounds.
        speedup: over the first model in the same form; ``against_dense``: over the first model in float32 in the same
            runtime. Medians of the rounds' ratios.
        macs_ratio: MACs of the first model over this one's.
        megabytes: peak memory of its process, with its runtime.
        file_megabytes: what it takes on the disk.
        kept: what the exported file keeps of the model, on the images; None for forms in torch.
        samples: seconds, round by round.
    """

    name: str
    form: str
    batch_size: int
    seconds: float
    speedup: float
    against_dense: float | None
    macs_ratio: float
    megabytes: float
    file_megabytes: float
    kept: dict[str, Any] | None
    samples: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def check_forms(forms: Sequence[str]) -> None:
    """Refuse a form that is not known, or whose runtime is not installed.

    Raises:
        InvalidConfigError: there is no such form.
        MissingExtraError: a package is missing; names the extra.
    """
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise InvalidConfigError(f"there is no form {', '.join(unknown) or 'at all'}; choose of {', '.join(FORMS)}")
    for form in forms:
        if form not in ("eager", "compile"):
            check_format(form.removesuffix("-int8"), form.endswith("-int8"))


def installed_forms() -> tuple[list[str], list[str]]:
    """(forms whose runtimes are installed, reasons why others are left out)."""
    there, reasons = [], []
    for form in FORMS:
        try:
            check_forms([form])
            if form == "compile" and importlib.util.find_spec("torch._inductor") is None:
                raise MissingExtraError("compile needs torch's inductor")
        except MissingExtraError as error:
            reasons.append(f"{form} left out: {error}")
        else:
            there.append(form)
    return there, reasons


def bench(
    models: Mapping[str, Any],
    forms: Sequence[str] = FORMS,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int | None = None,
    rounds: int = 15,
    image_size: int | tuple[int, int] | None = None,
    part: str | None = None,
    images: Any = None,
    progress: bool = True,
) -> tuple[list[Measured], dict[str, Any]]:
    """Time and memory of models in several forms.

    Args:
        models: name -> model; the first one is what the others are compared with.
        forms: of ``FORMS``.
        batch_sizes: images a forward pass.
        threads: of every runtime; torch's own number by default.
        rounds: how often every model in every form is timed; in every round each takes its turn.
        image_size: side, or (height, width), in pixels; the config's by default.
        part: one tower of bigger models.
        images: what int8 is calibrated and compared on; random ones by default.
        progress: show a progress bar.

    Returns:
        What was measured, and the setting: threads, image size, processor, versions.

    Raises:
        MissingExtraError: a runtime is not installed.
        InvalidConfigError: an impossible setting.
        ExportError: a model cannot be exported, or not rightly.
    """
    check_forms(forms)
    threads = torch.get_num_threads() if threads is None else threads
    for name, value in {"threads": threads, "rounds": rounds, **{f"batch size {b}": b for b in batch_sizes}}.items():
        check_count(name, value)
    if not models or not batch_sizes:
        raise InvalidConfigError("give at least one model and one batch size")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ready = {name: prepared(model, part) for name, model in models.items()}
        first = next(iter(ready.values()))
        size = own_size(first) if image_size is None else pair(image_size)
        macs = {name: count(model, size).macs for name, model in ready.items()}
        kept: dict[tuple[str, str], dict[str, Any] | None] = {}
        bar = tqdm(total=len(ready) * len(forms), desc="exporting", disable=not progress, leave=False)
        for number, (name, model) in enumerate(ready.items()):
            for form in forms:
                bar.set_description(f"exporting {name}: {form}")
                kept[name, form] = _made(model, folder / f"{number}-{form}", form, size, images)
                bar.update()
        bar.close()
        found = []
        for batch in batch_sizes:
            inputs = example_inputs(first, batch, size)
            arrays: dict[str, Any] = {
                key: value.numpy() for key, value in inputs.items() if isinstance(value, torch.Tensor)
            }
            np.savez(folder / "inputs.npz", **arrays)
            switches = {key: value for key, value in inputs.items() if not isinstance(value, torch.Tensor)}
            orders: dict[tuple[str, str], dict[str, Any]] = {
                (name, form): {
                    "form": form,
                    "folder": str(folder / f"{number}-{form}"),
                    "inputs": str(folder / "inputs.npz"),
                    "model_class": type(model).__name__,
                    "threads": threads,
                    "switches": switches,
                }
                for number, (name, model) in enumerate(ready.items())
                for form in forms
            }
            samples, memory = timed(orders, rounds, progress)
            found += _summary(batch, samples, memory, macs, kept, {k: _disk(o["folder"]) for k, o in orders.items()})
    return found, {"image_size": list(size), "rounds": rounds, **environment(), "threads": threads}


def _made(model: Any, folder: Path, form: str, size: tuple[int, int], images: Any) -> dict[str, Any] | None:
    """Write a model in a form; what the file keeps of it."""
    if form in ("eager", "compile"):
        model.save_pretrained(folder)
        return None
    seen = images
    if seen is None and form.endswith("-int8"):
        seen = example_inputs(model, RANDOM_IMAGES, size, seed=1)["pixel_values"]
    record = export(
        model, folder, form.removesuffix("-int8"), images=seen, int8=form.endswith("-int8"), image_sizes=[size]
    )
    return None if images is None or record.agreement is None else record.agreement.to_dict()


def _disk(folder: str) -> float:
    names = (".safetensors", ".onnx", ".data", ".xml", ".bin")
    return sum(path.stat().st_size for path in Path(folder).iterdir() if path.suffix in names) / 2**20


def _summary(
    batch: int,
    samples: Mapping[tuple[str, str], list[float]],
    memory: Mapping[tuple[str, str], float],
    macs: Mapping[str, int],
    kept: Mapping[tuple[str, str], dict[str, Any] | None],
    disk: Mapping[tuple[str, str], float],
) -> list[Measured]:
    dense = next(iter(macs))
    rows = []
    for (name, form), row in samples.items():
        plain = form.removesuffix("-int8")
        speedup = _ratio(samples[dense, form], row)
        against = _ratio(samples[dense, plain], row) if (dense, plain) in samples else None
        rows.append(
            Measured(
                name, form, batch, median(row), speedup, against, macs[dense] / macs[name], memory[name, form],
                disk[name, form], kept[name, form], row,
            )
        )  # fmt: skip
    return rows


def _ratio(reference: Sequence[float], row: Sequence[float]) -> float:
    return median(a / b for a, b in zip(reference, row, strict=True))
