"""The config of a bigger model follows its tower: when it is pruned there, and when a small one is put in by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from ..errors import InvalidArchitectureError, PortableError, UnsupportedModelError
from ..families import find_family
from ..spec.configs import is_pruned
from ..utils.mixing import InPlaceMixin, mix_into, unmix
from ..utils.upload import upload
from .hosts import host_class, stock_host
from .portable import WHOLE_TYPE, pruned_configs
from .pretrained import PrunedModelMixin
from .strict import SavesPortableMixin

logger = logging.get_logger(__name__)


def config_with(config: Any, old: PreTrainedConfig, new: PreTrainedConfig) -> Any:
    """A copy of a model's config with another one in the place of a tower's, which it has to hold."""
    changed = _config_with(config, new, lambda value: value is old)
    if changed is None:  # some models build their tower from a copy of its config
        wanted = old.to_dict()
        changed = _config_with(config, new, lambda value: type(value) is type(old) and value.to_dict() == wanted)
    if changed is None:
        raise UnsupportedModelError(
            f"the {type(config).__name__} does not hold the config of its {old.model_type} tower: set it to the "
            "tower's own (model.config.<part>_config = tower.config) before pruning"
        )
    return changed


def _config_with(config: Any, new: PreTrainedConfig, matches: Callable[[Any], bool]) -> Any:
    for name, value in vars(config).items():
        if not isinstance(value, PreTrainedConfig):
            continue
        replacement = new if matches(value) else _config_with(value, new, matches)
        if replacement is not None:
            made = copy.copy(config)
            made.__dict__[name] = replacement
            return made
    return None


class HoldsPrunedMixin(SavesPortableMixin, InPlaceMixin):
    """In front of a stock class that asks the Auto classes for its tower, and got a pruned one."""

    @classmethod
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The mixed class goes by the name of the stock one, which config.json and Trainer ask for."""
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(cls, name, getattr(cls.stock_class, name))
        super().__init_subclass__(**kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, portable: bool = False, **kwargs: Any) -> Any:
        """As transformers', and as ``hf_vitprune.push_to_hub`` where ``portable``."""
        if portable:
            return upload(self, repo_id, *args, portable=True, **kwargs)
        return super().push_to_hub(repo_id, *args, **kwargs)  # type: ignore[misc]


class PortableWholeConfig(PreTrainedConfig):
    """Stands in config.json of portable bigger models: with this library they load as what they are."""

    model_type = WHOLE_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the stock class; InvalidArchitectureError where config.json does not say which."""
        portable = config_dict.get("portable")
        stock = portable.get("stock_type") if isinstance(portable, dict) else None
        if not isinstance(stock, str) or stock not in CONFIG_MAPPING:
            raise InvalidArchitectureError(
                f"config.json is of a portable bigger model, and says nothing known of its kind ({stock!r}); fetch it "
                "again"
            )
        fields = {name: value for name, value in config_dict.items() if name not in ("portable", "auto_map")}
        return CONFIG_MAPPING[stock].from_dict({**fields, "model_type": stock}, **kwargs)


AutoConfig.register(WHOLE_TYPE, PortableWholeConfig)


def _hold_pruned_(whole: nn.Module) -> None:
    """Let a stock model with a pruned tower inside be saved as a portable folder, too."""
    if not isinstance(whole, PreTrainedModel) or not type(whole).__module__.startswith("transformers."):
        return
    if host_class(type(whole)) is None and any(prefix for prefix, _ in pruned_configs(whole.config)):
        mix_into(whole, HoldsPrunedMixin)


def check_portable(model: Any) -> None:
    """Refuse what cannot be saved as a portable folder; bigger models whose tower was put in by hand learn to."""
    if not isinstance(model, PreTrainedModel):
        raise PortableError(
            f"a {type(model).__name__} has no portable folder: merge adapters (merge_and_unload()), and take that"
        )
    _hold_pruned_(model)


def become_host_(whole: Any, small: Any) -> None:
    """Make a model that builds its towers itself, and now holds a pruned one, its twin that loads again, in place."""
    _hold_pruned_(whole)
    twin = host_class(type(whole))
    if isinstance(small, PrunedModelMixin) and twin is not None and type(whole) is not twin:
        _become_(whole, twin)


def _become_(whole: Any, made: Any) -> None:
    whole.config.__class__ = made.config_class
    whole.config.__dict__.pop("model_type", None)
    whole.__class__ = made


def become_stock_(whole: Any) -> None:
    """Undo :func:`become_host_`, where no pruned tower is left."""
    if any(isinstance(module, PrunedModelMixin) for module in whole.modules()):
        return
    for module in whole.modules():
        unmix(module, HoldsPrunedMixin)
    stock = stock_host(type(whole))
    if stock is not None:
        _become_(whole, stock)


def set_tower_config_(whole: Any, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Put another config in the place of a tower's, in the config that a model and the modules in it hold."""
    vars(whole.config).update(vars(config_with(whole.config, old, new)))


def follow_tower(parent: Any, name: str, new: Any) -> None:
    """A tower takes the place of another (``model.vision_model = prune(model.vision_model, plan)``): set the config.

    torch calls this for every module that is set as an attribute. It does something where one of both is pruned, of
    one family, and the config of a transformers model holds that of the old one; otherwise the model would be saved
    with the config of another tower, and loaded with layers of random numbers.
    """
    if isinstance(parent, PreTrainedModel) and isinstance(new, nn.Module) and hasattr(parent, "config"):
        _hold_pruned_(parent)
    old = parent._modules.get(name)
    if old is new or not all(isinstance(module, PreTrainedModel) for module in (parent, old, new)):
        return
    if not (is_pruned(old.config) or is_pruned(new.config)):
        return
    if new.config is old.config or find_family(old) is None or find_family(old) is not find_family(new):
        return
    if host_class(type(parent)) is not None:  # it gets another class, which is not for others that hold its config
        parent.config = copy.copy(parent.config)
    try:
        set_tower_config_(parent, old.config, new.config)
    except UnsupportedModelError:
        return  # it is not built from its config
    become_host_(parent, new)
    logger.warning(f"{type(parent).__name__}.{name} is another tower now, and the model's config that of it")


register_module_module_registration_hook(follow_tower)
