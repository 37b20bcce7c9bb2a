"""``hf-vitprune evaluate``: the right numbers for every form of saved model, and a file that says what they are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from command_line import call, printed, refused
from hf_vitprune import PruningPlan, count, prune
from hf_vitprune.errors import InvalidDataError
from hf_vitprune.evaluation.features import image_features
from hf_vitprune.evaluation.metrics import NearestNeighbourAccuracy
from hf_vitprune.evaluation.results import load_results, results_of, save_results, weights_digest
from hf_vitprune.peft import save_pruned_peft
from hf_vitprune.utils.data import load_images
from processes import run_python
from tiny_composites import dual
from words import tokenizer

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"image_size": 16, "patch_size": 8, "initializer_range": 0.5}
SIZE = {"height": 16, "width": 16}


def processor() -> Any:
    return ViTImageProcessorPil(size=SIZE)


def classifier(names: list[str] = NAMES) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZES, id2label=dict(enumerate(names)), num_labels=len(names))).eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(classifier(), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in the folder of the class that the classifier sees, but 6, which are in the next but two."""
    root, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    images = noise.integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    images[:, :, :8] //= noise.integers(1, 6, (40, 1, 1, 3), dtype=np.uint8)
    with torch.no_grad():
        seen = classifier()(**processor()(list(images), return_tensors="pt")).logits.argmax(-1).tolist()
    for name in NAMES:
        (root / name).mkdir()
    for i, (image, number) in enumerate(zip(images, seen, strict=True)):
        number = (number + 3) % len(NAMES) if i < 6 else number
        Image.fromarray(image).save(root / NAMES[number] / f"{i:02}.png")
    for name in NAMES:  # no class is empty
        if not any((root / name).iterdir()):
            (root / name).rmdir()
    return root


def evaluated(tmp_path: Path, *words: Any) -> dict[str, Any]:
    printed("evaluate", *words, "--split", "train", "--out", tmp_path / "r.json", "--force")
    return load_results(tmp_path / "r.json")


def test_a_classifier(dense: Path, labelled: Path, tmp_path: Path) -> None:
    found = evaluated(tmp_path, dense, labelled)
    assert found["metrics"]["accuracy"] == 34 / 40 and found["images"] == 40
    assert 34 / 40 <= found["metrics"]["top_5_accuracy"] <= 1
    assert (found["task"], found["data"], found["split"]) == ("image-classification", labelled.name, "train")
    assert (found["params"], found["macs"]) == count(classifier())[::2]
    timing = found["timing"]
    assert timing["samples_per_second"] == pytest.approx(40 / timing["total_time_in_seconds"])
    assert timing["latency_in_seconds"] == pytest.approx(timing["total_time_in_seconds"] / 40)
    assert found["weights"] == weights_digest(dense) and found["_evaluate_version"]
    assert str(dense) not in (tmp_path / "r.json").read_text()


def test_neither_batches_nor_the_order_of_images_or_classes_matter(
    dense: Path, labelled: Path, tmp_path: Path
) -> None:
    expected = evaluated(tmp_path, dense, labelled)["metrics"]
    assert evaluated(tmp_path, dense, labelled, "--batch-size", 1)["metrics"] == expected
    assert evaluated(tmp_path, dense, labelled, "--batch-size", 40)["metrics"] == expected
    other = tmp_path / "reversed"
    for folder in labelled.iterdir():
        (other / folder.name).mkdir(parents=True)
        for i, file in enumerate(sorted(folder.iterdir(), reverse=True)):
            (other / folder.name / f"{i:03}.png").symlink_to(file)
    assert evaluated(tmp_path, dense, other)["metrics"] == expected
    model, order = classifier(), [4, 2, 0, 6, 1, 3, 5]
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data[order]
    model.config.id2label = {i: NAMES[number] for i, number in enumerate(order)}
    permuted = saved(model, tmp_path / "permuted")
    assert evaluated(tmp_path, permuted, labelled)["metrics"] == expected


