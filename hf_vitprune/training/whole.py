"""A method on a tower in a bigger model: without the residual stream, where nobody around can read a narrower one."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from ..errors import UnsupportedUnitError
from ..methods import PruningConfig, method_for
from ..methods.contract import PruningMethod
from ..modeling.peft_twin import tuner_layers
from ..spec.towers import Tower
from ..surgery.composite import check_readers
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
