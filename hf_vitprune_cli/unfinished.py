"""A training that was cut off: what it leaves in the folder to write, and how it is taken up again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune

from .app import SETTINGS, UNFINISHED


class Unfinished:
    """The small model that a training starts with, its plan, and the training's checkpoints.

    Args:
        out: folder of the finished model.
        settings: of the whole run, ready for JSON; a run with others does not go on with what is there.

    Raises:
        InvalidConfigError: what is there is of a run with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.folder = out / UNFINISHED
        self.settings = json.loads(json.dumps(settings, default=str))
        self._start, self._plan, self._file = (
            self.folder / name for name in ("start.safetensors", "plan.json", SETTINGS)
        )
        if self._file.exists():
            before = json.loads(self._file.read_text())
            changed = [key for key, value in self.settings.items() if before.get(key) != value]
            if changed:
                raise InvalidConfigError(
                    f"{out} holds a training that was cut off and had other settings ({changed[0]}: "
                    f"{before.get(changed[0])!r}, not {self.settings[changed[0]]!r}): give those, or --force to start "
                    "anew"
                )

    @property
    def has_start(self) -> bool:
        """Whether the model was pruned and compensated already."""
        return self._file.exists()

    def load(self, dense: Any) -> tuple[PruningPlan, Any]:
        """The plan, and the small model that the training starts with."""
        plan = PruningPlan.load(self._plan)
        small = prune(dense, plan)
        load_model(small, str(self._start))
        return plan, small

    def save(self, plan: PruningPlan, small: Any) -> None:
        """What the training starts with, unless it is there."""
        if self.has_start:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(small, str(self._start))
        plan.save(self._plan)
        self._file.write_text(json.dumps(self.settings, indent=1))  # last: with it, the start is whole

    def remove(self) -> None:
        """It is finished."""
        shutil.rmtree(self.folder)
