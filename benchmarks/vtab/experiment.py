"""One cell of a sweep: adapt, prune, retrain, test; twice, to report the last epoch and the best one on val200."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict
from importlib.metadata import distributions
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoImageProcessor

from hf_vitprune import Architecture, SLSConfig, select_layers, truncate
from hf_vitprune.contrib.retraining import fresh_adapters
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.families import family_of
from hf_vitprune.families.base import pair
from hf_vitprune.latency.measure import environment

from .adapters import FULL, adapt, load_pretrained, load_trained, set_trainable, trained_tensors
from .costs import sizes_of, speed_of
from .data import TaskData
from .images import Checkpoint, Examples, Literature, Preprocessing
from .pruning import LEARNED, Choice, Pruned, Situation, apply
from .settings import LAST, RESULTS, Machine, Recipe, Run, Settings
from .store import Store
from .tasks import TEST, TRAIN, VALIDATION
from .training import Trained, accuracy, train


class Experiment:
    """Runs on one task; adapted models and decisions are kept in the store, and taken from there when they exist."""

    def __init__(self, settings: Settings, data: TaskData, store: Store, machine: Machine) -> None:
        self.settings, self.data, self.store, self.machine = settings, data, store, machine
        self.preprocessing = preprocessing_of(settings)
        self._sets: dict[str, Examples] = {}

    def examples(self, split: str) -> Examples:
        """Training splits are kept in memory; the test split may be a fixed part of all."""
        if split not in self._sets:
            images = self.data.splits[split]
            if split == TEST:
                images = images.fixed_subset(self.settings.test_limit)
            self._sets[split] = Examples(images, self.preprocessing, keep=split != TEST)
        return self._sets[split]

    # ------------------------------------------------------------------ the run
    def record(self, run: Run) -> dict[str, Any]:
        """All there is to say of a run, JSON-ready."""
        start = time.perf_counter()
        results = {name: self._result(run, split) for name, split in self._wanted.items()}
        return {
            **asdict(run),
            "group": self.data.task.group,
            "reported_as": self.data.title,
            "settings": self.settings.to_dict(),
            "data": {
                "source": self.data.source,
                "deviations": list(self.data.deviations),
                "test_images": len(self.examples(TEST)),
                "of_test_images": len(self.data.splits[TEST]),
            },
            "results": results,
            "seconds": time.perf_counter() - start,
            "environment": {**environment(self.device), **_versions()},
        }

    @property
    def _wanted(self) -> dict[str, str]:
        """Results that are reported -> the images that they are trained on."""
        return {name: split for name, split in RESULTS.items() if name == LAST or self.settings.selection}

    def _result(self, run: Run, split: str) -> dict[str, Any]:
        """Of one whole pipeline on one set of training images: accuracies, the decision, and what the model costs."""
        model, before = self.adapted(run, split)
        result: dict[str, Any] = {"accuracy_before": before["accuracy"], "layers": len(Architecture.of(model).layers)}
        start = time.perf_counter()
        pruned = apply(Choice.parse(run.pruning), self._situation(run, split, model))
        result |= {"kept_layers": pruned.kept_layers, "decision": pruned.info}
        result["seconds_to_prune"] = time.perf_counter() - start
        small = None if pruned.model is None else set_trainable(pruned.model, run.peft)
        if small is None:
            result |= {name: before[name] for name in ("accuracy", "epoch", "validation")}
        else:
            if not pruned.fresh:
                result["accuracy_truncated"] = self._test(small)
            small, trained = self._retrained(run, small, pruned, split)
            if trained is None:
                result |= {"accuracy": result["accuracy_truncated"], "epoch": 0, "validation": []}
            else:
                result |= {"accuracy": self._test(small), "epoch": trained.epoch, "validation": trained.validation}
                result["seconds_to_retrain"] = trained.seconds
        shared = pruned.shared_backbone and run.peft != FULL
        sizes = sizes_of(model, model if small is None else small, shared, self.settings.image_size)
        return {**result, "cost": {**sizes, **self._speed(model, small)}}

    # ------------------------------------------------------------------ the parts
    def _situation(self, run: Run, split: str, model: Any) -> Situation:
        return Situation(
            run,
            copy.deepcopy(model),
            self.examples(split),
            self.settings.recipe,
            self.machine,
            lambda alpha: self.selection(run, split, alpha, model),
        )

    def adapted(self, run: Run, split: str) -> tuple[Any, dict[str, Any]]:
        """(adapted model, its record): trained now, or taken from the store."""
        name = f"{run.adapted_name}--{split}"
        recipe, images = self.settings.recipe, self.examples(split)
        model = self._adapters(run, self.pretrained(run), recipe.steps(len(images)))
        known = self.store.load_adapted(name)
        if known is not None:
            tensors, record = known
            return load_trained(model, tensors).to(self.device), record
        trained = self._train(model, recipe, split, run, "")
        record = {"accuracy": self._test(model), **asdict(trained)}
        self.store.save_adapted(name, trained_tensors(model), record)
        return model, record

    def _adapters(self, run: Run, base: Any, steps: int) -> Any:
        """The model made trainable in the run's way."""
        task = run.task if self.settings.published else None
        return adapt(base, run.peft, rank=self.settings.rank, steps=steps, seed=run.seed, published_for=task)

    def selection(self, run: Run, split: str, alpha: float | None, model: Any) -> dict[str, Any]:
        """SLS's decision on the adapted model, made once for all runs that need it."""
        config = SLSConfig(alpha=self.settings.alpha if alpha is None else alpha)
        folder = self.store.adapted(f"{run.adapted_name}--{split}")

        def decide() -> dict[str, Any]:
            start = time.perf_counter()
            selection = select_layers(model, self.examples(split), config)
            return {**selection.to_dict(), **config.to_dict(), "seconds": time.perf_counter() - start}

        return self.store.once(folder / f"sls-alpha{config.alpha}.json", decide)

    def _retrained(self, run: Run, small: Any, pruned: Pruned, split: str) -> tuple[Any, Trained | None]:
        """(model, how its retraining went); the model that comes in, and None, where there is no retraining."""
        settings = self.settings
        epochs = settings.recipe.epochs if settings.retraining_epochs is None else settings.retraining_epochs
        if epochs == 0:
            return small, None
        recipe = settings.recipe.of_length(epochs)
        fresh = pruned.fresh or settings.retraining == "tfs"
        if fresh and not pruned.shared_backbone:
            small = fresh_adapters(small, run.seed)
        elif fresh:
            base = truncate(self.pretrained(run), pruned.kept_layers)
            steps = recipe.steps(len(self.examples(split)))
            small = self._adapters(run, base, steps)
        more = {"keep_zero_ranks": not fresh, "schedule": "TFS" if fresh else settings.retraining.upper()}
        return small, self._train(small, recipe, split, run, f", {run.pruning}, retraining", **more)

    def _train(self, model: Any, recipe: Recipe, split: str, run: Run, what: str, **more: Any) -> Trained:
        validation = self.examples(VALIDATION) if split == TRAIN else None
        told = {"seed": run.seed, "machine": self.machine, "what": f"{self.data.title}: {run.peft}{what}"}
        return train(model, self.examples(split), recipe, validation=validation, **told, **more)

    def _test(self, model: Any) -> float:
        batch_size = self.settings.recipe.batch_size
        return accuracy(model, self.examples(TEST), batch_size=batch_size, machine=self.machine)

    def pretrained(self, run: Run) -> Any:
        """The pretrained model with a new head."""
        return load_pretrained(self.settings.model, self.data.task.classes, run.seed, self.settings.image_size)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.machine.cpu else PartialState().device

    def _speed(self, adapted: Any, small: Any) -> dict[str, Any]:
        return speed_of(adapted, small, self.settings, progress=self.store.main)

    def speed(self, run: Run) -> dict[str, dict[str, Any]]:
        """Speed of a finished run's model, measured again: result -> numbers. Its shape is made anew, no weights."""
        choice = Choice.parse(run.pruning)
        if choice.name in LEARNED:
            raise InvalidConfigError(f"{run.name}: the shape comes out of a training, which is not repeated")
        measured = {}
        for name, split in self._wanted.items():
            model, _ = self.adapted(run, split)
            measured[name] = self._speed(model, apply(choice, self._situation(run, split, model)).model)
        return measured


def preprocessing_of(settings: Settings) -> Preprocessing:
    """What makes tensors of images."""
    if settings.preprocessing == "checkpoint":
        return Checkpoint(AutoImageProcessor.from_pretrained(settings.model))
    if settings.image_size is not None:
        return Literature(settings.image_size)
    config = AutoConfig.from_pretrained(settings.model)
    height, width = pair(family_of(config).sizes_config(config).image_size)
    if height != width:
        raise InvalidConfigError(
            f"{settings.model} takes images of {height} x {width}: say --image-size, or --preprocessing checkpoint"
        )
    return Literature(height)


def _versions() -> dict[str, str]:
    names = ("hf_vitprune", "peft", "accelerate", "scikit-learn", "torch-pruning")
    known = {one.metadata["Name"].lower(): one.version for one in distributions()}
    return {name: known[name] for name in names if name in known}
