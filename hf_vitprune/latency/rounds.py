"""Many things timed in turns, round after round, in a run that can be taken up where it was cut off."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import LatencyTableError
from .measure_time import sample, warm_up

#: one sample takes at least this long, by repeating
LEAST_SECONDS = {"cpu": 0.005}
LEAST_SECONDS_ELSEWHERE = 0.02


def timed_rounds(
    calls: Sequence[Callable[[], Any]],
    effort: Sequence[float],
    rounds: int,
    device: torch.device,
    header: Mapping[str, Any],
    partial: Path | None = None,
    progress: bool = True,
) -> list[list[float]]:
    """Seconds of every call in every round; each round takes all of them once, in an order of its own.

    Args:
        calls: what to time.
        effort: about how long each takes, in any unit: the progress bar's estimate of the time left goes by it.
        rounds: samples of every call.
        device: where the calls run.
        header: what the times are of, JSON-ready; a partial file of anything else is refused.
        partial: file that holds the finished rounds; taken up if it is there, removed at the end.
        progress: show a progress bar with the time left.

    Returns:
        One list a round, of one time a call.

    Raises:
        LatencyTableError: ``partial`` is damaged, or holds times of something else.
    """
    done = [] if partial is None else _finished_rounds(partial, dict(header), len(calls))[:rounds]
    least = LEAST_SECONDS.get(device.type, LEAST_SECONDS_ELSEWHERE)
    with (
        torch.inference_mode(),
        tqdm(
            total=sum(effort) * (rounds - len(done) + 1),
            desc="measuring",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
            disable=not progress,
            leave=False,
        ) as bar,
    ):
        repeats = []
        for call, share in zip(calls, effort, strict=True):
            repeats.append(warm_up(call, device, least) if len(done) < rounds else 1)
            bar.update(share)
        while len(done) < rounds:
            order = list(range(len(calls)))
            random.Random(len(done)).shuffle(order)
            row = [0.0] * len(calls)
            for i in order:
                row[i] = sample(calls[i], device, repeats[i])
                bar.update(effort[i])
            done.append(row)
            if partial is not None:
                _write(partial, {"header": dict(header), "rounds": done})
    if partial is not None:
        partial.unlink()
    return done


def _finished_rounds(path: Path, header: dict[str, Any], calls: int) -> list[list[float]]:
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text())
        theirs, rounds = record["header"], [[float(t) for t in row] for row in record["rounds"]]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise LatencyTableError(f"{path} is damaged ({error!r}); delete it to measure anew") from error
    differing = sorted(key for key in {*theirs, *header} if theirs.get(key) != header.get(key))
    if differing or any(len(row) != calls for row in rounds):
        raise LatencyTableError(
            f"{path} holds the first rounds of another measurement (other {', '.join(differing) or 'grid'}); delete "
            "it to measure anew"
        )
    return rounds


def _write(path: Path, record: Any) -> None:
    """All or nothing: a run that is killed leaves the rounds before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(record))
    os.replace(fresh, path)
