"""The ways to adapt a pretrained model to a task: adapters, the head alone, or all of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.utils import logging

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.families import family_of
from hf_vitprune.peft import ConvpassConfig, RepAdapterConfig

from .published import published_adapter

HEAD = "classifier"
QUERY_VALUE = ["q_proj", "v_proj"]


def _adalora(rank: int, steps: int) -> AdaLoraConfig:
    """From one and a half times the rank down to it, between a tenth and a half of the training."""
    return AdaLoraConfig(
        target_modules=QUERY_VALUE,
        modules_to_save=[HEAD],
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
    "lora": lambda rank, _: LoraConfig(r=rank, lora_alpha=rank, target_modules=QUERY_VALUE, modules_to_save=[HEAD]),
    "dora": lambda rank, _: LoraConfig(
        r=rank, lora_alpha=rank, target_modules=QUERY_VALUE, modules_to_save=[HEAD], use_dora=True
    ),
    "adalora": _adalora,
    "ia3": _ia3,
    "vera": lambda rank, _: VeraConfig(r=32 * rank, target_modules=QUERY_VALUE, modules_to_save=[HEAD]),
    "loha": lambda rank, _: LoHaConfig(r=rank, alpha=rank, target_modules=QUERY_VALUE, modules_to_save=[HEAD]),
    "convpass": lambda rank, _: ConvpassConfig(r=rank, modules_to_save=[HEAD]),
    "repadapter": lambda rank, _: RepAdapterConfig(r=rank, modules_to_save=[HEAD]),
}
LINEAR, FULL = "linear", "full"
PEFT_METHODS = (*ADAPTERS, LINEAR, FULL)


def check_peft(name: str) -> str:
    """The name, if there is such a way to adapt.

    Raises:
        InvalidConfigError: there is not.
    """
    if name not in PEFT_METHODS:
        raise InvalidConfigError(f"there is no adaptation {name!r}; there are {', '.join(PEFT_METHODS)}")
    return name


def load_pretrained(model: str, classes: int, seed: int, image_size: int | None = None) -> Any:
    """The pretrained model with a new head.

    Args:
        model: Hub id or folder.
        classes: outputs of the head.
        seed: of the head's first weights.
        image_size: side in pixels that the model will be given; None for its own.

    Raises:
        UnsupportedModelError: it is of no known family.
        InvalidConfigError: it does not take images of that size, or the checkpoint lacks more than a head.
        OSError: there is no such model.
    """
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
    """Make a model trainable in one of the ways; the head is always trained.

    Args:
        model: with a head for the task.
        peft: one of ``PEFT_METHODS``.
        rank: of adapters that have one.
        steps: updates that the training will take.
        seed: of the adapters' first weights.
        published_for: a task, to take the published runs' scale and initialisation of its adapters.

    Returns:
        A PeftModel; or, for ``linear`` and ``full``, the model.
    """
    torch.manual_seed(seed)
    own = None if published_for is None else published_adapter(check_peft(peft), published_for, rank, HEAD)
    if own is not None:
        return get_peft_model(model, own)
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
    """Put :func:`trained_tensors` into a model that was made in the same way.

    Raises:
        InvalidConfigError: they are of another one.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(p.shape) for name, p in parameters.items()}:
        raise InvalidConfigError("the stored tensors are not those that this adaptation trains")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model
