"""``hf-vitprune prune --train none``: unlabelled images, or the scores of an earlier run, to a small model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidConfigError


@dataclass
class OneShotRun:
    """The options of a run, as ``prune`` takes them."""

    model: str | None
    output: Path | None
    images: Path | None
    num_images: int
    scores: Path | None
    save_scores: Path | None
    goal: dict[str, Any]
    round_to: int
    batch_size: int
    seed: int
    force: bool

    def run(self) -> None:
        """Prune, save and print what came of it."""
        from rich.console import Console

        from ..compensate import Compensation
        from ..latency.measure import device_name, measure_speed
        from ..methods import OneShotSettings
        from ..methods.oneshot import check_target
        from ..pruning import prune
        from ..publish.report import comparison_table
        from ..spec.architecture import Architecture
        from .app import empty_output, load_config, model_class_of
        from .workflow import PrunedResult, model_row, save_result

        self._check()
        name = self.model or self._recorded_model()
        output = self.output or Path(f"{Path(name).name}-{self.goal['target']:g}")
        for path in filter(None, (output, self.save_scores)):
            empty_output(path, self.force)
        dense: Any = model_class_of(load_config(name)).from_pretrained(name).eval()
        processor = self._processor(name)
        check_target(Architecture.of(dense), OneShotSettings(), round_to=self.round_to, **self.goal)
        scores, pixels = self._scores(dense, name, processor)
        plan = scores.plan(round_to=self.round_to, **self.goal)
        if pixels is None:
            small = prune(dense, scores.compensate(dense, plan))
        else:
            everything = Compensation(images=None, batch_size=self.batch_size)
            small = prune(dense, plan, calibration=pixels, compensate=everything)
        timings = measure_speed({"dense": dense, "pruned": small}, batch_size=8)
        rows = [model_row(key, model, None, timings[key]) for key, model in (("dense", dense), ("pruned", small))]
        macs, params = (rows[1][key] / rows[0][key] for key in ("macs", "params"))
        result = PrunedResult(small, plan, {}, macs, params)
        pair = {"before": timings["dense"], "after": timings["pruned"]}
        save_result(output, result, processor, pair, dataset=None, base_model=name)
        console = Console()
        console.print(comparison_table(rows, title=f"{name}, measured on {device_name()}, batch 8"))
        seen = f"{scores.images} unlabelled images" + (f" seen when {self.scores} was made" if pixels is None else "")
        console.print(f"saved to {output}: pruned without training, from {seen}", highlight=False, soft_wrap=True)

    def _check(self) -> None:
        """Raises:
        InvalidConfigError: there is nothing to score by, or two things.
        """
        if (self.images is None) == (self.scores is None):
            raise InvalidConfigError(
                "--train none needs --images FOLDER (unlabelled images) or --scores FILE (what --save-scores wrote), "
                f"{'and takes only one of them' if self.images else 'got neither'}"
            )
        if self.scores is not None and self.save_scores is not None:
            raise InvalidConfigError("--save-scores goes with --images: the scores are in a file already")
        if self.scores is None and self.model is None:
            raise InvalidConfigError("give the MODEL to prune: a folder or a Hub id")

    def _recorded_model(self) -> str:
        from ..methods import OneShotScores

        name = OneShotScores.load(self.scores or "").model
        if name is None:
            raise InvalidConfigError(f"{self.scores} does not say where its model is: give the MODEL too")
        return name

    def _processor(self, name: str) -> Any:
        """The image processor; None where the model has none and no image is read."""
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            if self.images is None:
                return None
            raise InvalidConfigError(
                f"{name} has no usable image processor (preprocessor_config.json), which images have to go through: "
                f"{error}"
            ) from error

    def _scores(self, dense: Any, name: str, processor: Any) -> tuple[Any, Any]:
        """(scores, images): of an earlier run and None, or new ones."""
        from ..methods import OneShotScores, OneShotSettings
        from ..utils.data import read_folder

        if self.scores is not None:
            found = OneShotScores.load(self.scores)
            found.check(dense)
            return found, None
        assert self.images is not None
        pixels = read_folder(self.images, processor, self.num_images, self.seed)
        keep = self.save_scores is not None
        settings = OneShotSettings(images=None, batch_size=self.batch_size, statistics=keep)
        found = OneShotScores.measure(dense, pixels, settings, name=name)
        if self.save_scores is not None:
            found.save(self.save_scores)
        return found, pixels
