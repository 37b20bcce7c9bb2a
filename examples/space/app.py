"""A Space that cuts a vision model on the spot: an image, a slider for the budget, dense and small side by side.

Settings are environment variables (on the Hub: the Space's variables):
    MODEL_ID: folder of the dense model, or its id on the Hub; with an image processor.
    SCORES: file that ``hf-vitprune prune MODEL OUT --images FOLDER --scores FILE`` wrote; or its name in the model's
        repository. ``scores.safetensors`` by default.
    PART: which tower of a bigger model; its only one by default.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps

from hf_vitprune import Architecture, OneShotScores, count, prune
from hf_vitprune.errors import InvalidConfigError, UnreachableTargetError
from hf_vitprune.latency.measure import device_name, measure_speed
from hf_vitprune.losses.features import FeatureReader
from hf_vitprune.methods.oneshot import check_target
from hf_vitprune.publish.report import comparison_cells, markdown_table
from hf_vitprune.spec.towers import tower_module
from hf_vitprune_cli.saved import load_any_config, load_processor, model_class_of

#: small models that are kept: a slider goes back and forth
KEPT = 6
ROUNDS = 5
#: colours of low, middle and high norms
COLOURS = {"black": "#08203e", "mid": "#2a9d8f", "white": "#fff3c4"}


class Cut(NamedTuple):
    """A small model with its row of the table, and the dense model's row that was measured beside it."""

    model: Any
    rows: list[dict[str, Any]]


class Cuts:
    """The dense model and its scores, and small models cut from them when they are asked for.

    Args:
        model_id, scores, part: see above.

    Raises:
        UnsupportedModelError: the model reads something else than images.
        InvalidDataError: the scores are of another model.
        InvalidConfigError: no budget can be reached.

    Attributes:
        percentages: of the multiply-adds that can be asked for.
        can_fit: whether the scores hold what :meth:`OneShotScores.compensate` works from.
    """

    def __init__(self, model_id: str, scores: str = "scores.safetensors", part: str | None = None) -> None:
        self.name, self.part = model_id, part
        self.dense: Any = model_class_of(load_any_config(model_id)).from_pretrained(model_id).eval()
        self.processor = load_processor(model_id)
        self.scores = OneShotScores.load(_scores_file(model_id, scores))
        self.scores.check(self.dense)
        self.scores.architecture.check_looks("this app")
        self.can_fit = self.scores.settings.statistics
        self.is_classifier = "ForImageClassification" in type(self.dense).__name__
        self.percentages = [p for p in range(5, 100, 5) if self._reachable(p)]
        if not self.percentages:
            raise InvalidConfigError(f"{model_id} has no budget under 100% that can be reached")
        self.cut = lru_cache(maxsize=KEPT)(self._cut)

    def _reachable(self, percent: int) -> bool:
        try:
            check_target(self.scores.architecture, self.scores.settings, target=percent / 100)
        except UnreachableTargetError:
            return False
        return True

    def _cut(self, percent: int, fitted: bool) -> Cut:
        plan = self.scores.plan(percent / 100)
        small = prune(self.dense, self.scores.compensate(self.dense, plan) if fitted else plan)
        towers = {"dense": tower_module(self.dense, self.part), "small": tower_module(small, self.part)}
        timings = measure_speed(towers, batch_size=1, rounds=ROUNDS, progress=False)
        rows = []
        for name, tower in towers.items():
            cost = count(Architecture.of(tower))
            timing = timings[name]
            row = {"name": name, "params": cost.params, "macs": cost.macs}
            rows.append(row | {"latency_ms": 1e3 * timing.seconds, "speedup": timing.speedup})
        return Cut(small, rows)

    @torch.no_grad()
    def show(self, image: Image.Image | None, percent: int, fitted: bool) -> tuple[Any, Any, str]:
        """What dense and small model make of an image, and the table."""
        cut = self.cut(int(percent), bool(fitted))
        if image is None:
            return None, None, numbers(cut.rows)
        pixels = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        if self.is_classifier:
            dense, small = (self._classes(model, pixels) for model in (self.dense, cut.model))
            return dense, small, numbers(cut.rows)
        (dense, a), (small, b) = (self._features(model, pixels) for model in (self.dense, cut.model))
        rows = [dict(row) for row in cut.rows]
        if a.shape == b.shape:
            rows[1]["cosine of the tokens"] = float(torch.cosine_similarity(a, b, dim=-1).mean())
        return dense, small, numbers(rows)

    def _classes(self, model: Any, pixels: torch.Tensor) -> dict[str, float]:
        shares = model(pixel_values=pixels).logits[0].softmax(-1)
        return {str(self.dense.config.id2label[i]): float(share) for i, share in enumerate(shares)}

    def _features(self, model: Any, pixels: torch.Tensor) -> tuple[Image.Image, torch.Tensor]:
        """A picture of how long every patch's token is, and the tokens (patches, channels)."""
        reader = FeatureReader(model, part=self.part)
        with reader.reading() as states:
            reader.tower(pixel_values=pixels)
        (tokens,) = states.values()
        family, height, width = reader.architecture.family, *pixels.shape[-2:]
        tokens = tokens[0, family.extra_tokens_of(reader.architecture.config) :]
        rows = round((len(tokens) * height / width) ** 0.5)
        norms = tokens.norm(dim=-1).reshape(rows, -1)
        norms = (norms - norms.min()) / (norms.max() - norms.min()).clamp(min=1e-12)
        grey = Image.fromarray((255 * norms).byte().numpy()).resize((2 * width, 2 * height), Image.Resampling.NEAREST)
        return ImageOps.colorize(grey, **COLOURS), tokens


