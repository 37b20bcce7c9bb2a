"""Every form of every model, checked, then timed in turns: each in a process of its own, dense and pruned alike."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table
from tqdm.auto import tqdm

from ...cost import count
from ...errors import InvalidConfigError, MissingExtraError
from ...families.base import pair
from ...latency.measure import environment
from ...utils.figures import PALETTE, new_figure, save_figure
from ...utils.settings import check_count
from ..exporters.formats import check_format
from ..exporters.inputs import example_inputs, own_size
from ..exporters.run import export, prepared
from .processes import timed

FORMS = ("eager", "compile", "onnx", "openvino", "onnx-int8", "openvino-int8")
#: images that int8 is calibrated and compared on where none are given; times do not depend on them
RANDOM_IMAGES = 8
#: model, form
Key = tuple[str, str]


class Measured(NamedTuple):
    """One model in one form.

    Attributes:
        seconds: of a forward pass, the median over the rounds, which are ``samples``.
        speedup: over the first model in the same form; ``against_dense``: over the first model in float32 in the same
            runtime. Medians of the rounds' ratios.
        macs_ratio: MACs of the first model over this one's.
        megabytes: peak memory of its process, with its runtime; ``file_megabytes``: what it takes on the disk.
        kept: what the exported file keeps of the model, on the images; None for forms in torch.
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


def check_forms(forms: Sequence[str]) -> None:
    """Refuse a form that is not known (InvalidConfigError), or whose runtime is not installed (MissingExtraError)."""
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
        kept: dict[Key, dict[str, Any] | None] = {}
        places = {(name, form): folder / f"{i}-{form}" for i, name in enumerate(ready) for form in forms}
        with tqdm(places.items(), "exporting", disable=not progress, leave=False) as bar:
            for (name, form), place_of in bar:
                bar.set_description(f"exporting {name}: {form}")
                kept[name, form] = _made(ready[name], place_of, form, size, images)
        found = []
        for batch in batch_sizes:
            inputs = example_inputs(first, batch, size)
            arrays: dict[str, Any] = {k: value.numpy() for k, value in inputs.items() if torch.is_tensor(value)}
            np.savez(folder / "inputs.npz", **arrays)
            orders: dict[Key, dict[str, Any]] = {
                (name, form): {
                    "form": form,
                    "folder": str(place_of),
                    "inputs": str(folder / "inputs.npz"),
                    "model_class": type(ready[name]).__name__,
                    "threads": threads,
                    "switches": {k: value for k, value in inputs.items() if not torch.is_tensor(value)},
                }
                for (name, form), place_of in places.items()
            }
            samples, memory = timed(orders, rounds, progress)
            found += _summary(batch, samples, memory, macs, kept, {key: _disk(one) for key, one in places.items()})
    return found, {"image_size": list(size), "rounds": rounds, **environment(), "threads": threads}


def _made(model: Any, folder: Path, form: str, size: tuple[int, int], images: Any) -> dict[str, Any] | None:
    """Write a model in a form; what the file keeps of it."""
    if form in ("eager", "compile"):
        model.save_pretrained(folder)
        return None
    to, int8 = form.removesuffix("-int8"), form.endswith("-int8")
    seen = example_inputs(model, RANDOM_IMAGES, size, seed=1)["pixel_values"] if images is None and int8 else images
    record = export(model, folder, to, images=seen, int8=int8, image_sizes=[size])
    return None if images is None or record.agreement is None else record.agreement.to_dict()


def _disk(folder: Path) -> float:
    names = (".safetensors", ".onnx", ".data", ".xml", ".bin")
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in names) / 2**20


def _summary(
    batch: int,
    samples: Mapping[Key, list[float]],
    memory: Mapping[Key, float],
    macs: Mapping[str, int],
    kept: Mapping[Key, dict[str, Any] | None],
    disk: Mapping[Key, float],
) -> list[Measured]:
    dense = next(iter(macs))
    rows = []
    for key, row in samples.items():
        name, form = key
        plain = samples.get((dense, form.removesuffix("-int8")))
        speedup = _ratio(samples[dense, form], row)
        against, ratio = None if plain is None else _ratio(plain, row), macs[dense] / macs[name]
        rows.append(
            Measured(name, form, batch, median(row), speedup, against, ratio, memory[key], disk[key], kept[key], row)
        )
    return rows


def _ratio(reference: Sequence[float], row: Sequence[float]) -> float:
    return median(a / b for a, b in zip(reference, row, strict=True))


# ---------------------------------------------------------------------- shown
def bench_table(rows: Sequence[Measured], setting: dict[str, Any]) -> Table:
    """Every form of every model, batch size by batch size.

    "vs MACs" is the speed-up over the first model in the same form, as a share of what its MACs promise.
    """
    height, width = setting["image_size"]
    title = f"{setting['device']}, {setting['threads']} threads, {height} x {width}, {setting['rounds']} rounds"
    heads = ["batch", "form", "model", "ms", "speed-up", "vs MACs", "vs dense float32", "peak MB", "file MB"]
    kept = any(row.kept for row in rows)
    table = Table(title=title)
    for head in [*heads, *(["cosine", "top-1 kept"] if kept else [])]:
        table.add_column(head, justify="left" if head in ("form", "model") else "right")
    of_group = attrgetter("batch_size", "form")
    for (batch, form), group in groupby(sorted(rows, key=of_group), of_group):
        for row in group:
            numbers: list[tuple[Any, str]] = [
                (row.seconds * 1e3, ".1f"),
                (row.speedup, ".2f"),
                (row.speedup / row.macs_ratio, ".2f"),
                (row.against_dense, ".2f"),
                (row.megabytes, ".0f"),
                (row.file_megabytes, ".1f"),
                *(((row.kept or {}).get(name), shown) for name, shown in (("cosine", ".4f"), ("top1", ".1%")) if kept),
            ]
            cells = ["" if number is None else format(number, shown) for number, shown in numbers]
            table.add_row(str(batch), form, row.name, *cells)
        table.add_section()
    return table


def plot_bench(rows: Sequence[Measured], setting: dict[str, Any], path: str | Path) -> Path:
    """Bars of milliseconds an image, one panel a batch size, and of peak memory, into a file (png, svg, pdf)."""
    batches = sorted({row.batch_size for row in rows})
    names, forms = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("name", "form"))
    figure = new_figure(5 * (len(batches) + 1), 4)
    axes = figure.subplots(1, len(batches) + 1)
    thick = 0.8 / len(names)
    panels = [(batch, "milliseconds an image") for batch in batches] + [(batches[-1], "peak memory, MB")]
    for axis, (batch, what) in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            of = {row.form: row for row in rows if row.name == name and row.batch_size == batch}
            values = [of[form].megabytes if "memory" in what else of[form].seconds * 1e3 / batch for form in forms]
            left = [i + number * thick for i in range(len(forms))]
            axis.bar(left, values, thick, label=name, color=PALETTE[number % len(PALETTE)])
        axis.set_xticks([i + 0.4 - thick / 2 for i in range(len(forms))], forms, rotation=30, ha="right")
        axis.set_ylabel(what)
        axis.set_title(f"batch {batch}")
        axis.legend()
    figure.suptitle(f"{setting['device']}, {setting['threads']} threads")
    return save_figure(figure, path)
