"""What every class of this package does on disk and on the Hub: safetensors alone, all of a checkpoint or nothing."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from ..errors import CheckpointMismatchError
from ..utils.finite import check_finite
from ..utils.upload import upload
from .folder import adapter_beside, of_base, without_other_adapter
from .portable import save_portable

#: what transformers' save_pretrained knows; the last one by its old name, and always true
_KEYWORDS = {*inspect.signature(PreTrainedModel.save_pretrained).parameters, "safe_serialization"}
_KEYWORDS |= {"commit_message", "create_pr", "private", "repo_id", "revision", "tags"}


class SavesPortableMixin:
    """Mixed in front of a model class: saves finite weights only, and portable folders."""

    def save_pretrained(self, save_directory: Any, *args: Any, portable: bool = False, **kwargs: Any) -> None:
        """As transformers'.

        ``portable``: with a file of code beside the weights, by which ``trust_remote_code=True`` loads the folder
        where this library is not installed.

        Raises:
            NotFiniteError: there are weights that are infinite or no numbers.
            PortableError: ``portable``, and the model holds what that file cannot bring along.
            TypeError: a keyword that transformers would pass over.
        """
        for name in kwargs.keys() - _KEYWORDS if not kwargs.get("push_to_hub") else ():
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r}")
        check_finite(self, "saved", kwargs.get("state_dict"))  # type: ignore[arg-type]
        save: Any = super().save_pretrained  # type: ignore[misc]
        if portable:
            save_portable(self, save, save_directory, *args, **{"save_original_format": False, **kwargs})
        else:
            save(save_directory, *args, **kwargs)


class StrictMixin(SavesPortableMixin):
    """Mixed in front of a stock model class."""

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As transformers', but always under the model's own parameter names.

        Stock classes write legacy names by default, which a Trainer then cannot restore. See
        :class:`SavesPortableMixin` for ``portable``.
        """
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As transformers', with a model card unless there is one already; see ``hf_vitprune.push_to_hub``."""
        return upload(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but only from safetensors, and never with weights that are missing or left over.

        A folder with an adapter over ``base/`` gives the base with the adapter put in, as transformers does it.

        Raises:
            CheckpointMismatchError: the checkpoint does not hold exactly what its config states.
            InvalidArchitectureError: the config's record is damaged.
        """
        if kwargs.get("use_safetensors") is False:
            raise CheckpointMismatchError("pruned models are stored as safetensors only; drop use_safetensors=False")
        wants_info = kwargs.pop("output_loading_info", False)
        settings = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        path = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        where = adapter_beside(path, settings)
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                *args, **(without_other_adapter(settings) if where is None else of_base(settings, where))
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" in str(error) or "size mismatch" in str(error):
                raise CheckpointMismatchError(
                    "the checkpoint's tensors have other sizes than its config states (see the report above). For "
                    "another number of labels, pass ignore_mismatched_sizes=True, which makes a new head; otherwise "
                    "config.json and the weights are not of one model"
                ) from error
            raise
        model.check_loaded(info)
        if where is not None:
            model.load_adapter(path, adapter_name=kwargs.get("adapter_name", "default"), adapter_kwargs=where)
        return (model, info) if wants_info else model

    def check_loaded(self, info: dict[str, Any]) -> None:
        """Refuse what a checkpoint lacks, or has beside what its config states."""
        raise NotImplementedError
