"""The ways to adapt a pretrained model to a task: adapters, the head alone, or all of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.utils import logging

from examples import recipe as recipes
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.families import family_of
from hf_vitprune.peft import ConvpassConfig, RepAdapterConfig

HEAD = "classifier"
#: of recipes of published runs
FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
#: adapters whose scale and initialisation were chosen task by task in the published runs
PUBLISHED: dict[str, Any] = {"convpass": ConvpassConfig, "repadapter": RepAdapterConfig}


#: of adapters of queries and values
OF_ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": [HEAD]}


def _adalora(rank: int, steps: int) -> AdaLoraConfig:
    """From one and a half times the rank down to it, between a tenth and a half of the training."""
    return AdaLoraConfig(
        **OF_ATTENTION,
        init_r=rank + (rank + 1) // 2,
        target_r=rank,
        lora_alpha=rank,
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 100),
        total_step=steps,
    )


def _ia3(rank: int, steps: int) -> IA3Config:
    return IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"], modules_to_save=[HEAD])


#: name -> config for a rank and a number of updates
ADAPTERS: dict[str, Callable[[int, int], Any]] = {
    "lora": lambda rank, _: LoraConfig(r=rank, lora_alpha=rank, **OF_ATTENTION),
    "dora": lambda rank, _: LoraConfig(r=rank, lora_alpha=rank, use_dora=True, **OF_ATTENTION),
    "adalora": _adalora,
    "ia3": _ia3,
    "vera": lambda rank, _: VeraConfig(r=32 * rank, **OF_ATTENTION),
    "loha": lambda rank, _: LoHaConfig(r=rank, alpha=rank, **OF_ATTENTION),
    "convpass": lambda rank, _: ConvpassConfig(r=rank, modules_to_save=[HEAD]),
    "repadapter": lambda rank, _: RepAdapterConfig(r=rank, modules_to_save=[HEAD]),
}
LINEAR, FULL = "linear", "full"
PEFT_METHODS = (*ADAPTERS, LINEAR, FULL)


def check_peft(name: str) -> str:
    """The name, if there is such a way to adapt."""
    if name not in PEFT_METHODS:
        raise InvalidConfigError(f"there is no adaptation {name!r}; there are {', '.join(PEFT_METHODS)}")
    return name


def load_pretrained(model: str, classes: int, seed: int, image_size: int | None = None) -> Any:
    """The pretrained model with a new head."""
    family_of(AutoConfig.from_pretrained(model))
    torch.manual_seed(seed)
    with quiet_transformers():
        loaded, report = AutoModelForImageClassification.from_pretrained(
            model, num_labels=classes, ignore_mismatched_sizes=True, output_loading_info=True
        )
    changed = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    lacking = sorted(name for name in changed if not name.startswith(f"{HEAD}."))
    if lacking:
        raise InvalidConfigError(f"{model} is no whole pretrained model: it lacks {', '.join(lacking[:3])}")
    if image_size is not None:
        try:
            with torch.no_grad():
                loaded.eval()(pixel_values=torch.zeros(1, 3, image_size, image_size))
        except ValueError as error:
            raise InvalidConfigError(
                f"{model} does not take images of {image_size} x {image_size}: {error}"
            ) from error
    return loaded


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the report that the head is new, which is meant."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def adapt(model: Any, peft: str, *, rank: int, steps: int, seed: int, published_for: str | None = None) -> Any:
    """Make a model trainable in one of the ways: a PeftModel, or the model itself; the head is always trained.

    Args:
        rank: of adapters that have one.
        steps: updates that the training will take.
        seed: of the adapters' first weights.
        published_for: a task, to take the published runs' scale and initialisation of its adapters.
    """
    torch.manual_seed(seed)
    if published_for is not None and check_peft(peft) in PUBLISHED:
        recipe = recipes.Recipe.load(FOLDER, f"sls-{peft}").for_task(published_for)
        own = {**recipe.arguments["adapter_config"], "r": rank, "modules_to_save": [HEAD]}
        return get_peft_model(model, PUBLISHED[peft](**own))
    if check_peft(peft) in ADAPTERS:
        return get_peft_model(model, ADAPTERS[peft](rank, steps))
    return set_trainable(model, peft)


def set_trainable(model: Any, peft: str) -> Any:
    """Freeze all but the head for ``linear``, nothing for ``full``; adapters know themselves what is trained."""
    if peft in (LINEAR, FULL):
        model.requires_grad_(peft == FULL)
        model.get_submodule(HEAD).requires_grad_(True)
    return model


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Name -> tensor of everything that training changes, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Put :func:`trained_tensors` into a model that was made in the same way."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
        raise InvalidConfigError("the stored tensors are not those that this adaptation trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model
