"""Reading other people's ``.pth`` files: tensors only, never code."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path

import torch

from ..errors import CheckpointMismatchError, UnsafeCheckpointError


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.pth`` file, whether bare or under ``model`` or ``state_dict``.

    Only tensors and plain data are read, such as the ``argparse.Namespace`` that DeiT's training code adds.

    Raises:
        UnsafeCheckpointError: the file could only be read by running code that it brings.
        CheckpointMismatchError: it holds no state dict.
        OSError: there is no such file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            record = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, IndexError) as error:
        code = re.search(r"GLOBAL ([\w.]+)|unrecognized function", str(error))
        if code is None:
            raise CheckpointMismatchError(f"{path} is no checkpoint of PyTorch, or a damaged one") from error
        raise UnsafeCheckpointError(
            f"{path} can only be read by running code ({code[1] or 'a function'}), which is refused. If you trust it, "
            "keep its tensors alone: torch.save(torch.load(path, weights_only=False)['model'], new_path)"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(record, dict) and isinstance(record.get(key), dict):
            record = record[key]
    if not isinstance(record, dict) or not record or not all(isinstance(t, torch.Tensor) for t in record.values()):
        raise CheckpointMismatchError(f"{path} holds no state dict, neither bare nor under 'model' or 'state_dict'")
    return record
