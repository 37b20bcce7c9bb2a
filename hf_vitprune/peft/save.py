"""An adapter and the pruned base it needs, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .folder import BASE_FOLDER, ELSEWHERE, watch
from .seal import pruned_part, seal


def save_pruned_peft(
    model: Any, folder: str | Path, base: str | None = None, always_base: bool = False
) -> Path | None:
    """Save the adapters of a pruned PeftModel, and its base where no existing checkpoint can stand in for it.

    ``model.save_pretrained(folder)`` does the same for models that ``prune`` has made. Where just layers were removed,
    the adapters are enough: on loading, the dense checkpoint named in the adapter's config is cut down (this function
    writes the base, too, where none is named). Otherwise the pruned base goes into ``folder/base``, and the folder is
    whole: it may be moved, and be loaded by its own name.

    Args:
        model: a PeftModel over a pruned model, from ``prune`` or ``get_peft_model``.
        folder: made where it does not exist.
        base: name or path of the pruned base where it was saved or pushed already; nothing but its name is written,
            by later calls of ``model.save_pretrained`` either.
        always_base: save the base also where the dense checkpoint would do.

    Returns:
        The folder of the base, None where none was written.

    Raises:
        AdapterError: the model holds no adapters, or is not pruned.
        NotFiniteError: there are weights that are not finite.
    """
    configs = list(getattr(model, "peft_config", {}).values())
    unsealed = [config for config in configs if not hasattr(config, "pruning")]
    if not configs or (unsealed and pruned_part(model.get_base_model()) is None):
        raise AdapterError("not a PeftModel over a pruned model; save it with its own save_pretrained")
    for config in unsealed:
        seal(config, model.get_base_model())
    for config in configs:
        if base is not None:
            config.base_model_name_or_path, config.revision = base, None
            config.pruning = {**config.pruning, "base": ELSEWHERE}
        elif always_base or not config.base_model_name_or_path:
            config.pruning = {**config.pruning, "base": BASE_FOLDER}
    watch(model.get_base_model())
    model.save_pretrained(str(folder))
    written = Path(folder) / BASE_FOLDER
    return None if base is not None or not written.is_dir() else written
