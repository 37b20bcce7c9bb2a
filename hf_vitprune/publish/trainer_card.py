"""The card that a ``PruningTrainer`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..spec.architecture import unwrap
from ..spec.configs import is_pruned
from ..spec.towers import towers
from ..utils.upload import register
from .card import CARD, model_card


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

    Args:
        trainer: a PruningTrainer; of a PruningModel that has decided, the card is that of its small model.
        license, tags, model_name, finetuned_from, dataset: as ``Trainer.create_model_card`` takes them.

    Returns:
        False, and nothing is written, where the model is not pruned.
    """
    from .kept import UNNAMED, beside, draw, metrics_of  # the import of the package is quick

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
        card = ModelCard.load(path)
        own: Any = card.data
        own.tags = list(dict.fromkeys([*(own.tags or []), *more]))
        card.save(path)
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


register("card", trainer_card)
