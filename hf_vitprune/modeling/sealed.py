"""Fields of config.json that the forward pass reads, kept there a second time.

No tensor tells when an epsilon, an activation or a frequency is another one: the folder would load as another model.
They are compared as the file has them. Keywords of ``from_pretrained`` come later, and change them on purpose.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

from ..errors import InvalidArchitectureError

#: key of config.json, and of no config in memory
SEALED = "sealed_fields"
#: sizes that the record of the pruned shape has, and checks
_RECORDED = {"hidden_size", "embed_dim", "num_hidden_layers", "depths", "num_attention_heads", "num_heads"}
#: fields that only training reads
_TRAINING = re.compile("drop|init")


def seal(fields: dict[str, Any], config_class: type[PreTrainedConfig]) -> None:
    """Note in the fields of a config.json, in place, what those are that a forward pass reads."""
    fields[SEALED] = _read_by_forward(fields, config_class)


def unsealed(fields: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a config.json, without the note, if they are as it says; folders of old have none.

    Raises:
        InvalidArchitectureError: naming the field that is another one.
    """
    if SEALED not in fields:
        return fields
    stated, found = fields[SEALED], _read_by_forward(fields, config_class)
    if not isinstance(stated, dict):
        raise InvalidArchitectureError(f"config.json says {stated!r} for {SEALED}; fetch it again")
    for name in sorted({*stated, *found}):
        now, then = (values.get(name, "nothing") for values in (found, stated))
        if now != then:
            raise InvalidArchitectureError(
                f"config.json says {now!r} for {name}, and said {then!r} when the model was saved, which would be "
                f"another model: fetch it again. To change it on purpose, load with from_pretrained(folder, "
                f"{name.rpartition('.')[2]}=...) and save that"
            )
    return {name: value for name, value in fields.items() if name != SEALED}


def _read_by_forward(fields: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Path -> value of what is of the model's kind, and not of training alone, in a config and those inside of it."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(config_class)} - general - _RECORDED - {"pruning_config"}
    found = {name: fields[name] for name in sorted(own & fields.keys()) if not _TRAINING.search(name)}
    for name, sub_class in config_class.sub_configs.items():
        if isinstance(fields.get(name), dict) and dataclasses.is_dataclass(sub_class):
            inside = _read_by_forward(fields[name], sub_class)
            found = {**found, **{f"{name}.{key}": value for key, value in inside.items()}}
            found.pop(name, None)
    return found
