"""A method on a tower in a bigger model: what it can do there, and no narrower stream where nobody can read one."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from ..errors import AdapterError, UnsupportedModelError, UnsupportedUnitError
from ..methods import PruningConfig, method_for
from ..methods.contract import PruningMethod
from ..modeling.peft_twin import tuner_layers
from ..spec.towers import Tower
from ..surgery.composite import check_readers
from ..surgery.read_layers import layers_needed, layers_read
from ..utils.modules import get

logger = logging.get_logger(__name__)


def method_on(model: Any, tower: Tower, config: PruningConfig) -> PruningMethod:
    """The method of a config for a tower of a transformers model.

    Raises:
        UnsupportedUnitError: the config asks for the residual stream in so many words, and it cannot be narrowed.
    """
    module = get(model, tower.path)
    method = method_for(config)(config, module)
    if not tower.path or not method.narrows or tuner_layers(model):  # with adapters no stream is narrowed at all
        return method
    try:
        check_readers(model, tower)
    except UnsupportedUnitError as error:
        narrower = method.at_full_width()
        if narrower is None:
            raise
        logger.warning(f"{config.method_name} leaves the tower's residual stream as wide as it is: {error}")
        return method_for(narrower)(narrower, module)
    return method


def check_tower(method: PruningMethod, tower: Tower, base: Any, adapted: bool) -> None:
    """Refuse what a method cannot do with a tower of a bigger model; the layers that the model reads are kept.

    Args:
        method: of the tower.
        base: the bigger model.
        adapted: it has adapters.

    Raises:
        AdapterError: the method sets weights to zero that adapters share.
        UnsupportedModelError: the method scores by gradients, and some layers get none.
    """
    name, layers = method.config.method_name, len(method.architecture.layers)
    if adapted and method.traits.zeroes_weights:
        raise AdapterError(
            f"{name} sets weights of a tower to zero, which adapters of a bigger model share: merge them first "
            "(model.merge_and_unload()), or use another method"
        )
    method.keep_at_least(*layers_needed(base, tower, layers))
    read = layers_read(base, tower, layers)
    if read < layers and method.traits.decides_by == "gradients":
        raise UnsupportedModelError(
            f"{name} scores by gradients, and layers {read} to {layers - 1} of the tower get none, as "
            f"{type(base).__name__} reads what is below them: drop them first, with "
            "hf_vitprune.truncate(model, 'unused'), which changes no output"
        )
