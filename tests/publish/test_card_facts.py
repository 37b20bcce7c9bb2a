"""Cards: facts that belong together, what a folder keeps, figures, and code that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessorPil

from command_line import printed
from hf_vitprune import PruningPlan, PruningTrainer, count, prune, truncate
from hf_vitprune.evaluation.results import save_results, weights_digest
from hf_vitprune.plan.lineage import lineage_of
from hf_vitprune.publish.card import model_card
from hf_vitprune.publish.kept import beside, kept_of, license_of
from hf_vitprune.publish.report import human
from hf_vitprune.publish.snippet import Beside
from hf_vitprune_cli import workflow
from hf_vitprune_cli.workflow import PrunedResult, save_result
from processes import run_python
from pruning_runs import arguments
from tiny import LABELS, images, make

VIT = "ViTForImageClassification"


def halved(model: Any, ratio: float = 0.3) -> Any:
    return prune(model, PruningPlan.random(model, ratio, ["heads", "mlp"]), stock=False)


def processor() -> Any:
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def pushed(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def rows(card: Any) -> dict[str, list[str]]:
    """Name -> cells of the rows of the table of results."""
    table = str(card).partition("## Before and after")[2].partition("##")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells[2:]}


# ---------------------------------------------------------------------- numbers that belong together
def test_of_a_model_pruned_twice_every_size_has_its_own_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "plot_kept", lambda *_: None)
    models, accuracies = [make(VIT)], [0.9, 0.8, 0.7]
    for i in range(2):
        plan = PruningPlan.random(models[-1], 0.3, ["heads", "mlp"])
        small = prune(models[-1], plan, stock=False)
        found = {"dense": accuracies[i], "pruned": accuracies[i + 1]}
        save_result(tmp_path / str(i), PrunedResult(small, plan, found), processor(), None, dataset="cifar10")
        models.append(type(small).from_pretrained(tmp_path / str(i)))
    sizes = [human(count(model).params) for model in models]
    expected = {"dense": ["90.0%", sizes[0]], "pruned once": ["80.0%", sizes[1]], "after": ["70.0%", sizes[2]]}
    card = ModelCard.load(tmp_path / "1" / "README.md")
    assert {name: cells[:2] for name, cells in rows(card).items()} == expected
    assert f"{sizes[2]} of {sizes[0]} parameters" in card.text
    first = rows(ModelCard.load(tmp_path / "0" / "README.md"))
    assert {name: cells[:2] for name, cells in first.items()} == {
        "before": ["90.0%", sizes[0]], "after": ["80.0%", sizes[1]]
    }  # fmt: skip
    again = printed("card", tmp_path / "1")  # from the folder alone
    assert {name: cells[:2] for name, cells in rows(again).items()} == expected
    other = model_card(models[2], before={"accuracy": 0.5}, after={"accuracy": 0.4}, dataset="food101")
    assert {name: cells[0] for name, cells in rows(other).items()} == {
        "dense": "", "pruned once": "50.0%", "after": "40.0%"
    }  # fmt: skip
    given = model_card(
        models[2], dense=models[0], before={"accuracy": 0.5}, after={"accuracy": 0.4}, dataset="food101"
    )
    assert rows(given)["dense"][:2] == ["50.0%", sizes[0]]


def test_the_history_is_of_sizes_from_the_dense_model_on() -> None:
    dense = make(VIT)
    once = halved(dense)
    twice = halved(once)
    sizes = [entry["params"] for entry in lineage_of(twice.config)["history"]]
    assert sizes == [count(dense).params, count(once).params]


# ---------------------------------------------------------------------- facts
def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(VIT).save_pretrained("models/vit-base")
    small = halved(ViTForImageClassification.from_pretrained("models/vit-base"))
    pushed(small, tmp_path / "small")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = printed("card", tmp_path / "small")
    assert "base_model" not in ModelCard(text).data.to_dict() and "base_model_relation" not in text
    assert "- Base model: `vit-base`, which is not on the Hub" in text and "models/vit-base" not in text


def test_author_license_and_whether_it_was_trained(tmp_path: Path) -> None:
    dense = make(VIT)
    dense.config._name_or_path = "google/vit-base"
    small = halved(dense)
    text = str(model_card(small))
    assert "- Training after pruning: none on record" in text and "that of the base model holds" in text
    data = [{"pixel_values": x, "labels": i % LABELS} for i, x in enumerate(images(8))]
    settings = {"learning_rate": 3e-4, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = PruningTrainer(small, arguments(tmp_path, **settings), train_dataset=data, eval_dataset=data)
    trainer.train()
    card = model_card(small, license="mit", author="Ada")
    metadata: Any = ModelCard(str(card)).data
    assert "- Training after pruning: on labels, 2 steps of 4 images at a learning rate of 0.0003" in card.text
    assert "- License: mit\n- Author: Ada" in card.text and metadata.license == "mit"
    assert (metadata.base_model, metadata.base_model_relation) == ("google/vit-base", "finetune")
    small.save_pretrained(tmp_path / "small")
    assert "2 steps of 4 images" in printed("card", tmp_path / "small", "--author", "Ada")


def test_the_license_is_that_of_the_base_models_card(tmp_path: Path) -> None:
    assert license_of(None) is None and license_of(str(tmp_path)) is None and license_of("no/such-model") is None
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    assert license_of(str(tmp_path)) == "cc-by-4.0"


def test_a_model_that_is_not_pruned_is_not_called_so() -> None:
    for model, words in ((make(VIT), "A version that is not pruned (`vit`)"), (halved(make(VIT)), "A pruned version")):
        card = model_card(model)
        data: Any = card.data
        assert words in card.text and ("pruning" in data.tags) == words.startswith("A pruned")


# ---------------------------------------------------------------------- what a folder has
def test_a_new_card_keeps_the_metrics(tmp_path: Path) -> None:
    small = halved(make(VIT))
    folder = pushed(small, tmp_path / "small")
    first = model_card(
        small, after={"accuracy": 0.75}, dataset="cifar10", dataset_split="test", license="mit", base_model="a/b"
    )
    first.save(folder / "README.md")
    printed("card", folder, "--out", folder / "README.md", "--force")
    data: Any = ModelCard.load(folder / "README.md").data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.75, "cifar10")
    assert (result.dataset_split, data.license, data.base_model) == ("test", "mit", "a/b")
    results = {"metrics": {"accuracy": 0.5}, "data": "food101", "weights": weights_digest(folder)}
    results["dense"] = {"metrics": {"accuracy": 0.6}}
    save_results(folder, results)
    text = printed("card", folder)
    assert rows(text)["after"][0] == "50.0%" and rows(text)["before"][0] == "60.0%"
    kept: Any = ModelCard(text).data
    assert [(r.dataset_name, r.metric_value) for r in kept.eval_results] == [("food101", 0.5), ("cifar10", 0.75)]
    small.classifier.bias.data += 1
    small.save_pretrained(folder)  # the results are of other weights now
    assert rows(printed("card", folder))["after"][0] == "75.0%"


def test_metrics_of_a_trainer(tmp_path: Path) -> None:
    folder = pushed(halved(make(VIT)), tmp_path / "small")
    (folder / "all_results.json").write_text('{"eval_accuracy": 0.25, "eval_runtime": 3.0, "train_loss": 1.0}')
    assert kept_of(folder).settings == {"after": {"accuracy": 0.25}, "dataset": "unnamed data"}
    data: Any = ModelCard(printed("card", folder, "--dataset", "cifar10")).data
    assert [(r.dataset_name, r.metric_value) for r in data.eval_results] == [("cifar10", 0.25)]


def test_the_metadata_is_what_the_hub_reads() -> None:
    card = model_card(
        halved(make(VIT)), after={"accuracy": 0.5, "top_5_accuracy": 0.9}, dataset="cifar10",
        eval_results=[EvalResult("image-classification", "food101", "food101", "accuracy", 0.3)],
    )  # fmt: skip
    data = ModelCard(str(card)).data.to_dict()
    name, results = model_index_to_eval_results(data["model-index"])
    assert [(r.metric_type, r.metric_value) for r in results] == [
        ("accuracy", 0.5), ("top_5_accuracy", 0.9), ("accuracy", 0.3)
    ]  # fmt: skip
    assert eval_results_to_model_index(name, results) == data["model-index"]


def test_the_figure_lies_beside_the_card(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = pushed(halved(make(VIT)), tmp_path / "small")
    printed("card", folder, "--out", folder / "README.md")
    assert "](kept.png)" in (folder / "README.md").read_text() and (folder / "kept.png").stat().st_size > 1000


# ---------------------------------------------------------------------- a Trainer
def test_the_card_of_a_trainer_is_ours_and_stays(tmp_path: Path) -> None:
    small, data = halved(make(VIT)), [{"pixel_values": x, "labels": i % LABELS} for i, x in enumerate(images(8))]
    trainer = PruningTrainer(small, arguments(tmp_path, max_steps=1), train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(dataset="cifar10", license="mit", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    metadata: Any = card.data
    assert metadata.license == "mit" and {"hf_vitprune", "mine"} <= set(metadata.tags)
    assert metadata.eval_results[0].dataset_name == "cifar10" and "## Layers" in card.text
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- own\n---\n# My words\n")
    trainer.create_model_card(tags=["more"])
    kept = ModelCard.load(tmp_path / "README.md")
    assert "# My words" in kept.text and kept.data.tags == ["own", "more"]  # type: ignore[attr-defined]
    dense = PruningTrainer(make(VIT), arguments(tmp_path / "dense", max_steps=1), train_dataset=data)
    dense.train()
    dense.create_model_card()
    assert "hf_vitprune" not in (tmp_path / "dense" / "README.md").read_text()


# ---------------------------------------------------------------------- code that runs
def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def test_the_snippets_of_every_kind() -> None:
    small, whole = halved(make(VIT)), Beside(processor=True)
    pipe, alone = blocks(str(model_card(small, beside=whole)))
    assert pipe.startswith("import hf_vitprune") and 'pipeline("image-classification", model="path/to/model")' in pipe
    assert 'AutoModelForImageClassification.from_pretrained("path/to/model")' in alone
    stock = blocks(str(model_card(make(VIT), beside=whole)))[0]
    assert "hf_vitprune" not in stock
    assert "trust_remote_code=True" in blocks(str(model_card(small, beside=Beside(True, portable=True))))[0]
    adapted = get_peft_model(small, LoraConfig(target_modules=["q_proj"]))
    card = model_card(adapted, base_model="a/b")
    data: Any = card.data
    assert (data.library_name, data.base_model_relation) == ("peft", "adapter") and "adapters of a pruned" in card.text


def test_the_pipeline_runs_in_a_fresh_process(tmp_path: Path) -> None:
    folder = pushed(halved(make(VIT)), tmp_path / "small")
    Image.new("RGB", (20, 20), (200, 30, 30)).save(tmp_path / "image.jpg")
    code = "\n".join(blocks(printed("card", folder))).replace("path/to/model", str(folder))
    printed_there = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{code}\nprint(type(model).__name__)")
    assert "'score'" in printed_there and "PrunedViTForImageClassification" in printed_there


def test_what_lies_beside(tmp_path: Path) -> None:
    assert beside(tmp_path) == Beside()
    for name in ("preprocessor_config.json", "tokenizer_config.json", "adapter_config.json"):
        (tmp_path / name).touch()
    assert beside(tmp_path) == Beside(processor=True, tokenizer=True, adapter=True)


def test_the_card_of_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer layers over the dense model, and over a pruned base beside them: code that loads both."""
    monkeypatch.chdir(tmp_path)
    dense = pushed(make(VIT), Path("models/dense"))
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], init_lora_weights=False)
    short = truncate(get_peft_model(ViTForImageClassification.from_pretrained(dense), lora), 2)
    narrow = get_peft_model(halved(ViTForImageClassification.from_pretrained(dense)), lora)
    for name, model in (("short", short), ("narrow", narrow)):
        folder = pushed(model, tmp_path / name)
        assert (folder / "README.md").is_file()  # PEFT's own
        text = printed("card", folder)
        data: Any = ModelCard(text).data
        assert data.library_name == "peft" and "base_model" not in data.to_dict() and "`dense`" in text
        loading = blocks(text)[-1].replace("path/to/model", str(folder))
        found: dict[str, Any] = {}
        exec(loading, found)
        pixels = images(2)
        expected = model.eval()(pixel_values=pixels).logits
        assert found["model"](pixel_values=pixels).logits.allclose(expected, atol=1e-6)