def test_of_ties_the_first_class_wins(labelled: Path, tmp_path: Path) -> None:
    model = classifier()
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    first = len(list((labelled / min(p.name for p in labelled.iterdir())).iterdir()))
    for batch_size in (1, 7):
        found = evaluated(tmp_path, saved(model, tmp_path / "m"), labelled, "--batch-size", batch_size)
        numbers = [len(list((labelled / name).glob("*"))) for name in NAMES]
        assert found["metrics"] == {"accuracy": numbers[0] / 40, "top_5_accuracy": sum(numbers[:5]) / 40}
    assert first > 0


def test_against_the_dense_model(dense: Path, labelled: Path, tmp_path: Path) -> None:
    model = classifier()
    small = prune(model, PruningPlan.random(model, 0.3, ["heads", "mlp"]), stock=False)
    found = evaluated(tmp_path, saved(small, tmp_path / "small"), labelled, "--dense", dense, "--top-k", 2)
    assert found["dense"]["metrics"]["accuracy"] == 34 / 40 and "top_2_accuracy" in found["metrics"]
    assert (found["macs"], found["dense"]["macs"]) == (count(small).macs, count(model).macs)
    assert 0 < found["metrics"]["same_prediction_as_dense"] <= 1
    same = evaluated(tmp_path, dense, labelled, "--dense", dense)["metrics"]
    assert same["same_prediction_as_dense"] == 1


def test_adapters_with_their_base(dense: Path, labelled: Path, tmp_path: Path) -> None:
    model = ViTForImageClassification.from_pretrained(dense)
    small = prune(model, PruningPlan.random(model, 0.3, ["mlp"]), stock=False)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["classifier"])
    adapted = get_peft_model(small, lora).eval()
    save_pruned_peft(adapted, tmp_path / "adapter")
    processor().save_pretrained(tmp_path / "adapter")
    merged = saved(adapted.merge_and_unload(), tmp_path / "merged")
    found = [evaluated(tmp_path, folder, labelled) for folder in (tmp_path / "adapter", merged)]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["weights"] == weights_digest(tmp_path / "adapter") != found[1]["weights"]


def test_a_dual_encoder(labelled: Path, tmp_path: Path) -> None:
    model = dual("CLIP")()[0].eval()
    model.save_pretrained(tmp_path / "clip")
    tokenizer("ant", "bee", "cat", "dog", "elk", "fox", "gnu").save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size=SIZE, crop_size=SIZE).save_pretrained(tmp_path / "clip")
    found = evaluated(tmp_path, tmp_path / "clip", labelled, "--template", "a {}", "--dense", tmp_path / "clip")
    assert found["task"] == "zero-shot-image-classification" and found["metrics"] == found["dense"]["metrics"]
    assert found["metrics"].keys() == {"accuracy", "top_5_accuracy"}
    again = evaluated(tmp_path, tmp_path / "clip", labelled, "--template", "a {}", "--batch-size", 3)
    assert again["metrics"] == found["metrics"]
    part = evaluated(tmp_path, tmp_path / "clip", labelled, "--part", "vision")
    assert part["task"] == "image-feature-extraction" and part["macs"] == count(model, part="vision").macs


def test_a_backbone(labelled: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = ViTModel(ViTConfig(**SIZES)).eval()
    whole = saved(model, tmp_path / "whole")
    small = saved(prune(model, PruningPlan.random(model, 0.3, ["mlp"]), stock=False), tmp_path / "small")
    found = evaluated(tmp_path, small, labelled, "--dense", whole, "--neighbours", 3)
    assert found["metrics"].keys() == {
        "3_nearest_neighbour_accuracy", "feature_cosine", "lowest_feature_cosine", "shared_3_neighbours"
    }  # fmt: skip
    assert found["metrics"]["feature_cosine"] < 1
    same = evaluated(tmp_path, whole, labelled, "--dense", whole)["metrics"]
    assert same["feature_cosine"] == pytest.approx(1) and same["shared_5_neighbours"] == 1
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(labelled.rglob("*.png"))[:8]):
        (flat / f"{i}.png").symlink_to(file)
    assert "give --dense" in refused("evaluate", whole, flat)
    unlabelled = evaluated(tmp_path, small, flat, "--dense", whole)["metrics"]
    assert unlabelled.keys() == {"feature_cosine", "lowest_feature_cosine", "shared_5_neighbours"}


