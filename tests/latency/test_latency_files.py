"""Latency tables on disk: what is saved comes back, damaged files say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_vitprune import Architecture, LatencyTable
from hf_vitprune.errors import LatencyTableError
from latency_tables import made_table
from tiny import make

VIT = "ViTForImageClassification"
SWIN = "SwinForImageClassification"


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("case", [VIT, SWIN])
def test_saved_is_loaded(case: str, tmp_path: Path) -> None:
    model = make(case)
    table = made_table(model)
    again = LatencyTable.load(table.save(tmp_path / "new" / "table.json"))
    assert again.to_dict() == table.to_dict() and again.summary() == table.summary()
    assert again.predict(Architecture.of(model)) == table.predict(Architecture.of(model))
    assert json.loads((tmp_path / "new" / "table.json").read_text())["provenance"]["batch_size"] == 8
    assert made_table(model, date="2021-01-01").summary()["digest"] != table.summary()["digest"]


def change(path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def damage(record: dict[str, Any]) -> Any:
        *way, last = path.split("/")
        inner: Any = record
        for step in way:
            inner = inner[int(step) if isinstance(inner, list) else step]
        if value is None:
            del inner[last]
        else:
            inner[int(last) if isinstance(inner, list) else last] = value
        return record

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: [], "a latency table has"),
        (change("stages", None), "a latency table has"),
        (change("version", 99), "version 99"),
        (change("provenance", []), "malformed: provenance"),
        (change("provenance/device", None), "lacks device"),
        (change("provenance/image_size", 16), "image_size is 16"),
        (change("covers/width_factors", None), "lacks width_factors"),
        (change("covers/width_factors", [1, 2]), "1 stages with width factors"),
        (change("stages", []), "lacks stages"),
        (change("stages", [3]), "malformed: stages"),
        (change("stages/0/mlp", None), "lacks mlp of stage 0"),
        (change("stages/0/mlp/axes", {"mlp": [1]}), "shape"),
        (change("stages/0/none/axes", {"mlp": [1, 11, 22, 32]}), "times by mlp"),
        (change("stages/0/mlp/seconds/0/0", float("nan")), "positive, finite"),
        (change("stages/0/attention/seconds/0/0/0/0", -1e-3), "positive, finite"),
        (change("model/seconds/0", 0), "positive, finite"),
        (change("monotone", 1), "malformed: monotone"),
    ],
)
def test_damaged_files_say_what_is_wrong(
    damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(damage(made_table(make(VIT)).to_dict())))
    with pytest.raises(LatencyTableError, match=rf"table\.json is no usable latency table.*{message}"):
        LatencyTable.load(file)


@pytest.mark.parametrize("content", [b"", b'{"version": 1, "prov', b"\xff\xfe"])
def test_truncated_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_bytes(content)
    with pytest.raises(LatencyTableError, match="no usable latency table"):
        LatencyTable.load(tmp_path / "table.json")
    with pytest.raises(FileNotFoundError):
        LatencyTable.load(tmp_path / "none.json")
