"""What a user changed in a model by hand: kept in the record, so that no other class loads the folder without it.

Loading builds a model from its class and config alone. A forward of one's own, another head or a swapped activation
are in neither: a stock-like class would take the weights it knows, and compute something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from ..errors import CheckpointMismatchError
from ..utils.mixing import stock_type

#: key of the record's info
CUSTOM = "custom"
#: whether ``from_pretrained`` is building a model
_loading: ContextVar[bool] = ContextVar("loading", default=False)


def qualified(made: type) -> str:
    return f"{made.__module__}.{made.__qualname__}"


def own_class(model_class: type) -> type:
    """The dense class behind a generated Pruned class; a class that was written is its own."""
    made: type = model_class.__dict__.get("dense_class", model_class)
    return made


def custom_parts(
    model_class: type, stock_class: type, small: nn.Module, skeleton: nn.Module, encoder: str
) -> dict[str, Any]:
    """How a small model differs from the skeleton that the stock class makes from its config; empty if it does not.

    Returns:
        ``class``: name of a class of the user's, or None; ``encoder``: its path, with a dot; ``modules``: path -> name
        of the class of every module that the skeleton lacks or has another in the place of (None: only that has it).
    """
    ours, theirs = dict(small.named_modules()), dict(skeleton.named_modules())
    changed: dict[str, str | None] = {
        path: qualified(stock_type(module))
        for path, module in ours.items()
        if path and (path not in theirs or _kind(module) != _kind(theirs[path]))
    }
    changed |= {path: None for path in theirs if path not in ours}
    written = own_class(model_class)
    named = None if written is stock_class else qualified(written)
    return {"class": named, "encoder": encoder, "modules": changed} if named or changed else {}


def _kind(module: nn.Module) -> tuple[type, dict[str, tuple[int, ...]]]:
    """A module's own class, and the shapes of the tensors that it holds itself."""
    tensors = {**module._parameters, **module._buffers}
    return stock_type(module), {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}


# ---------------------------------------------------------------------- when a folder is loaded
@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Models built inside are about to get the weights of a folder."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def check_class(model_class: Any, config: Any) -> None:
    """Refuse to load the folder of a config as a class that would leave out what its model computes."""
    custom = _custom_of(config)
    if not _loading.get() or not custom or _same_class(custom["class"], own_class(model_class)):
        return
    inside = [path for path in custom["modules"] if path.startswith(custom["encoder"])]
    if model_class.pruning_task == "Model" and custom["encoder"] and not inside:
        return
    named = custom["class"] or ""
    what = [f"its class {named}"] if named else []
    what += [f"its modules {', '.join(list(custom['modules'])[:3])}"] if custom["modules"] else []
    name = named.rpartition(".")[2]
    twin = f"hf_vitprune.modeling.pruned_model_class({name})"
    cure = f"{twin}.from_pretrained(folder), or " if named else ""
    raise CheckpointMismatchError(
        f"the pruned model in this folder is not what {model_class.__name__} makes: {' and '.join(what)} would be "
        f"left out. Load it by {cure}hf_vitprune.pruning.load_pruned(model, folder), where model is the dense one as "
        "your code makes it"
    )


def check_modules(model: nn.Module, info: dict[str, Any]) -> None:
    """After loading as a user's class: the class makes all that was changed, and every tensor of it has a weight.

    ``info``: what transformers says of the tensors.
    """
    custom = _custom_of(model.config)
    if not custom or not _same_class(custom["class"], own_class(type(model))):
        return
    there = dict(model.named_modules())
    keys = [*info["missing_keys"], *(str(row[0]) for row in info["mismatched_keys"])]
    for path, name in custom["modules"].items():
        made = qualified(stock_type(there[path])) if path in there else None
        unfilled = name is not None and any(key.rpartition(".")[0] == path for key in keys)
        if made != name or unfilled:
            raise CheckpointMismatchError(
                f"{path} is a {name} in the pruned model, and {type(model).__name__} makes {made or 'none'}"
                f"{' of other tensors' if unfilled else ''}: it was changed after the model was built. "
                "Load it by hf_vitprune.pruning.load_pruned(model, folder), where model is the dense one as your code "
                "makes it"
            )


def _custom_of(config: Any) -> dict[str, Any] | None:
    record = getattr(config, "pruning_config", None)
    info = record.get("info") if isinstance(record, dict) else None
    custom = info.get(CUSTOM) if isinstance(info, dict) else None
    if not isinstance(custom, dict) or not isinstance(custom.get("modules"), dict):
        return None
    return custom if isinstance(custom.get("encoder"), str) and "class" in custom else None


def _same_class(name: Any, made: type) -> bool:
    """A class of a script is in ``__main__`` there, and in a module where it is imported."""
    if not isinstance(name, str):
        return False
    if "__main__" in (name.partition(".")[0], made.__module__):
        return name.rpartition(".")[2] == made.__qualname__.rpartition(".")[2]
    return name == qualified(made)
