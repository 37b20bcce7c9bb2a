"""Rounds of a measurement: everything in turn, and a run that was cut off goes on."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vitprune.errors import LatencyTableError
from hf_vitprune.latency import measure


# ---------------------------------------------------------------------- rounds
class Interrupted(Exception):
    pass


def timer(stop_after: int | None = None) -> tuple[Callable[..., float], list[Any]]:
    """A clock that counts, and breaks down after so many samples."""
    calls: list[Any] = []

    def sample(call: Any, device: torch.device, repeats: int) -> float:
        if stop_after is not None and len(calls) >= stop_after:
            raise Interrupted
        calls.append(call)
        return 1.0 + len(calls)

    return sample, calls


def run_rounds(partial: Path | None, header: Any = None) -> list[list[float]]:
    calls = [functools.partial(str, i) for i in range(4)]
    kept = None if partial is None else measure.PartialFile(partial, header or {"grid": 1})
    return measure.timed_rounds(calls, 3, torch.device("cpu"), 0.0, kept=kept, progress=False, shuffled=True)


def test_rounds_take_everything_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "warm_up", lambda *_: 1)
    sample, calls = timer()
    monkeypatch.setattr(measure, "sample", sample)
    done = run_rounds(None)
    order = [call.args[0] for call in calls]
    turns = [order[i : i + 4] for i in range(0, 12, 4)]
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in turns) and len({tuple(turn) for turn in turns}) > 1
    assert [[row[i] for i in turn] for row, turn in zip(done, turns, strict=True)] == [
        [2, 3, 4, 5],
        [6, 7, 8, 9],
        [10, 11, 12, 13],
    ]


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "warm_up", lambda *_: 1)
    file = tmp_path / "deep" / "table.partial"
    monkeypatch.setattr(measure, "sample", timer(stop_after=6)[0])
    with pytest.raises(Interrupted):
        run_rounds(file)
    kept = json.loads(file.read_text())["rounds"]
    assert len(kept) == 1
    sample, calls = timer()
    monkeypatch.setattr(measure, "sample", sample)
    with pytest.raises(LatencyTableError, match="another measurement.*grid.*delete it"):
        run_rounds(file, header={"grid": 2})
    done = run_rounds(file)
    assert done[0] == kept[0] and len(done) == 3 and len(calls) == 8
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"header": {}}', '{"header": {"grid": 1}, "rounds": [["x"]]}'])
def test_damaged_partial_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "table.partial"
    file.write_text(text)
    with pytest.raises(LatencyTableError, match="damaged.*delete it"):
        run_rounds(file)
    assert file.read_text() == text
