"""Adapters and recipes that name modules as transformers 4 did (``query``), where PEFT would find nothing."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.save_and_load import load_peft_weights
from transformers.core_model_loading import revert_weight_conversion

from ..errors import AdapterError
from ..modeling.peft_twin import shadow
from ..modeling.portable_record import stock_class_of
from ..spec.architecture import unwrap
from .kinds import kind_of

logger = logging.getLogger(__name__)


def translate_peft_config(config: Any, model: Any) -> Any:
    """The config with today's names of modules, for a recipe or an adapter written for transformers 4.

    Translated are ``target_modules`` (lists and regular expressions), ``exclude_modules``, ``layers_to_transform``,
    ``modules_to_save``, ``feedforward_modules``, and the patterns of ranks and alphas. A warning says what became of
    them.

    Args:
        config: of LoRA or any other method that targets modules; it stays as it is, and a copy is given back.
        model: the transformers model it is meant for.

    Raises:
        AdapterError: the names fit the model neither way.
    """
    made = copy.deepcopy(config)
    targets = getattr(made, "target_modules", None)
    base = unwrap(model)
    old = old_names(base)
    if not targets or targets == "all-linear":
        return made
    now = [name for name in old if check_target_module_exists(config, name)]
    then = [name for name, was in old.items() if check_target_module_exists(config, was)]
    if not now and not then:
        linears = [name for name, module in base.named_modules() if hasattr(module, "in_features")]
        examples = ", ".join(list(dict.fromkeys(name.rpartition(".")[2] for name in linears))[:8])
        raise AdapterError(
            f"target_modules {targets!r} name no module of this {type(base).__name__}, neither by its names in "
            f"transformers 5 nor in 4; its Linears are called {examples}"
        )
    if not _speaks_of_old(config, old, now, then):
        return made
    both = {name: old[name] if name in then else name for name in old if name in now or name in then}
    made.target_modules = _short(both, old)
    made.exclude_modules = made.layers_to_transform = made.layers_pattern = None
    if getattr(made, "feedforward_modules", None):
        forward = copy.copy(config)
        forward.target_modules, forward.exclude_modules = config.feedforward_modules, None
        made.feedforward_modules = {name for name, was in both.items() if check_target_module_exists(forward, was)}
        made.target_modules = set(both)  # IA3 wants one to be part of the other
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(made, field, None)
        if pattern:
            renamed: dict[str, Any] = {}
            for name, was in both.items():  # one by one: two names of today may have one old name
                renamed |= kind_of(config).renamed_pattern(field, pattern, {was: name})
            setattr(made, field, renamed)
    if getattr(made, "modules_to_save", None):
        made.modules_to_save = _renamed_modules(made.modules_to_save, old)
    logger.warning(
        "target_modules %s are names of transformers 4; on this %s they are %s",
        sorted(targets) if isinstance(targets, (list, set)) else repr(targets),
        type(base).__name__,
        sorted(made.target_modules)[:8],
    )
    return made


def load_old_adapter(model: Any, folder: str | Path, adapter_name: str = "default", **kwargs: Any) -> PeftModel:
    """``PeftModel.from_pretrained`` for an adapter that was saved under transformers 4. One of today loads as well.

    Saving the result (``save_pretrained``) writes today's names. Arguments are those of ``PeftModel.from_pretrained``.

    Raises:
        AdapterError: it is for another kind of model, or for Linears that are two today (DINOv2's ``weights_in``).
    """
    where = PeftConfig._split_kwargs(kwargs)[0]  # a revision, a subfolder, ...
    config = translate_peft_config(PeftConfig.from_pretrained(str(folder), **where), model)
    tensors = load_peft_weights(str(folder), device="cpu", **where)
    places = _places(tensors, old_names(unwrap(model)))
    mapping = {rf"^{re.escape(was)}\.": f"{name}." for was, name in places.items()}
    loaded = PeftModel.from_pretrained(
        model, str(folder), adapter_name=adapter_name, config=config, key_mapping=mapping or None, **kwargs
    )
    there = get_peft_model_state_dict(loaded, adapter_name=adapter_name)
    renamed = {_renamed(key, places) for key in tensors}
    if renamed != there.keys():
        lost, fresh = sorted(renamed - there.keys()), sorted(there.keys() - renamed)
        raise AdapterError(
            f"the adapter does not fit this {type(unwrap(model)).__name__}: {len(lost)} of its tensors found no place "
            f"({', '.join(lost[:2])}), {len(fresh)} places found no tensor ({', '.join(fresh[:2])})"
        )
    return loaded


def old_names(model: Any) -> dict[str, str]:
    """Name of every module -> its name in transformers 4, which files still have; often the same."""
    twin = shadow(model)
    twin.__class__ = stock_class_of(model)  # transformers translates nothing for classes that it does not know
    twin.__dict__.pop("_weight_conversions", None)  # of the file that was loaded
    prefix = f"{twin.base_model_prefix}."
    names = {}
    for name, module in model.named_modules():
        names[name] = name
        weight = module._parameters.get("weight")
        if weight is not None:
            key = f"{name}.weight"
            written = next(iter(revert_weight_conversion(twin, {key: torch.empty_like(weight, device="meta")})))
            lost = prefix if name.startswith(prefix) and not written.startswith(prefix) else ""  # of ViT-MSN's files
            names[name] = lost + written.removesuffix(".weight")
    return names


def _speaks_of_old(config: Any, old: dict[str, str], now: list[str], then: list[str]) -> bool:
    """Whether some target is found under an old name only."""
    if isinstance(config.target_modules, str):
        return not now and bool(then)
    for target in config.target_modules:
        one = copy.copy(config)
        one.target_modules = {target}
        found = {name for name in now if check_target_module_exists(one, name)}
        was = {name for name in then if check_target_module_exists(one, old[name])}
        if was and not found:
            return True
    return False


def _short(names: Any, every: Any) -> set[str]:
    """The last parts of the names where these say the same (``q_proj``), else the names."""
    leaves = {name.rpartition(".")[2] for name in names}
    return leaves if {name for name in every if name.rpartition(".")[2] in leaves} == set(names) else set(names)


def _renamed_modules(wanted: list[str], old: dict[str, str]) -> list[str]:
    renamed: list[str] = []
    for module in wanted:
        pattern = re.compile(rf"(^|.*\.){module}$")
        there = [name for name in old if pattern.match(name)]
        renamed += [module] if there else [name for name, was in old.items() if pattern.match(was)] or [module]
    return renamed


def _places(tensors: Any, old: dict[str, str]) -> dict[str, str]:
    """Old -> new name of the modules that an adapter's tensors are for, where they differ."""
    news: dict[str, list[str]] = {}
    for name, was in old.items():
        news.setdefault(was, []).append(name)
    places: dict[str, str] = {}
    for key in tensors:
        module = _module_of(key, news)
        if module is None or module in old:
            continue
        if len(news[module]) > 1:
            raise AdapterError(
                f"the adapter is on {module}, which is {' and '.join(news[module])} today; merge it under "
                "transformers 4, and save the merged model"
            )
        places[module] = news[module][0]
    return dict(sorted(places.items(), key=lambda pair: -len(pair[0])))


def _module_of(key: str, names: Any) -> str | None:
    """The longest name of a module that a tensor's name begins with."""
    module = key.removeprefix("base_model.model.")
    while module and module not in names:
        module = module.rpartition(".")[0]
    return module or None


def _renamed(key: str, places: dict[str, str]) -> str:
    module = _module_of(key, places)
    return key if module is None else key.replace(f"{module}.", f"{places[module]}.", 1)
