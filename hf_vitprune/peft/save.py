"""An adapter and the pruned base it needs, in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..modeling.peft_twin import plain_twin
from ..plan.lineage import lineage_of
from .seal import seal

BASE_FOLDER = "base"


def save_pruned_peft(
    model: Any, folder: str | Path, base: str | None = None, always_base: bool = False
) -> Path | None:
    """Save the adapters of a pruned PeftModel, and its base where no existing checkpoint can stand in for it.

    ``model.save_pretrained(folder)`` writes the adapters only. That is enough where just layers were removed: on
    loading, the dense checkpoint named in the adapter's config is cut down. Otherwise the adapter needs the pruned
    base, which this function puts in ``folder/base`` and names in the adapter's config.

    Args:
        model: a PeftModel over a pruned model, from ``prune`` or ``get_peft_model``.
        folder: made where it does not exist.
        base: name or path of the pruned base where it was saved or pushed already; nothing but its name is written.
        always_base: save the base also where the dense checkpoint would do.

    Returns:
        The folder of the base, None where none was written.

    Raises:
        AdapterError: the model holds no adapters, or is not pruned.
    """
    configs = list(getattr(model, "peft_config", {}).values())
    unsealed = [config for config in configs if not hasattr(config, "pruning")]
    if not configs or (unsealed and "plan" not in lineage_of(model.get_base_model().config)):
        raise AdapterError("not a PeftModel over a pruned model; save it with its own save_pretrained")
    for config in unsealed:
        seal(config, model.get_base_model())
    folder = Path(folder)
    stands_in = all(c.pruning["kept_layers"] is not None and c.base_model_name_or_path for c in configs)
    written: Path | None = None
    if base is None and (always_base or not stands_in):
        written = folder / BASE_FOLDER
        plain_twin(model.get_base_model(), part=configs[0].pruning.get("part", "")).save_pretrained(written)
        base = str(written.resolve())
    if base is not None:
        for config in configs:
            config.base_model_name_or_path = base
            config.revision = None
    model.save_pretrained(str(folder))
    return written
