"""The ``hf-vitprune`` command. Errors are one line; ``--debug`` shows where they come from.

A command is a function given to ``app.command()``, of this file or of another. What is slow to import is imported
inside the functions, so that ``--help`` is not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError
from typer.core import TyperGroup

from .cli_convert import convert
from .cli_latency import latency
from .cli_prune import demo, prune
from .errors import InvalidConfigError, UnsupportedModelError, VitPruneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .architecture import Architecture

console = Console()


class Commands(TyperGroup):
    """The group of all commands: takes ``--debug`` anywhere, and says what went wrong in one line."""

    program = "hf-vitprune"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = [arg for arg in args if arg != "--debug"]
        return super().parse_args(ctx, [*(["--debug"] if len(rest) < len(args) else []), *rest])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (VitPruneError, OSError, SafetensorError) as error:  # the Hub's errors are OSErrors
            if ctx.params["debug"]:
                raise
            print(f"{self.program}: {first_sentence(error)}", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Structured pruning of Hugging Face vision transformers.",
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options that every command has."""


def main() -> None:
    """Entry point of the console script."""
    app()


def first_sentence(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------- models by folder or Hub id
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its id on the Hub.")]


def load_config(model: str) -> PreTrainedConfig:
    """The config of a saved model, stock or pruned.

    Raises:
        OSError: there is no such model, or no config in it.
        UnsupportedModelError: transformers or this library does not know its kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from . import modeling  # noqa: F401  makes transformers know pruned models
    from .families import family_of

    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"{model} has no config.json, so it is not the folder of a saved model")
    if not Path(model).exists() and (model.count("/") > 1 or model.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"there is no folder {model}")
    try:
        config = AutoConfig.from_pretrained(model)
    except (ValueError, StrictDataclassError) as error:  # an unknown or absent model_type, fields of a wrong type
        raise UnsupportedModelError(f"{model}: {first_sentence(error)}") from error
    family_of(config)
    return config


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names in ``architectures``, by default its image classifier.

    Raises:
        UnsupportedModelError: the class is not of a family, or holds a text tower too.
    """
    import transformers

    from .families import PRUNED_PREFIX, family_of
    from .modeling import class_for_task, registry, stock_model_class

    family = family_of(config)
    named: str | None = next(iter(config.architectures or []), None)
    if named in family.refused_classes:
        raise UnsupportedModelError(
            f"{named} holds a text tower too; save its vision tower on its own, or use a vision-only task class"
        )
    is_pruned = config.model_type.startswith(PRUNED_PREFIX)
    if named is None:
        default = class_for_task(family, "ForImageClassification")
        return default if is_pruned else stock_model_class(default)
    found: type[PreTrainedModel] | None = getattr(registry if is_pruned else transformers, named, None)
    if found is None:
        raise UnsupportedModelError(f"config.json names {named}, which is no class of {config.model_type}")
    return found


def load_architecture(model: str) -> Architecture:
    """The architecture of a saved model, from its config alone."""
    from .architecture import Architecture, strip_family
    from .modeling import pruned_model_class

    config = load_config(model)
    model_class = pruned_model_class(model_class_of(config))
    task = getattr(model_class, "pruning_task", None) or strip_family(model_class.__name__, type(config).__name__)
    return Architecture.from_config(config, task)


def empty_output(path: Path, force: bool) -> Path:
    """The path, if nothing would be overwritten there.

    Raises:
        InvalidConfigError: it is a file or a folder with something in it, and ``--force`` is not given.
    """
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not force:
        raise InvalidConfigError(f"{path} is there already; choose another place, or add --force to overwrite it")
    return path


# ---------------------------------------------------------------------- commands
@app.command()
def inspect(
    model: ModelArgument,
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the layers to this file (png, svg or pdf) too.")] = None,
) -> None:
    """Show the layers of a model: sizes, parameters, multiply-adds. Reads its config, not its weights."""
    from .architecture import Architecture
    from .block_report import plot_architecture
    from .cost import count
    from .report import human, layer_rows, layer_table

    architecture = load_architecture(model)
    if plot is not None:
        plot_architecture(architecture, plot, image_size)
    cost = count(architecture, image_size)
    dense = count(Architecture.dense(architecture.config, architecture.task), image_size)
    if as_json:
        record = {"model_type": architecture.model_type, "task": architecture.task, **cost._asdict()}
        record |= {"dense": dense._asdict(), "layers": layer_rows(architecture, image_size)}
        print(json.dumps(record))
        return
    console.print(layer_table(architecture, image_size, title=f"{model} ({architecture.model_type})"))
    if cost != dense:
        console.print(
            f"Of the dense model's {human(dense.params)} parameters and {human(dense.macs)} multiply-adds, "
            f"{cost.params / dense.params:.1%} and {cost.macs / dense.macs:.1%} remain.",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    native: Annotated[
        bool, typer.Option("--native", help="As a stock transformers model, which loads without hf_vitprune.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is in OUT.")] = False,
) -> None:
    """Save a model as safetensors, with its image processor's settings; refuses shapes that --native cannot hold."""
    import shutil

    from transformers.utils import cached_file

    from .native import native_config, to_native

    architecture = load_architecture(model)
    if native:
        native_config(architecture)  # refuse before weights are fetched
    empty_output(out, force)
    loaded: Any = model_class_of(load_config(model)).from_pretrained(model)
    result = to_native(loaded) if native else loaded
    result.save_pretrained(out)
    settings = cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if settings is not None and Path(settings).parent.resolve() != out.resolve():
        shutil.copy(settings, out / "preprocessor_config.json")
    console.print(f"{type(result).__name__} saved in {out}", highlight=False, soft_wrap=True)


@app.command()
def card(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option("--out", help="File to write, for instance README.md.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it was pruned from.")] = None,
    license: Annotated[str | None, typer.Option(help="License, that of the base model as a rule.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where the model will be on the Hub.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Write the model card of a saved model; prints it without --out."""
    import torch

    from .card import model_card

    config = load_config(model)
    if out is not None:
        empty_output(out, force)
    with torch.device("meta"):  # a card needs no weights
        skeleton = model_class_of(config)(config)
    hub_id = repo_id or (None if Path(model).exists() else model)
    text = str(model_card(skeleton, base_model=base_model, license=license, repo_id=hub_id))
    if out is None:
        print(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    console.print(f"card written to {out}", highlight=False, soft_wrap=True)


app.command()(convert)
app.command()(prune)
app.command()(latency)
app.command()(demo)

if __name__ == "__main__":
    main()