def _scores_file(model_id: str, scores: str) -> str:
    for path in (Path(scores), Path(model_id) / scores):
        if path.is_file():
            return str(path)
    if Path(model_id).is_dir():
        raise FileNotFoundError(f"there is no {scores}, here or in {model_id}: set SCORES")
    return hf_hub_download(model_id, scores)


def numbers(rows: list[dict[str, Any]]) -> str:
    """A table of markdown with a model a column: it fits on a phone."""
    return markdown_table([list(column) for column in zip(*comparison_cells(rows), strict=True)])


def build(cuts: Cuts) -> gr.Blocks:
    """The page."""
    lowest, highest = cuts.percentages[0], cuts.percentages[-1]
    middle = min(cuts.percentages, key=lambda p: abs(p - 50))
    what = "predictions" if cuts.is_classifier else "lengths of tokens"

    def picture(name: str) -> Any:
        label = f"{name}: {what}"
        return (
            gr.Label(num_top_classes=5, label=label)
            if cuts.is_classifier
            else gr.Image(label=label, format="png", buttons=["fullscreen"])
        )

    with gr.Blocks(title="Pruned on the spot", analytics_enabled=False) as page:
        gr.Markdown(
            f"# Pruned on the spot\n`{cuts.name}`, cut by one-shot scores of {cuts.scores.images} unlabelled images: "
            "no training. Choose an image and a budget."
            + ("" if cuts.is_classifier else " Pictures show how long the token of every patch is; dark is short.")
        )
        with gr.Row():
            image = gr.Image(type="pil", label="Image", sources=["upload", "clipboard"], height=320)
            with gr.Column():
                budget = gr.Slider(lowest, highest, middle, step=5, label="Multiply-adds that may remain (%)")
                fitted = gr.Checkbox(
                    cuts.can_fit, label="Make up for what is removed (compensation)", interactive=cuts.can_fit
                )
                table = gr.Markdown(elem_id="numbers", label="Cost")
                threads = torch.get_num_threads()
                gr.Markdown(f"Latency: one image, {device_name()}, {threads} thread{'s' if threads > 1 else ''}.")
        with gr.Row():
            dense, small = picture("Dense"), picture("Small")
        gr.on(
            [page.load, image.change, budget.change, fitted.change],
            cuts.show,
            [image, budget, fitted],
            [dense, small, table],
            trigger_mode="always_last",
        )
    return page


def main() -> None:
    """Start the app.

    Raises:
        InvalidConfigError: MODEL_ID is not set.
    """
    if not os.environ.get("MODEL_ID"):
        raise InvalidConfigError("set MODEL_ID to the dense model: a folder, or an id on the Hub")
    cuts = Cuts(os.environ["MODEL_ID"], os.environ.get("SCORES", "scores.safetensors"), os.environ.get("PART") or None)
    build(cuts).launch(ssr_mode=False, footer_links=["gradio"])


if __name__ == "__main__":
    main()
