"""Damaged ``pruning_config`` records: refused with a message, never a wrong model and never a huge allocation."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from hf_vitprune.errors import CheckpointMismatchError, InvalidArchitectureError, VitPruneError
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.spec.configs import fingerprint
from plans import every_word
from tiny import LargestTensor, assert_same, make, run

JUNK: tuple[Any, ...] = (None, -1, 0, 10**9, 2.5, math.nan, "8", True, False, [], {}, [[1]], {"a": {"b": [None]}})
DELETED = object()


class Saved(NamedTuple):
    """A pruned model in a folder, and what it computes."""

    folder: Path
    config: dict[str, Any]
    outputs: dict[str, torch.Tensor]
    largest: int

    @property
    def record(self) -> dict[str, Any]:
        return copy.deepcopy(self.config["pruning_config"])

    def load(self, record: Any, **changes: Any) -> PreTrainedModel:
        config = {**self.config, **changes}
        if record is DELETED:
            del config["pruning_config"]
        else:
            config["pruning_config"] = record
        (self.folder / "config.json").write_text(json.dumps(config))
        return AutoModelForImageClassification.from_pretrained(self.folder)


@pytest.fixture(scope="module", params=["ViTForImageClassification", "SwinForImageClassification"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    depth = {"num_hidden_layers": 4} if request.param.startswith("ViT") else {"depths": [2, 2]}
    model = make(request.param, **depth)
    plan = every_word(PruningPlan.dense(model))
    small = prune(model, plan, stock=False)
    small.config.pruning_config["info"] = {"method": "test", "ratio": 0.5, "notes": [1, 2]}
    folder = tmp_path_factory.mktemp("saved")
    small.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    largest = max(p.numel() for p in small.parameters())
    return Saved(folder, config, run(small), largest)


# ---------------------------------------------------------------------- ways to damage a record
def paths_in(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from paths_in(item, (*before, key))


def at(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    record = copy.deepcopy(record)
    parent = at(record, path[:-1])
    if value is DELETED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return record


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def damaged(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Values replaced by several kinds of junk and deleted, keys added, lists and layers made longer and shorter."""
    for number, path in enumerate(paths_in(record)):
        name = ".".join(map(str, path))
        turn = 6 * number % len(JUNK)  # six kinds of junk each, in turn
        for junk in (*(JUNK * 2)[turn : turn + 6], DELETED):
            if not same(at(record, path), junk):
                yield f"{name} = {'deleted' if junk is DELETED else junk!r}", changed(record, path, junk)
        value = at(record, path)
        if isinstance(value, dict):
            yield f"{name}.surprise", changed(record, (*path, "surprise"), 1)
        if isinstance(value, list):
            yield f"{name} longer", changed(record, path, value * 2)
    rows = record["per_layer_config"]
    last = str(len(rows) - 1)
    yield "a layer more", changed(record, ("per_layer_config", str(len(rows))), rows[last])
    yield "a gap", changed(changed(record, ("per_layer_config", last), DELETED), ("per_layer_config", "9"), rows[last])
    yield "a list of layers", changed(record, ("per_layer_config",), list(rows.values()))


