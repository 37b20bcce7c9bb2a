"""What every command line here has in common: errors in one line, ``--debug``, and arguments that commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a saved model, or its id on the Hub.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
PartOption = Annotated[str | None, typer.Option(help="Which tower of a bigger model (vision, text, backbone, ...).")]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        help="Zero-shot accuracy of a dual encoder: labelled images (as --data of prune), class names as captions."
    ),
]
ImageSizeOption = Annotated[int | None, typer.Option(help="Side of the images in pixels; the model's own.", min=1)]


#: kinds of files that a plot is drawn to
FIGURES = (".png", ".svg", ".pdf")


def grouped(panel: str, help: str, *names: str, **settings: Any) -> Any:
    """An option that the help shows in a panel."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


class Commands(TyperGroup):
    """The group of all commands: takes ``--debug`` anywhere, and says what went wrong in one line."""

    program = "hf-vitprune"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = [arg for arg in args if arg != "--debug"]
        return super().parse_args(ctx, [*(["--debug"] if len(rest) < len(args) else []), *rest])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params["debug"] or not isinstance(error, _explained()):
                raise
            print(f"{self.program}: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from error


def _explained() -> tuple[type[Exception], ...]:
    """Errors whose message is all that a user needs; the Hub's are OSErrors."""
    own = sys.modules.get("hf_vitprune.errors")  # before it is imported nothing can raise its errors
    return (OSError, SafetensorError, *([own.VitPruneError] if own else []))


def make_app(name: str, about: str | None) -> typer.Typer:
    """An application without commands yet: what its errors begin with, and its help."""
    app = typer.Typer(
        cls=type("NamedCommands", (Commands,), {"program": name}),
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=about,
    )

    @app.callback()
    def options(
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        """Options that every command has."""

    return app


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str) -> None:
    """Print a line as it is: no wrapping, no colours."""
    from rich.console import Console

    Console().print(text, highlight=False, soft_wrap=True, markup=False)


def need_plots() -> None:
    """What draws at its end looks for matplotlib before it begins: MissingExtraError where it is not."""
    from hf_vitprune.utils.extras import need

    need("plots", "matplotlib")


def empty_output(path: Path, force: bool, *sources: str | Path | None, file: bool = False) -> Path:
    """The path, if nothing is lost when a folder (or, with ``file``, a file) is written there.

    Args:
        path: what is written.
        force: as ``--force``, which does not help against writing over what is read.
        sources: models, data (``FOLDER,label=...``) and files that are read; None and ids on the Hub are passed over.
        file: a file is written. Beside a model there may be one; only a card, page, figure or results give way.

    Raises:
        FileExistsError: it is, holds or lies in one of the sources; or something is there, and no ``force`` is given.
    """
    read = [one if Path(one).exists() else str(one).partition(",")[0] for one in sources if one is not None]
    for source in (Path(one) for one in read if one and Path(one).exists()):
        inside, holds = _lies_in(path, source), source.is_dir() and _lies_in(source, path)
        if file and source.is_dir():
            own = path.name == "results.json" or path.suffix in (".md", ".html", *FIGURES)
            inside = inside and path.exists() and not own
        if inside or holds:
            how = "holds" if not inside else "lies in" if source.is_dir() and not holds else "is"
            raise FileExistsError(f"{path} {how} {source}, which is read: choose another place, --force or not")
    if path.is_file() != file and path.exists():
        raise FileExistsError(
            f"{path} is a {'folder' if file else 'file'}, and a {'file' if file else 'folder'} is written"
        )
    taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if taken and not force:
        raise FileExistsError(f"{path} is there already; choose another place, or add --force to overwrite it")
    return path


def _lies_in(path: Path, place: Path) -> bool:
    """Whether a path, whatever links lead to it, is a place or below it."""
    resolved = path.resolve()
    return place.exists() and any(one.exists() and one.samefile(place) for one in (resolved, *resolved.parents))


#: what a training that was cut off leaves in the folder to write, and the file in it that is written last
UNFINISHED, SETTINGS = "unfinished", "settings.json"


def is_unfinished(out: Path) -> bool:
    """Whether a folder holds a training that was cut off."""
    return (out / UNFINISHED / SETTINGS).is_file()
