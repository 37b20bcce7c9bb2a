"""An adapter and the pruned base it needs, in one folder that can be moved, pushed, and loaded by its own name.

``adapter_config.json`` and ``adapter_model.safetensors`` lie beside ``base/``, the pruned model. What is beside them
makes the folder a whole model, too, as transformers sees it: the base's config, and an index of weights that points
into ``base/``. A Trainer still finds an adapter's checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, PushToHubMixin, logging

from ..errors import PortableError
from ..modeling.folder import BASE_FOLDER
from ..modeling.peft_twin import plain_twin
from ..utils.finite import check_finite
from ..utils.sharding import is_sharded

logger = logging.get_logger(__name__)

#: in the ``pruning`` record: the base is where ``base_model_name_or_path`` says, and is not written
ELSEWHERE = "elsewhere"


def remember(model: Any, *_: Any) -> None:
    """Tell every adapter's config whose it is; a state dict's pre-hook, as saving begins with one.

    Raises:
        PortableError: PEFT was asked to save a portable folder, a word that it would pass over.
    """
    saving = _caller(PeftModel.save_pretrained.__code__)
    if saving is not None and saving["kwargs"].get("portable"):
        raise PortableError(
            "a folder with an adapter needs PEFT and hf_vitprune, so it cannot be portable: save "
            "peft_model.merge_and_unload() with portable=True"
        )
    for config in model.__dict__.get("peft_config", {}).values():
        config._model = weakref.ref(model)


def watch(model: nn.Module) -> None:
    """Call :func:`remember` whenever the model is about to be saved."""
    if not any(getattr(hook, "hook", hook) is remember for hook in model._state_dict_pre_hooks.values()):
        model.register_state_dict_pre_hook(remember)
    remember(model)


def stands_in(config: Any) -> bool:
    """Whether the adapter needs no base beside it: it is elsewhere, or a dense model is cut down to it."""
    where = config.pruning.get("base")
    return where == ELSEWHERE or (where != BASE_FOLDER and config.pruning.get("kept_layers") is not None)


def write_base(config: Any, folder: Path) -> str | None:
    """Put the base of an adapter that is being saved beside it, if no checkpoint stands in for it.

    An adapter not called ``default`` is in a folder of its name, beside its base.

    Returns:
        What the config is to name as its base; None to leave what it names.

    Raises:
        NotFiniteError: there are weights that are not finite.
    """
    model: Any = getattr(config, "_model", lambda: None)()
    by_transformers = getattr(model, "_hf_peft_config_loaded", False)
    if model is None or not (by_transformers or (folder / SAFETENSORS_WEIGHTS_NAME).is_file()):
        return None  # the config alone is saved
    name = next((name for name, own in model.peft_config.items() if own is config), "default")
    check_finite(model, "saved")
    if stands_in(config):
        return None
    if is_sharded(model.parameters()):
        logger.warning(
            f"{folder} holds an adapter without its pruned base, whose weights are spread over processes: save it on "
            "one process with hf_vitprune.peft.save_pruned_peft, or pass it base=<where the base is>"
        )
        return None
    root = folder if by_transformers or name == "default" or folder.name != name else folder.parent
    twin = plain_twin(model, part=config.pruning.get("part", ""))
    written = str((root / BASE_FOLDER).resolve()), sum(parameter._version for parameter in twin.parameters())
    if model.__dict__.get("_base_written") != written or not (root / BASE_FOLDER).is_dir():
        twin.save_pretrained(root / BASE_FOLDER)
        _open_to_auto_classes(root)
        model.__dict__["_base_written"] = written
    return _pushed_to() or written[0]


def _open_to_auto_classes(root: Path) -> None:
    """What makes a folder that holds ``base/`` a model by itself."""
    base = root / BASE_FOLDER
    index = base / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        fields = json.loads(index.read_text(encoding="utf-8"))
    else:
        with safe_open(base / SAFE_WEIGHTS_NAME, "pt") as file:
            fields = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)}
    fields["weight_map"] = {name: f"{BASE_FOLDER}/{shard}" for name, shard in fields["weight_map"].items()}
    (root / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in base.iterdir():
        if path.suffix in (".json", ".py") and path != index:
            shutil.copy(path, root / path.name)


def name_base(folder: Path, name: str) -> None:
    """Say in the configs of adapters whose base is in the same folder where that folder will be."""
    for path in folder.rglob(CONFIG_NAME):
        fields = json.loads(path.read_text(encoding="utf-8"))
        if (fields.get("pruning") or {}).get("base") == BASE_FOLDER:
            path.write_text(json.dumps({**fields, "base_model_name_or_path": name}, indent=2, sort_keys=True))


def base_beside(stored: str | None) -> str | None:
    """Where the base is of a config that is being read, if it lies beside it; ``stored`` otherwise.

    PEFT's ``PeftConfig.from_pretrained`` tells a config nothing of its file, and the folder may have been moved.
    """
    found = _caller(PeftConfig.from_pretrained.__func__.__code__)  # type: ignore[attr-defined]
    folder = None if found is None else Path(str(found.get("config_file", ""))).parent
    if folder is None:
        return stored
    for root in (folder, folder.parent):
        base = root / BASE_FOLDER
        if (base / "config.json").is_file() and (root / SAFE_WEIGHTS_INDEX_NAME).is_file():
            return str(base.resolve())
    return stored


def _pushed_to() -> str | None:
    """The repository that a ``push_to_hub`` of PEFT's own fills: it saves into a folder that is gone afterwards."""
    found = _caller(PushToHubMixin.push_to_hub.__code__)
    return None if found is None else str(found["repo_id"])


def _caller(code: Any) -> dict[str, Any] | None:
    """Local names of a function that is running, further up; None where it is not."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else dict(frame.f_locals)
