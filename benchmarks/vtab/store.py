"""The results folder: settings, adapted models and one JSON file a run. A file that is there is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save

from hf_vitprune.errors import InvalidConfigError, InvalidDataError

from ..common import write_atomically
from .settings import Run, Settings

FORMAT = 1


class Store:
    """Where a sweep keeps what it has done. Only the first process writes.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.main = PartialState().is_main_process

    # ------------------------------------------------------------------ settings
    def settings(self) -> Settings | None:
        """Those that the results here have; None where there are none yet."""
        path = self.folder / "settings.json"
        record = _record(path) if path.is_file() else None
        return None if record is None else Settings.from_dict({k: v for k, v in record.items() if k != "format"})

    def claim(self, settings: Settings) -> None:
        """Note the settings that all results here have, or compare with those noted."""
        ours = json.loads(json.dumps(settings.to_dict()))
        theirs = self.once(self.folder / "settings.json", lambda: ours)
        del theirs["format"]
        names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if names:
            rows = [f"{name} was {theirs.get(name)} and is {ours.get(name)}" for name in names]
            raise InvalidConfigError(
                f"{self.folder} holds results of other settings: {'; '.join(rows)}. Use another --output"
            )

    # ------------------------------------------------------------------ runs
    def path(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"

    def finished(self, run: Run) -> bool:
        """Whether there is a complete record of the run."""
        path = self.path(run)
        return path.is_file() and _record(path) is not None

    def write(self, run: Run, record: dict[str, Any]) -> None:
        self._write_for_all(self.path(run), record)

    def save_layers(self, run: Run, record: dict[str, Any]) -> None:
        """Keep what is known of the layers of an adapted model."""
        self._write_for_all(self.folder / "layers" / f"{run.adapted_name}.json", record)

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all runs, in the order of their names."""
        for path in sorted((self.folder / "runs").glob("*.json")):
            record = _record(path)
            if record is None:
                raise InvalidDataError(f"{path} is no complete record of a run: delete it, and run the sweep again")
            yield record

    # ------------------------------------------------------------------ adapted models
    def adapted(self, name: str) -> Path:
        """The folder of an adapted model's trained tensors."""
        return self.folder / "adapted" / name

    def load_adapted(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors, record) of an adapted model, or None where it has not been trained yet."""
        folder = self.adapted(name)
        record = _record(folder / "record.json") if (folder / "record.json").is_file() else None
        return None if record is None else (load_file(folder / "state.safetensors"), record)

    def save_adapted(self, name: str, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Keep an adapted model; the record is written last, and says that the tensors are complete."""
        folder = self.adapted(name)
        if self.main:
            write_atomically(folder / "state.safetensors", lambda file: file.write(save(tensors)))
        self._write_for_all(folder / "record.json", record)

    def once(self, path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record in a file; where there is none, the first process makes it, and all read it."""
        processes = PartialState()
        there = path.is_file() and _record(path) is not None
        processes.wait_for_everyone()  # all have looked before one writes
        if not there and self.main:
            self._write(path, make())
        processes.wait_for_everyone()
        record = _record(path) if path.is_file() else None
        if record is None:
            raise InvalidDataError(f"{path} is not there; do all processes see the same folder?")
        return record

    def _write_for_all(self, path: Path, record: dict[str, Any]) -> None:
        if self.main:
            self._write(path, record)
        PartialState().wait_for_everyone()

    def _write(self, path: Path, record: dict[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, **record}, indent=1, allow_nan=False)
        write_atomically(path, lambda file: file.write(text.encode()))


def _record(path: Path) -> dict[str, Any] | None:
    """A record, or None where the file is damaged or of another format."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) and record.get("format") == FORMAT else None
