"""Training a truncated model again: which learning rates, and from which weights (``docs/sls.md``).

``CLR`` is cyclic restarting (Le and Hua, 2021), ``FT`` fine-tuning (Renda et al., 2020), ``TFS`` from scratch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import TrainingArguments

from ..errors import AdapterError, InvalidConfigError
from ..modeling.peft_twin import check_peft_model, is_peft, peft_model_in, plain_twin, saved_modules
from ..peft.kinds import kind_of
from ..training.trainer import PruningTrainer

SCHEDULES = ("CLR", "FT", "TFS")
#: last rate of step-wise schedules as a share of their peak
FINE_TUNING_SHARE = 0.01
#: 10 of 100 epochs
WARM_UP = 0.1


def retraining_arguments(
    args: TrainingArguments,
    schedule: str = "CLR",
    *,
    epochs: float | None = None,
    warm_up: float = WARM_UP,
    share: float = FINE_TUNING_SHARE,
) -> TrainingArguments:
    """A copy of a first training's arguments, changed for a second one.

    Args:
        args: ``learning_rate`` is the peak; a ``cosine_with_min_lr`` keeps its lowest rate.
        schedule: ``CLR`` and ``TFS``: warm-up to the peak, then cosine decay; ``FT``: one small rate.
        epochs: of the second training; as the first by default.
        warm_up: share of the steps over which the rate rises (``CLR`` and ``TFS``), in [0, 1).
        share: the rate of ``FT`` as a share of the peak, in (0, 1].

    Raises:
        InvalidConfigError: an unknown schedule, or a share that is none.
    """
    if schedule not in SCHEDULES:
        raise InvalidConfigError(f"schedule is one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if not 0 <= warm_up < 1:
        raise InvalidConfigError(f"warm_up is a share of the steps in [0, 1), not {warm_up!r}")
    if not 0 < share <= 1:
        raise InvalidConfigError(f"share is a share of the peak learning rate in (0, 1], not {share!r}")
    changed = copy.copy(args)
    if epochs is not None:
        changed.num_train_epochs, changed.max_steps = epochs, -1
    kind = type(args.lr_scheduler_type)
    if schedule == "FT":
        changed.learning_rate = args.learning_rate * share
    changed.warmup_steps = 0 if schedule == "FT" else warm_up
    if schedule == "FT" or args.lr_scheduler_type != kind("cosine_with_min_lr"):
        changed.lr_scheduler_type = kind("constant" if schedule == "FT" else "cosine")
        changed.lr_scheduler_kwargs = None
    return changed


def retrain(
    model: Any,
    args: TrainingArguments,
    schedule: str = "CLR",
    *,
    epochs: float | None = None,
    warm_up: float = WARM_UP,
    share: float = FINE_TUNING_SHARE,
    trainer_class: Any = PruningTrainer,
    resume_from_checkpoint: Any = None,
    **trainer: Any,
) -> Any:
    """Train a truncated model again; the Trainer after that, whose ``.model`` is the model.

    Args:
        model: what ``export()`` or ``truncate`` gave; trained in place, but for ``TFS``.
        args, schedule, epochs, warm_up, share: as of :func:`retraining_arguments`.
        trainer: for the Trainer: ``train_dataset``, ``eval_dataset``, ``compute_metrics``, ...

    Raises:
        InvalidConfigError: see :func:`retraining_arguments`; or ``TFS`` of a model without adapters.
        AdapterError: see :func:`fresh_adapters`.
    """
    changed = retraining_arguments(args, schedule, epochs=epochs, warm_up=warm_up, share=share)
    if schedule == "TFS":
        model = fresh_adapters(model, seed=args.seed)
    made = trainer_class(model=model, args=changed, **trainer)
    made.train(resume_from_checkpoint=resume_from_checkpoint)
    return made


def fresh_adapters(model: Any, seed: int = 0) -> Any:
    """The same base with new adapters of the same settings, and new weights for what they train as a whole.

    Args:
        model: a PeftModel; left alone, but it shares the base's tensors with the result.

    Raises:
        InvalidConfigError: the model has no adapters.
        AdapterError: its adapters have changed the base weights, or are in a state that cannot be carried over.
    """
    if not is_peft(model):
        raise InvalidConfigError(
            f"training from scratch starts from the pretrained layers, and this {type(model).__name__} has no "
            "adapters that could be taken off: its layers are trained themselves. Truncate the pretrained model and "
            "train that"
        )
    model = peft_model_in(model)
    check_peft_model(model)
    configs = {name: copy.deepcopy(config) for name, config in model.peft_config.items()}
    for name, config in configs.items():
        if kind_of(config).changes_base(config):
            raise AdapterError(
                f"adapter {name!r} was initialised out of the base weights ({config.init_lora_weights!r}) and has "
                "changed them: the pretrained layers are not there to start from"
            )
    old = model.get_base_model()
    base = plain_twin(old)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, wrapper in saved_modules(old).items():  # as the model's class initialises them
            new = copy.deepcopy(wrapper.original_module)
            for part in (*new.modules(), *new.parameters()):
                part._is_hf_initialized = False
            for module in new.modules():
                base._init_weights(module)
            base.set_submodule(name, new)
        names = list(configs)
        made = type(model)(base, configs[names[0]], names[0])
        for name in names[1:]:
            made.add_adapter(name, configs[name])
    made.set_adapter(model.active_adapter)
    return made.train(model.training)
