"""The ways to prune, as a sweep names them (``sls``, ``truncate:k=6``, ...), and the smaller model that each gives."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import PartialState
from peft import PeftModel

from hf_vitprune import Architecture, PruningPlan, PruningTrainer, count, get_pruning_model, prune, truncate
from hf_vitprune.errors import InvalidConfigError, InvalidPlanError
from hf_vitprune.methods import config_class_of
from hf_vitprune.methods.depth import fewest_layers
from hf_vitprune_cli.progress import use_quiet_progress

from .adapters import FULL, set_trainable
from .depgraph import depgraph_plan, torch_pruning
from .settings import Machine, Recipe, Run

#: what follows SLS's decision for the same adapted model, and what follows from the run's name
SLS, RANDOM = "sls", "random"
#: methods of this library that learn what to prune
LEARNED = ("vtp", "nvit", "spvit")
#: settings of methods that learn, other than their target, for a number of steps; SPViT's gates may turn over and back
_LEARNED_SETTINGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "vtp": lambda _: {"gate_learning_rate": 1e-2},
    "spvit": lambda steps: {"gate_learning_rate": 12 / steps},
}
#: methods that make new layers of whole weights: adapters are merged for them, and every weight is trained
_OF_WHOLE_WEIGHTS = ("spvit",)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def _share_or_sls(text: str) -> float | str:
    return SLS if text == SLS else _share(text)


def _depth(text: str) -> Any:
    if text in (SLS, RANDOM):
        return text
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_SHARE: dict[str, Any] = {"read": _share_or_sls, "what": f"a number between 0 and 1, or {SLS}", "default": SLS}
_DEPTH: dict[str, Any] = {"read": _depth, "what": f"a number of layers, {RANDOM} or {SLS}", "default": SLS}
#: choice -> option -> how it is read, what it may be, and its default (None: left out; of SLS the sweep's)
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "sls": {"alpha": {"read": _share, "what": "a number between 0 and 1", "default": None}},
    "truncate": {"k": _DEPTH},
    "depgraph": {"ratio": _SHARE},
    **{name: {"target": _SHARE} for name in LEARNED},
}


@dataclass(frozen=True)
class Choice:
    """One way to prune, and its options, defaults filled in."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """From ``name`` or ``name:option=value``."""
        name, _, rest = text.partition(":")
        if name not in _OPTIONS:
            raise InvalidConfigError(f"there is no pruning {name!r}; there are {', '.join(_OPTIONS)}")
        known = _OPTIONS[name]
        options = {key: option["default"] for key, option in known.items() if option["default"] is not None}
        for part in rest.split(",") if rest else []:
            key, _, value = part.partition("=")
            if key not in known:
                raise InvalidConfigError(f"{name} has no option {key!r}; it has {', '.join(known) or 'none'}")
            try:
                options[key] = known[key]["read"](value)
            except ValueError:
                raise InvalidConfigError(f"{key} of {name} is {known[key]['what']}, not {value!r}") from None
        return cls(name, options)

    @property
    def label(self) -> str:
        """The text that :meth:`parse` reads, in one spelling."""
        options = ",".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.name}:{options}" if options else self.name

    def check_available(self) -> None:
        """Say at once (MissingExtraError) what this installation cannot do: DepGraph without Torch-Pruning."""
        if self.name == "depgraph":
            torch_pruning()


@dataclass(frozen=True)
class Situation:
    """What a choice may look at.

    ``model`` is adapted, and not changed, except by methods that learn while it trains on; ``examples`` have a fixed
    order; ``selection``: alpha (None: the sweep's) -> SLS's decision for the model, as a dict.
    """

    run: Run
    model: Any
    examples: Any
    recipe: Recipe
    machine: Machine
    selection: Callable[[float | None], dict[str, Any]]

    @property
    def layers(self) -> int:
        return len(Architecture.of(self.model).layers)

    def kept_by_sls(self) -> int:
        return self.selection(None)["kept_layers"]


@dataclass(frozen=True)
class Pruned:
    """What a choice gave: a smaller model (None where nothing is removed), its layers, how it was decided (JSON only).

    ``shared_backbone``: it is the pretrained one cut off above, so that a task stores what it trains, and a number.
    ``fresh``: retraining starts from the pretrained model cut to as many layers, with a new head and new adapters.
    """

    model: Any
    kept_layers: int
    info: dict[str, Any] = field(default_factory=dict)
    shared_backbone: bool = True
    fresh: bool = False


def apply(choice: Choice, situation: Situation) -> Pruned:
    """Prune an adapted model."""
    if choice.name == "none":
        return Pruned(None, situation.layers)
    if choice.name == "sls":
        selection = situation.selection(choice.options.get("alpha"))
        return _truncated(situation, selection["kept_layers"], selection)
    if choice.name == "truncate":
        return _truncated_at(choice.options["k"], situation)
    if choice.name == "depgraph":
        return _depgraph(choice.options["ratio"], situation)
    return _learned(choice.name, choice.options["target"], situation)


def _truncated(situation: Situation, kept: int, info: dict[str, Any]) -> Pruned:
    if kept == situation.layers:
        return Pruned(None, kept, info)
    return Pruned(truncate(situation.model, kept), kept, info)


def _truncated_at(depth: Any, situation: Situation) -> Pruned:
    """With the depth that SLS chooses, and the same start, it would be SLS again: that one starts afresh."""
    lowest, layers = fewest_layers(situation.model), situation.layers
    if depth == SLS:
        pruned = _truncated(situation, situation.kept_by_sls(), {"k": SLS})
        return replace(pruned, fresh=pruned.model is not None)
    if depth == RANDOM:
        digest = hashlib.sha256(situation.run.name.encode()).digest()  # the run alone decides
        depth = random.Random(int.from_bytes(digest[:8], "big")).randint(lowest, layers - 1)
        return _truncated(situation, depth, {"k": RANDOM, "lowest": lowest})
    if not lowest <= depth < layers:
        raise InvalidPlanError(f"k = {depth} is not among the depths of this model, {lowest} to {layers - 1}")
    return _truncated(situation, depth, {"k": depth})


def _depgraph(ratio: Any, situation: Situation) -> Pruned:
    if ratio == SLS:
        ratio = 1 - situation.kept_by_sls() / situation.layers
    if ratio == 0:
        return Pruned(None, situation.layers, {"ratio": 0.0})
    plan = depgraph_plan(situation.model, situation.examples, ratio)
    return Pruned(prune(situation.model, plan), situation.layers, dict(plan.info), shared_backbone=False)


def _learned(name: str, target: Any, situation: Situation) -> Pruned:
    """A method of this library, at the MACs of what SLS keeps by default; it learns for as long as the recipe says."""
    if target == SLS:
        kept = situation.kept_by_sls()
        if kept == situation.layers:
            return Pruned(None, kept, {"target": 1.0})
        plan = PruningPlan.dense(situation.model).keep_layers(range(kept))
        target = count(plan.architecture).macs / count(situation.model).macs
    settings = {"target": target, "target_metric": "macs"}
    if name in _LEARNED_SETTINGS:
        settings |= _LEARNED_SETTINGS[name](situation.recipe.steps(len(situation.examples)))
    model, info = situation.model, {"target": target, "method": name}
    if name in _OF_WHOLE_WEIGHTS and isinstance(model, PeftModel):
        model, info["adapters"] = set_trainable(model.merge_and_unload(), FULL), "merged"
    gated = get_pruning_model(model, config_class_of(name)(**settings))
    with tempfile.TemporaryDirectory() as folder:
        processes = PartialState().num_processes
        arguments = situation.machine.arguments(situation.recipe, situation.run.seed, folder, processes)
        trainer = PruningTrainer(gated, arguments, train_dataset=situation.examples)
        use_quiet_progress(trainer, f"{gated.pruning_config.method_name}: learning what to prune")
        trainer.train()
    small, plan = gated.export(compensate=False), gated.plan()  # choices are compared, and nothing else
    return Pruned(small, len(plan.layers), info, shared_backbone=False)


def check_possible(choice: Choice, settings: Any) -> None:
    """Refuse what can be seen to make no sense."""
    choice.check_available()
    if choice.name == "truncate" and choice.options["k"] == SLS and settings.retraining_epochs == 0:
        raise InvalidConfigError("truncate:k=sls starts from the pretrained model, so it needs retraining epochs")