def consistent_swaps(record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Other models with the very same tensor shapes: only the fingerprint tells."""
    rows = record["per_layer_config"]
    for index, row in rows.items():
        if "num_attention_heads" in row:
            swapped = dict(row)
            heads = row["num_attention_heads"]
            for word in ("head_dim", "qk_head_dim", "v_head_dim"):
                if word in row:
                    swapped[word] = row[word] * heads
            yield (
                f"layer {index}: one wide head",
                changed(record, ("per_layer_config", index), {**swapped, "num_attention_heads": 1}),
            )
        if "shifted" in row:
            path = ("per_layer_config", index, "shifted")
            yield f"layer {index}: other shift", changed(record, path, not row["shifted"])
    if "num_attention_heads" in record["dense"]:
        yield "another attention scale", changed(record, ("dense", "num_attention_heads"), 8)


def outcome(saved: Saved, name: str, record: Any, **changes: Any) -> str:
    """ "refused" or "same"; anything else fails."""
    with LargestTensor() as largest:
        try:
            loaded = saved.load(record, **changes)
        except VitPruneError as error:
            message = str(error)
            assert 20 < len(message) < 1000, (name, message)
            loaded = None
    assert largest.size <= 64 * saved.largest, f"{name}: a tensor of {largest.size} elements"
    if loaded is None:
        return "refused"
    assert_same(run(loaded), saved.outputs)
    return "same"


def test_every_damage_is_refused(saved: Saved) -> None:
    record = saved.record
    results = {name: outcome(saved, name, bad) for name, bad in damaged(record)}
    assert len(results) >= 200
    kept = {name for name, result in results.items() if result == "same"}
    assert kept == {name for name in results if name.startswith("info")}


def test_shapes_that_fit_the_weights_are_refused(saved: Saved) -> None:
    for name, bad in consistent_swaps(saved.record):
        assert outcome(saved, name, bad) == "refused", name


def test_damage_with_a_valid_fingerprint(saved: Saved) -> None:
    """Even a record sealed anew never breaks with a foreign error, and never loads as a wrong model."""
    results = {}
    for name, bad in damaged(saved.record):
        if not name.startswith(("fingerprint", "info")) and " = True" not in name and " = False" not in name:
            results[name] = outcome(saved, name, {**bad, "fingerprint": fingerprint(bad)})
    assert len(results) >= 150
    unchanged = {name for name, result in results.items() if result == "same"}
    assert all("surprise" in name or "skip" in name for name in unchanged), unchanged


@pytest.mark.parametrize("junk", [DELETED, *JUNK], ids=lambda junk: "deleted" if junk is DELETED else repr(junk))
def test_records_that_are_none(saved: Saved, junk: Any) -> None:
    assert outcome(saved, repr(junk), junk) == "refused"


def test_missing_record_of_a_model_that_looks_dense(tmp_path: Path) -> None:
    """Half the width and half the heads: every tensor fits the rest of the config, as 4 heads of 4, not 2 of 8."""
    model = make("ViTForImageClassification")
    plan = PruningPlan.random(model, 0.5, units=["heads", "embedding"])
    prune(model, plan, stock=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pruning_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArchitectureError, match="no pruning_config"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_record_of_another_shape_than_the_rest_of_the_config(saved: Saved) -> None:
    names = ("embed_dim",) if "embed_dim" in saved.config else ("hidden_size", "num_hidden_layers")
    sizes = {**saved.config, names[0]: saved.record["hidden_size"]}  # where the folder has a sentence
    assert outcome(saved, names[0], saved.record, **{names[0]: sizes[names[0]]}) == "same"  # format version 1
    for name in names:
        for change in (1, -1):
            assert outcome(saved, name, saved.record, **{name: sizes[name] + change}) == "refused", name
    if "depths" in saved.config:
        assert outcome(saved, "depths", saved.record, depths=[1, 4]) == "refused"


@pytest.mark.parametrize(
    "damage",
    [
        *({"dtype": 1}, {"dtype": [[1]]}, {"architectures": True}, {"id2label": "cat"}, {"id2label": 10**9}),
        *({"image_size": []}, {"patch_size": -1}, {"num_channels": -3}),
        *({"num_hidden_layers": 10**9}, {"depths": [10**9, 2]}),  # without filling the memory
    ],
    ids=str,
)
def test_values_outside_the_record_that_no_config_has(saved: Saved, damage: dict[str, Any]) -> None:
    with pytest.raises(InvalidArchitectureError, match="config"):
        saved.load(saved.record, **damage)


def test_a_head_without_a_place(saved: Saved) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"no place for 2 .*classifier\.bias; num_labels is 0"):
        saved.load(saved.record, id2label={}, label2id={})


def test_the_undamaged_model_loads(saved: Saved) -> None:
    assert outcome(saved, "undamaged", saved.record) == "same"
    shuffled = dict(reversed(saved.record.items()))
    assert outcome(saved, "other order", shuffled) == "same"


def test_other_heads_than_the_record(saved: Saved) -> None:
    """What heads the dense model had gives the attention scale, and no tensor shows it."""
    if "depths" in saved.config:
        with pytest.raises(InvalidArchitectureError, match="heads of"):
            saved.load(saved.record, num_heads=[1, 4])
    else:  # the record has them, and the config's are not looked at
        assert_same(run(saved.load(saved.record, num_attention_heads=2).eval()), saved.outputs)
