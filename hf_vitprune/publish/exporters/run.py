"""One model into one format: made aside, read back by its own runtime, compared with the model, then put in place."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...errors import ExportError, InvalidConfigError, VitPruneError
from ...families import PRUNED_PREFIX
from ...families.base import pair
from ...modeling.hosts import stock_host
from ...modeling.native import to_native
from ...spec.configs import stock_config
from ...spec.towers import tower_module
from ...training.model import PruningModel
from ...utils.batches import ImageBatches
from ...utils.offload import check_present
from ...utils.sharding import all_finite, check_whole
from .checks import LEAST_COSINE, TOLERANCE, ExportRecord, agreement, largest_error
from .formats import FOLDERS, GRAPHS, check_format, int8_quantizer, load_graph, make_graph, without_empty_masks
from .inputs import Size, axis_names, example_inputs, own_size, varying_axes

#: images a batch while exporting; the check takes others, too
BATCH = 2
#: families whose position biases keep torch.export busy without end where height and width vary
_ONE_SIZE = ("beit", "data2vec-vision")


def export(
    model: Any,
    folder: str | Path,
    to: str = "onnx",
    *,
    images: Any = None,
    int8: bool = False,
    part: str | None = None,
    image_sizes: Sequence[int | Size] = (),
    processor: Any = None,
    max_batch: int = 8,
    force: bool = False,
) -> ExportRecord:
    """Write a model in another format, and check the written file against the model.

    The file is made beside ``folder`` and moved there when it has passed: its outputs are the model's to
    ``TOLERANCE`` of their largest value, for batches of 1, 2 and 3 and every image size. An int8 file is
    compared on ``images`` instead, and what it loses is in the record.

    Args:
        model: pruned or dense model, a bigger one, or a PeftModel, whose adapters are merged in a copy.
        folder: where to; made if it is not there.
        to: ``"native"`` and ``"portable"``: folders that transformers loads, without this library; ``"onnx"``,
            ``"openvino"``, ``"executorch"``: graphs in float32, with a free batch size.
        images: anything that ``ImageBatches`` takes, with labels or without; the check uses them.
        int8: Linears in int8. ONNX Runtime and ExecuTorch find the ranges of activations as they run; NNCF
            (OpenVINO) finds them in ``images``.
        part: one tower of a bigger model, by itself.
        image_sizes: sides, or (height, width), in pixels; several make height and width free. The config's by default.
        processor: image processor to save along.
        max_batch: the largest batch that an ExecuTorch file takes.
        force: write into a folder that has something in it.

    Raises:
        MissingExtraError: a package is missing.
        InvalidConfigError: an impossible setting, or an image size that the model does not take.
        FileExistsError: the folder has something in it.
        UnsupportedModelError: the model cannot be exported as a whole; says what can.
        NativeExportError: no stock class can hold the shape.
        ExportError: the exporter cannot do this model (its reason is named), or the file is wrong. Nothing is left.
    """
    check_format(to, int8)
    if int8 and images is None:
        raise InvalidConfigError("what int8 loses is measured on images: give some (images=..., --images, --data)")
    if to in FOLDERS and image_sizes:
        raise InvalidConfigError(f"image sizes are for {', '.join(GRAPHS)}: a {to} folder takes what the model takes")
    folder = Path(folder)
    if not force and (folder.is_file() or (folder.is_dir() and any(folder.iterdir()))):
        raise FileExistsError(f"{folder} is there already; choose another place, or give force=True")
    source = prepared(model, part, folder=to in FOLDERS)
    sizes = [pair(size) for size in image_sizes]
    if len(sizes) > 1:
        _check_sizes_vary(source, to)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as aside:
        made = Path(aside)
        if to in FOLDERS:
            record = _folder(source, made, to)
        else:
            batches = None if images is None else ImageBatches(images, BATCH)
            record = _graph(source, made, to, sizes or [own_size(source)], batches, int8, max_batch)
        if processor is not None:
            processor.save_pretrained(made)
        record.save(made)
        _move(made, folder)
    return record


def prepared(model: Any, part: str | None = None, folder: bool = False) -> Any:
    """A copy in evaluation mode, merged, on the CPU, and (of what is no folder) in float32."""
    if isinstance(model, PruningModel):
        raise InvalidConfigError("a PruningModel has gates: export what its export() gives")
    check_whole(model)
    check_present(model, "an export")
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        try:
            model = copy.deepcopy(model).merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ExportError(f"the adapters cannot be merged into the model, which export does: {error}") from error
    source = copy.deepcopy(tower_module(model, part) if part is not None else model)
    wrong = next((name for name, tensor in source.state_dict().items() if not all_finite(tensor)), None)
    if wrong is not None:
        raise ExportError(f"{wrong} has values that are not finite: the model is damaged, and is not exported")
    source = source.eval().requires_grad_(False)
    return source if folder else source.float().cpu()


def _check_sizes_vary(model: Any, to: str) -> None:
    kind = model.config.model_type.removeprefix("pruned_")
    if to == "executorch":
        raise InvalidConfigError("ExecuTorch plans its memory for one image size: export once for every size")
    if kind in _ONE_SIZE:
        raise InvalidConfigError(
            f"{kind} computes its position biases anew for every size, which torch.export cannot keep open: export "
            "once for every size"
        )


def _folder(model: Any, made: Path, to: str) -> ExportRecord:
    result: Any = to_native(model) if to == "native" else model
    result.save_pretrained(made, **({"portable": True} if to == "portable" else {}))
    if to == "portable" and not list(made.glob("*.py")):
        raise ExportError(
            f"{type(result).__name__} is a class of transformers: it loads without this library as it is; "
            "use --to native"
        )
    loaded: Any = type(result).from_pretrained(made).to(result.device, result.dtype)
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in example_inputs(model, BATCH).items()
    }
    with torch.no_grad():
        error = largest_error(model(**inputs), loaded.eval()(**inputs))
    _check_error(error, to)
    return ExportRecord.of(result, to, error, axis_names(inputs), batches=[BATCH])


def _graph(
    model: Any, made: Path, to: str, sizes: list[Size], batches: ImageBatches | None, int8: bool, most: int
) -> ExportRecord:
    # the flag that has positions interpolated is part of the graph, so the first size must not be the config's
    sizes = sorted(set(sizes), key=lambda size: size == own_size(model))
    inputs = example_inputs(model, BATCH, sizes[0], seed=BATCH)
    switches = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    axes = varying_axes(inputs, len(sizes), to, max(most, BATCH + 1))
    quantizer = None
    if batches is not None:
        _check_images(batches, inputs, sizes)
    if int8 and batches is not None:
        whole = [batch["pixel_values"] for batch in batches if len(batch["pixel_values"]) == BATCH]
        if not whole:
            raise InvalidConfigError(f"int8 is measured on images, and there is one only: give at least {BATCH}")
        quantizer = int8_quantizer(to, ({**inputs, "pixel_values": pixels.float()} for pixels in whole))
    with contextlib.redirect_stdout(sys.stderr):  # the libraries tell of their steps
        try:
            with without_empty_masks(model, inputs, to):
                graph = make_graph(to, model, inputs, axes, quantizer)
        except VitPruneError:
            raise
        except Exception as error:
            raise ExportError(
                f"transformers' {to} exporter cannot export {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
        graph.config = _plain_config(model)
        graph.save_pretrained(made)
        exported = load_graph(to, made)
    numbers = (1, BATCH, BATCH + 1)
    with torch.no_grad():
        worst = max(_error(model, exported, size, batch, switches) for size in sizes for batch in numbers)
    found = None
    if batches is not None:
        found = agreement(model, exported, batches, {k: v for k, v in inputs.items() if k != "pixel_values"})
    if not int8:
        _check_error(worst, to)
    elif found is not None and found.cosine < LEAST_COSINE:
        raise ExportError(f"the int8 {to} file is no likeness of the model: {found.one_line}. Nothing was written")
    checked: dict[str, Any] = {"batches": [*numbers], "sizes": [list(size) for size in sizes], "agreement": found}
    checked |= {"int8": True, "tolerance": None} if int8 else {}
    return ExportRecord.of(model, to, worst, axis_names(inputs, axes), **checked)


def _plain_config(model: Any) -> Any:
    """The model's config as one of transformers' own, of the dense sizes: a graph's users have no others."""
    host = stock_host(type(model))
    config = copy.copy(model.config)
    if host is not None:
        config.__class__ = host.config_class
        config.__dict__.pop("model_type", None)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and value.model_type.startswith(PRUNED_PREFIX):
            setattr(config, name, stock_config(value))
    config = copy.copy(stock_config(config))
    config.__dict__.pop("auto_map", None)
    config.architectures = [type(model).__name__.removeprefix("Pruned")]
    return config


