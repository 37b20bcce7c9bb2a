"""Push a model to the Hub: weights, config, card and processor in one commit, or nothing; and a Trainer's card."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from ..errors import HubUploadError, UnsupportedModelError
from ..modeling.whole_config import check_portable
from ..peft.folder import name_base
from ..spec.architecture import unwrap
from ..spec.configs import is_pruned
from ..spec.towers import towers
from ..utils.finite import check_finite
from ..utils.upload import register
from .card import CARD, model_card
from .kept import UNNAMED, beside, draw, metrics_of, take_figures

#: weights of an earlier push in other pieces; they would be loaded in place of, or beside, the new ones
_SHARDS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
#: an adapter of an earlier push, with its base; it would be put into a model that has it already, or another one
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "base/*")


def push_to_hub(
    model: Any,
    repo_id: str,
    card: ModelCard | str | None = None,
    image_processor: Any = None,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: Sequence[str] = (),
    portable: bool = False,
    card_folder: str | Path | None = None,
) -> CommitInfo:
    """Upload a model in a single commit, so that a push that is cut off leaves nothing half-finished to load.

    Args:
        model: pruned, stock or PEFT model; with an adapter goes the pruned base that it needs.
        repo_id: ``"owner/name"``, or ``"name"`` for one's own; made if it is not there.
        card: the model card. Without it a card that the repository has already is kept; else the card beside the
            files that the model was loaded from is taken, or one is written.
        image_processor: saved with the model, so that pipelines find it.
        private: make a new repository private.
        token: as in transformers; by default the one of ``hf auth login``.
        commit_message: title of the commit.
        commit_description: its text.
        revision: branch to push to, made if it is not there; ``main`` by default.
        create_pr: open a pull request instead of pushing to the branch.
        max_shard_size: largest file of weights, for instance ``"5GB"``.
        tags: added to the card, also to one that is kept.
        portable: with a file of code by which ``trust_remote_code=True`` loads the model without this library.
        card_folder: where the card and its figure are; by default the folder that the model was loaded from.

    Returns:
        What the Hub says of the commit.

    Raises:
        PortableError: ``portable``, and the model holds what that file cannot bring along.
        UnsupportedModelError: it is no model of transformers or PEFT.
        HubUploadError: no connection, a lost connection, or no right to write there.
        NotFiniteError: there are weights that are infinite or no numbers.
    """
    if portable:
        check_portable(model)
    base = unwrap(model)
    if not hasattr(model, "save_pretrained"):
        raise UnsupportedModelError(
            f"a {type(model).__name__} has no save_pretrained: push a model of transformers or PEFT"
        )
    check_finite(model, "pushed")
    api = HfApi(token=token)
    tags = [*tags, *(getattr(base, "model_tags", None) or [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"max_shard_size": max_shard_size, "portable": portable or None}
        model.save_pretrained(folder, **{name: value for name, value in settings.items() if value is not None})
        with _explained(repo_id, "nothing was changed there"):  # and no repository made for what cannot be saved
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            present = set(api.list_repo_files(repo_id, revision=revision))
        name_base(folder, repo_id)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        with _explained(repo_id, "nothing was changed there"):
            text = _card_text(api, model, repo_id, card, CARD in present, revision, tags, folder, card_folder)
        if text is not None:
            (folder / CARD).write_text(text, encoding="utf-8")
            take_figures(text, _source(model, card_folder), folder, base)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        old = _SHARDS if hasattr(model, "peft_config") else (*_SHARDS, *_ADAPTER)
        stale = [path for path in sorted(present - files.keys()) if any(fnmatch.fnmatch(path, p) for p in old)]
        with _explained(
            repo_id,
            "a push is one commit, made at its end, so the repository holds what it held before (or everything, if "
            "only the answer was lost) and nothing half-finished can be loaded. Push again; large files that arrived "
            "are not sent twice",
        ):
            return api.create_commit(  # upload_folder makes several where hf_xet is installed
                repo_id,
                [
                    *(CommitOperationAdd(path, str(file)) for path, file in sorted(files.items())),
                    *(CommitOperationDelete(path) for path in stale),
                ],
                commit_message=commit_message or f"Upload {type(base).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _card_text(
    api: HfApi,
    model: Any,
    repo_id: str,
    card: ModelCard | str | None,
    is_there: bool,
    revision: str | None,
    tags: Sequence[str],
    folder: Path,
    card_folder: str | Path | None,
) -> str | None:
    """What README.md should say; None to leave the one that is there."""
    if card is None and is_there:
        if not tags:
            return None
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
        card = Path(path).read_text(encoding="utf-8")
    chosen = card if card is not None else _card_beside(model, card_folder)
    if chosen is None:
        plot = draw(unwrap(model), folder)
        return str(model_card(model, repo_id=repo_id, tags=tags, plot=plot, beside=beside(folder)))
    return str(_tagged(ModelCard(str(chosen)), tags) if tags else chosen)


def _tagged(card: ModelCard, tags: Sequence[str]) -> ModelCard:
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    return card


def _source(model: Any, card_folder: str | Path | None) -> Path:
    """Where a card may be."""
    if card_folder is not None and (Path(card_folder) / CARD).is_file():
        return Path(card_folder)
    return Path(unwrap(model).config._name_or_path or "-")


def _card_beside(model: Any, card_folder: str | Path | None = None) -> str | None:
    """The card in a folder, that which the model was loaded from, if it is about a model of this very shape.

    A freshly pruned model remembers the folder of its dense model, whose card is about that one.
    """
    card, saved = (_source(model, card_folder) / name for name in (CARD, "config.json"))
    if not card.is_file() or not saved.is_file():
        return None
    same = _shape_of(json.loads(saved.read_text("utf-8"))) == _shape_of(unwrap(model).config.to_dict())
    return card.read_text("utf-8") if same else None


def _shape_of(fields: dict[str, Any], path: str = "") -> dict[str, Any]:
    """What a config's fields say of pruned shapes: its own, and those of towers, by the path of their config."""
    record, info = fields.get("pruning_config") or {}, fields.get("pruning_info") or {}
    own = {path: (record.get("fingerprint"), info.get("plan"))} if record or info else {}
    inner = {f"{path}.{name}": value for name, value in fields.items() if isinstance(value, dict)}
    for name in ("pruning_config", "pruning_info"):
        inner.pop(f"{path}.{name}", None)
    return own | {key: shape for name, value in inner.items() for key, shape in _shape_of(value, name).items()}


