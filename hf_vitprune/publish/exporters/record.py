"""What was checked of an exported model: a record, and a page beside the file for who receives it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checks import TOLERANCE, Agreement

RECORD, PAGE = "checked.json", "README.md"

_LOADING = {
    "native": "from transformers import AutoModel  # or AutoModelFor...: the class is {kind}\n\n"
    'model = AutoModel.from_pretrained("<this folder>")',
    "portable": "from transformers import AutoModel  # or AutoModelFor...: the class is {kind}\n\n"
    'model = AutoModel.from_pretrained("<this folder>", trust_remote_code=True)',
    "graph": "from transformers.exporters import ExportedModel\n\n"
    'model = ExportedModel.from_pretrained("<this folder>"{device})\n'
    "outputs = model({inputs})",
}
_PACKAGES = ("hf_vitprune", "transformers", "torch", "onnxruntime", "openvino", "nncf", "executorch", "torchao")


@dataclass(frozen=True)
class ExportRecord:
    """What an export was checked on, and what came of it.

    Attributes:
        to: format.
        int8: whether Linears are in int8.
        model: class that it was made from.
        inputs: name -> shape; words for what may vary.
        batches: batch sizes that were compared.
        sizes: (height, width) of the images that were compared.
        error: largest difference of an output from the model's, as a share of its largest value.
        tolerance: what was allowed; None for int8, which is compared on images.
        agreement: on the user's images; None without any.
        versions: of the packages.
    """

    to: str
    int8: bool
    model: str
    inputs: dict[str, list[int | str]]
    batches: list[int]
    sizes: list[list[int]]
    error: float
    tolerance: float | None
    agreement: Agreement | None
    versions: dict[str, str]

    @classmethod
    def of(
        cls,
        model: Any,
        to: str,
        error: float,
        inputs: dict[str, Any],
        batches: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        int8: bool = False,
        agreement: Agreement | None = None,
    ) -> ExportRecord:
        known = {d.metadata["Name"].lower().replace("-", "_") for d in importlib.metadata.distributions()}
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES if name in known}
        return cls(
            to,
            int8,
            type(model).__name__,
            inputs,
            list(batches),
            [list(size) for size in sizes],
            error,
            None if int8 else TOLERANCE,
            agreement,
            versions,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @property
    def one_line(self) -> str:
        """For people."""
        kind = f"{self.to}, int8" if self.int8 else self.to
        batches = ", ".join(map(str, self.batches))
        said = f"{kind}: outputs within {self.error:.1g} of the model's largest values, in batches of {batches}"
        return said if self.agreement is None else f"{said}; {self.agreement.one_line}"

    def save(self, folder: Path) -> None:
        """Write ``checked.json``, and a page where there is none."""
        (folder / RECORD).write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        if not (folder / PAGE).exists():
            (folder / PAGE).write_text(self.page())

    def page(self) -> str:
        """Markdown: how to load it, what it takes, what was checked."""
        graph = self.to not in ("native", "portable")
        inputs = ", ".join(f"{name}={name}" for name in self.inputs)
        device = ""
        notes = ""
        if self.to == "openvino":
            device = ', device="cpu", config={"INFERENCE_PRECISION_HINT": "f32"}'
            notes = (
                "\nWithout the hint OpenVINO computes in bfloat16 where the processor can: faster, and further from "
                "the model than what was checked.\n"
            )
        code = _LOADING["graph" if graph else self.to].format(kind=self.model, inputs=inputs, device=device)
        rows = "\n".join(f"| `{name}` | {' x '.join(map(str, shape))} |" for name, shape in self.inputs.items())
        sizes = ", ".join(f"{h} x {w}" for h, w in self.sizes) or "the model's own"
        allowed = "" if self.tolerance is None else f" (allowed: {self.tolerance:g})"
        seen = "" if self.agreement is None else f"\n- {self.agreement.one_line}"
        what = f"{self.to}{', int8' if self.int8 else ''}"
        return (
            f"# {self.model} as {what}\n\n```python\n{code}\n```\n{notes}\n"
            f"| input | shape |\n| --- | --- |\n{rows}\n\nChecked against the model (`{RECORD}`):\n\n"
            f"- images of {sizes}, in batches of {', '.join(map(str, self.batches))}\n"
            f"- largest difference, as a share of an output's largest value: {self.error:.2g}{allowed}{seen}\n"
        )
