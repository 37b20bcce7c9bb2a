"""Packages that only some things need: looked for before the work that they are needed for, and named."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import MissingExtraError

#: import name -> (name, what to install it with)
_EXTRAS = {
    "PIL": ("Pillow", "pip install 'hf_vitprune[vision]'"),
    "matplotlib": ("matplotlib", "pip install 'hf_vitprune[plots]'"),
    "kornia": ("kornia", "pip install 'hf_vitprune[augment]'"),
    "onnx": ("onnx", "pip install 'hf_vitprune[onnx]'"),
    "onnxruntime": ("ONNX Runtime", "pip install 'hf_vitprune[onnx]'"),
    "onnxscript": ("onnxscript", "pip install 'hf_vitprune[onnx]'"),
    "deepspeed": ("DeepSpeed", "pip install 'hf_vitprune[deepspeed]'"),
    "torch_pruning": ("Torch-Pruning", "pip install torch-pruning (or 'hf_vitprune[baselines]')"),
}


def need(what: str, *packages: str) -> None:
    """Refuse to begin what lacks a package; ``what`` begins the error: "plots", say.

    Raises:
        MissingExtraError: naming the first that is not there, and the extra that it comes with.
    """
    for package in packages:
        if find_spec(package) is None:
            name, cure = _EXTRAS[package]
            raise MissingExtraError(f"{what} need {name}: {cure}")
