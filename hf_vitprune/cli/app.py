"""What every command line here has in common: errors in one line, ``--debug``, models by folder or Hub id.

What is slow to import is imported inside the functions, so that ``--help`` is not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from ..errors import InvalidConfigError, UnsupportedModelError, VitPruneError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..spec.architecture import Architecture


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


def make_app(name: str, about: str | None) -> typer.Typer:
    """An application without commands yet.

    Args:
        name: what errors begin with.
        about: its help.
    """
    return typer.Typer(
        cls=type("NamedCommands", (Commands,), {"program": name}),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=about,
    )


def first_sentence(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its id on the Hub.")]


def load_config(model: str) -> PreTrainedConfig:
    """The config of a saved model, stock or pruned.

    Raises:
        OSError: there is no such model, or no config in it.
        UnsupportedModelError: transformers or this library does not know its kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from .. import modeling  # noqa: F401  makes transformers know pruned models
    from ..families import family_of

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

    from ..families import PRUNED_PREFIX, family_of
    from ..modeling import class_for_task, registry, stock_model_class

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
    from ..modeling import pruned_model_class
    from ..spec.architecture import Architecture, strip_family

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
