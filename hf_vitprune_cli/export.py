"""``hf-vitprune export``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .app import ForceOption, ModelArgument, OutArgument, PartOption, empty_output, say

#: images of --images or --data that the exported file is compared on
NUM_IMAGES = 256
#: what processors and tokenizers keep beside a model
SETTINGS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)


def export(
    model: ModelArgument,
    out: OutArgument,
    to: Annotated[
        Literal["native", "portable", "onnx", "openvino", "executorch"],
        typer.Option(
            help="native, portable: a folder that transformers loads without hf_vitprune (as a stock class; with code "
            "of its own). Others: a graph for that runtime."
        ),
    ],
    images: Annotated[Path | None, typer.Option(help="Folder of images that the file is compared on.")] = None,
    data: Annotated[
        str | None, typer.Option(help="The same with labels: digits, a folder with one sub-folder a class, ...")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Linears in int8; what it loses is measured.")] = False,
    image_size: Annotated[
        list[int] | None, typer.Option(help="Side of the images in pixels; several: any size. The model's own.", min=1)
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest batch that an ExecuTorch file takes.", min=1)] = 8,
    part: PartOption = None,
    force: ForceOption = False,
) -> None:
    """Write a model in another format, checked against the model itself before it is left in OUT.

    Batches may be of any size. --int8 takes --images or --data, and says what it costs on them.
    """
    empty_output(out, force, model, images, data)
    if images is not None and data is not None:
        raise typer.BadParameter("give --images or --data, not both")
    if int8 and images is None and data is None:
        raise typer.BadParameter("what --int8 loses is measured on images: add --images or --data")
    from hf_vitprune.publish.exporters.formats import check_format

    check_format(to, int8)

    from transformers.utils import cached_file

    from hf_vitprune.modeling.native import to_native
    from hf_vitprune.publish.exporters import export as write

    from .saved import load_skeleton, load_with_adapters

    if to == "native" and part is None and not (Path(model) / "adapter_config.json").is_file():
        to_native(load_skeleton(model))  # refuse before weights are fetched
    sizes = image_size or []
    seen = None
    if images is not None or data is not None:
        seen = read_images(model, images, data, sizes[0] if len(sizes) == 1 else None)
    loaded = load_with_adapters(model)
    record = write(
        loaded, out, to, images=seen, int8=int8, part=part, image_sizes=sizes, max_batch=max_batch, force=True
    )
    for name in SETTINGS:
        found = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copy(found, out / name)
    say(f"{record.model} saved in {out}")
    say(record.one_line)


def read_images(model: str, images: Path | None, data: str | None, side: int | None) -> Any:
    """Images through the model's processor, evenly drawn: a tensor, or a data set with labels.

    ``side`` in pixels is in place of the size that the processor makes.
    """
    from hf_vitprune.utils.data import load_images, read_folder

    from .classifier import aligned
    from .saved import load_processor

    processor = load_processor(model)
    if side is not None:
        square = {"height": side, "width": side}
        processor.size = {"shortest_edge": side} if "shortest_edge" in dict(processor.size) else square
        processor.crop_size = square
    if images is not None:
        return read_folder(images, processor, NUM_IMAGES)
    labelled = aligned(load_images(data or "", training=False), model)
    return labelled.at_most(None, NUM_IMAGES).processed(processor)[1]