def test_what_cannot_be_measured_is_refused(dense: Path, labelled: Path, tmp_path: Path) -> None:
    backbone = saved(ViTModel(ViTConfig(**SIZES)), tmp_path / "backbone")
    assert "nothing to compare" in refused("evaluate", dense, labelled, "--dense", backbone)
    strange = tmp_path / "data"
    (strange / "zebra").mkdir(parents=True)
    (strange / "ant").mkdir()
    for folder in ("zebra", "ant"):
        for i in range(4):
            Image.new("RGB", (16, 16)).save(strange / folder / f"{i}.png")
    assert "zebra" in call("evaluate", dense, strange, "--split", "train").stderr.splitlines()[-1]
    out = tmp_path / "r.json"
    out.write_text("{}")
    assert "is there already" in refused("evaluate", dense, labelled, "--out", out)


@pytest.mark.slow
def test_offline_and_with_the_file_where_card_finds_it(dense: Path, labelled: Path, tmp_path: Path) -> None:
    """In a fresh process without a Hub: no script is fetched."""
    folder = saved(classifier(), tmp_path / "model")
    code = "from hf_vitprune_cli.main import main; main()"
    words = ["evaluate", str(folder), str(labelled), "--split", "train", "--out", str(folder / "results.json")]
    run_python(code, *words, HF_EVALUATE_OFFLINE="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert results_of(folder)["metrics"]["accuracy"] == 34 / 40  # type: ignore[index]


def test_results_are_those_of_the_weights_beside_them(labelled: Path, tmp_path: Path) -> None:
    model = classifier()
    folder = saved(model, tmp_path / "model")
    printed("evaluate", folder, labelled, "--split", "train", "--limit", 10, "--out", folder / "results.json")
    found = results_of(folder)
    assert found is not None and found["images"] == 10
    model.classifier.bias.data += 1
    model.save_pretrained(folder)
    assert results_of(folder) is None and load_results(folder / "results.json") == found
    (folder / "results.json").write_text('{"loss": 1}')
    with pytest.raises(InvalidDataError, match="no 'metrics' in it"):
        results_of(folder)


def test_an_image_is_not_its_own_neighbour(labelled: Path, tmp_path: Path) -> None:
    """Where gallery and images are the same: by the name of the split, and in a folder called as one."""
    torch.manual_seed(1)
    model = ViTModel(ViTConfig(**SIZES)).eval()
    folder = saved(model, tmp_path / "model")
    images = load_images(str(labelled), eval_split="train", training=False)
    features, labels = image_features(model, images.processed(processor())[1])
    expected = NearestNeighbourAccuracy().compute(predictions=features, references=labels, k=1)
    assert expected is not None and expected["1_nearest_neighbour_accuracy"] < 1
    assert evaluated(tmp_path, folder, labelled, "--neighbours", 1)["metrics"] == expected
    shutil.copytree(labelled, tmp_path / "val")
    printed("evaluate", folder, tmp_path / "val", "--neighbours", 1, "--out", tmp_path / "v.json")
    found = load_results(tmp_path / "v.json")
    assert (found["images"], found["metrics"]) == (40, expected)


@pytest.mark.slow
def test_an_exported_graph(dense: Path, labelled: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    printed("export", dense, tmp_path / "onnx", "--to", "onnx")
    assert (tmp_path / "onnx" / "preprocessor_config.json").is_file()
    found = evaluated(tmp_path, tmp_path / "onnx", labelled, "--dense", dense)
    assert found["metrics"]["accuracy"] == 34 / 40 and found["metrics"]["same_prediction_as_dense"] == 1
    assert found["macs"] is None and found["weights"] is not None and found["timing"]["samples_per_second"] > 0


def test_bench_says_what_evaluate_found(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timing anything: the metrics beside the models, of these very weights."""
    monkeypatch.setattr("hf_vitprune.publish.bench.bench", lambda *_, **__: ([], {}))
    folder = saved(classifier(), tmp_path / "small")
    save_results(folder, {"metrics": {"accuracy": 0.85}, "data": "pets", "weights": weights_digest(folder)})
    found = json.loads(printed("bench", dense, folder, "--forms", "eager", "--json"))
    assert found["metrics"] == {"small": {"accuracy on pets": 0.85}}
