"""Results of an evaluation in a JSON file, as ``evaluate.save`` writes it, and what they are of."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InvalidDataError, MissingExtraError

#: name under which a model's folder has its results, for cards and reports to find
RESULTS = "results.json"
_WEIGHTS = ("*.safetensors", "base/*.safetensors", "*.onnx", "*.onnx.data", "*.bin", "*.pte")


def check_can_save() -> None:
    """Refuse before any work what ``evaluate.save`` would fail at.

    Raises:
        MissingExtraError: there is no git, which it asks for the commit.
    """
    if shutil.which("git") is None:
        raise MissingExtraError("evaluate.save asks git for the commit that is checked out: install git")


def save_results(path: str | Path, results: Mapping[str, Any]) -> Path:
    """Write results with ``evaluate.save``, which adds time, commit and versions.

    Args:
        path: a file, or a folder to write ``results.json`` into.
        results: JSON data; ``metrics`` maps names to numbers.
    """
    import evaluate

    path = Path(path)
    said = os.dup(2)
    try:  # outside of a repository git says "fatal: not a git repository", which nothing is wrong with
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        return Path(evaluate.save(path if path.suffix else path / RESULTS, **results))
    finally:
        os.dup2(said, 2)
        os.close(said)


def load_results(path: str | Path) -> dict[str, Any]:
    """The results of a file that :func:`save_results` wrote.

    Raises:
        InvalidDataError: it has none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidDataError(f"{path} has no results: {error}; hf-vitprune evaluate --out writes them") from error
    metrics = found.get("metrics") if isinstance(found, dict) else None
    if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise InvalidDataError(f"{path} has no results of hf-vitprune evaluate: there is no 'metrics' in it")
    return found


def results_of(folder: str | Path) -> dict[str, Any] | None:
    """The results that a model's folder has of these very weights; None where it has none, or of other weights."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        return None
    found = load_results(path)
    return found if found.get("weights") == weights_digest(folder) else None


def weights_digest(folder: str | Path) -> str | None:
    """A digest of all files of weights in a folder, by which results belong to them; None where there is none."""
    files = sorted({file for pattern in _WEIGHTS for file in Path(folder).glob(pattern)})
    if not files:
        return None
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()[:16]