def _check_images(batches: ImageBatches, inputs: dict[str, Any], sizes: list[Size]) -> None:
    """Raises:
    InvalidConfigError: the images are of another size than the graph takes.
    """
    shape, taken = (tuple(one["pixel_values"].shape[1:]) for one in (next(iter(batches)), inputs))
    if shape[:-2] != taken[:-2] or (len(sizes) == 1 and shape[-2:] != sizes[0]):
        raise InvalidConfigError(
            f"the images are of shape {shape}, and the model is exported for {taken}: give image_sizes "
            "(--image-size), or images of that size"
        )


def _error(model: Any, exported: Any, size: Size, batch: int, switches: dict[str, Any]) -> float:
    """On random images of a size, with the switches of the traced example."""
    inputs = {**example_inputs(model, batch, size, seed=batch), **switches}
    want = model(**inputs)
    try:
        got = exported(**inputs)
    except Exception as error:
        raise ExportError(
            f"the exported file does not run on {batch} images of {size[0]} x {size[1]}: {error}. Nothing was written"
        ) from error
    return largest_error(want, got)


def _check_error(error: float, to: str) -> None:
    if not error <= TOLERANCE:
        raise ExportError(
            f"the {to} export is off by {error:.2g} of its outputs' largest value (allowed: {TOLERANCE:g}), so it is "
            "not this model. Nothing was written"
        )


def _move(made: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in sorted(made.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