@contextlib.contextmanager
def _explained(repo_id: str, consequence: str) -> Iterator[None]:
    """Turn what the Hub's client lets through into one error that says what became of the repository."""
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        advice = ""
        if isinstance(error, HfHubHTTPError):
            reason = f"the Hub answered {error.response.status_code} ({error.server_message or _line(error)})"
            if error.response.status_code in (401, 403):
                advice = "; sign in with `hf auth login`, or pass a token that may write there"
        elif not isinstance(error, RuntimeError):
            reason = f"the connection failed ({type(error).__name__}: {_line(error)})"
        elif "Error while uploading" in str(error):
            cause = error.__cause__
            reason = f"an upload failed ({_line(error)} {type(cause).__name__}: {_line(cause)})"
        else:
            raise
        raise HubUploadError(f"push to {repo_id}: {reason}; {consequence}{advice}") from error


def _line(error: BaseException | None) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------------- a Trainer
def trainer_card(
    trainer: Any,
    *,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | list[str] | None = None,
    **_: Any,
) -> bool:
    """Write ``README.md`` and its figure into the Trainer's output folder; an author's own card there gets tags alone.

    The arguments are those of ``Trainer.create_model_card``; of a PruningModel that has decided, the card is that of
    its small model. False, and nothing is written, where the model is not pruned.
    """
    model: Any = trainer.model
    if hasattr(model, "pruning_config") and hasattr(model, "export"):
        if not model.method.decided:
            return False
        model = model.export()
    base = unwrap(model)
    if not any(is_pruned(base.get_submodule(tower.path).config) for tower in towers(base).values()):
        return False
    folder = Path(trainer.args.output_dir)
    path, more = folder / CARD, [tags] if isinstance(tags, str) else list(tags or [])
    if path.is_file():
        _tagged(ModelCard.load(path), more).save(path)
        return True
    logs: dict[str, Any] = next((row for row in reversed(trainer.state.log_history) if "eval_loss" in row), {})
    named = next(iter([dataset] if isinstance(dataset, str) else dataset or []), None)
    metrics = metrics_of(logs)
    card = model_card(
        model,
        base_model=finetuned_from,
        after=metrics or None,
        dataset=named or (UNNAMED if metrics else None),
        license=license,
        tags=more,
        repo_id=trainer.hub_model_id or trainer.args.hub_model_id or None,
        plot=draw(base, folder),
        beside=beside(folder),
    )
    if model_name:
        card.data.model_name = model_name  # type: ignore[attr-defined]
    card.save(path)
    return True


register("upload", push_to_hub)
register("card", trainer_card)
