"""The rows of a card's table: every model from the dense one to this, each with its own size and its own metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cost import count
from ..spec.architecture import Architecture

if TYPE_CHECKING:
    from ..latency.measure import Timing

_TIMES = ("once", "twice")


def stage_rows(
    architecture: Architecture,
    dense: Architecture | None,
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    timings: Mapping[str, Timing] | None,
    *,
    given: bool = False,
    dataset: str | None = None,
) -> list[dict[str, Any]]:
    """Rows for ``comparison_markdown``.

    Args:
        architecture: of this model.
        dense: of the dense model, where it is another and is known.
        history: what the record says of the models before this one.
        before, after, timings: as in ``model_card``. What is before is ``dense`` where the caller ``given`` it, else
            what was pruned last: a model pruned twice was pruned from a smaller one than its dense model.
        given: whether the caller said which model is the dense one.
        dataset: of the metrics; those of earlier models on other data are left out.
    """
    earlier = [_row(entry, dataset) for entry in history]
    known = [] if dense is None else [_size(count(dense)._asdict())]
    place = next((i for i, entry in enumerate(history) if [_size(entry)] == known), None) if given else -1
    if place is None or not earlier:
        earlier, place = known or [{}], 0
    earlier[place] |= {**(before or {}), **({} if timings is None else _timed(timings, "before"))}
    rows = [
        {"name": _name(i, len(earlier)), **row}
        for i, row in enumerate(earlier)
        if row and (i in (0, len(earlier) - 1) or len(row) > 2)
    ]
    own = {**_size(count(architecture)._asdict()), **(after or {})}
    return [*rows, {"name": "after", **own, **({} if timings is None else _timed(timings, "after"))}]


def _row(entry: Mapping[str, Any], dataset: str | None) -> dict[str, Any]:
    same = dataset is not None and entry.get("dataset") == dataset
    return {**_size(entry), **(entry.get("metrics", {}) if same else {})}


def _size(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("params", "macs")}


def _timed(timings: Mapping[str, Timing], name: str) -> dict[str, float]:
    seconds = timings[name].seconds
    return {"latency_ms": seconds * 1000, "speedup": timings["before"].seconds / seconds}


def _name(i: int, total: int) -> str:
    if total < 2:
        return "before"
    return "dense" if i == 0 else f"pruned {_TIMES[i - 1] if i <= len(_TIMES) else f'{i} times'}"
