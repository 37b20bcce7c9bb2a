"""Cards, and pushes to a stand-in of the Hub: complete or nothing, and an author's card stays."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from hf_vitprune import PruningTrainer
from hf_vitprune.errors import HubUploadError, InvalidConfigError, NotFiniteError, UnsupportedModelError
from hf_vitprune.latency.measure import Timing, environment
from hf_vitprune.modeling.native import to_native
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.publish import hub as hub_module
from hf_vitprune.publish.card import model_card
from hf_vitprune.publish.hub import push_to_hub
from hub_standin import HubStandIn, hub_environment
from processes import ROOT
from pruning_runs import arguments
from tiny import LABELS, images, make
from tiny_composites import COMPOSITES

REPO = "tester/small-vit"
VIT = "ViTForImageClassification"
MODEL_FILES = {"config.json", "model.safetensors", "modeling_hf_vitprune.py", "README.md"}


def small_vit(base: str = "google/vit-base", **info: Any) -> PreTrainedModel:
    model = make(VIT)
    model.config._name_or_path = base
    plan = replace(PruningPlan.random(model, 0.5, ["heads", "mlp"]), info=info)
    return prune(model, plan, stock=False)


def timing(seconds: float) -> Timing:
    setting = {"batch_size": 2, "image_size": [16, 16], "dtype": "float32", **environment()}
    return Timing(seconds, 0.0, 1.0, 2 / seconds, (seconds,) * 3, setting)


@pytest.fixture(params=[False, True], ids=["inline", "lfs"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in that this very process pushes to."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between two attempts
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubStandIn(lfs=request.param) as running:
        monkeypatch.setattr(hub_module, "HfApi", functools.partial(HfApi, endpoint=running.url))
        yield running


# ---------------------------------------------------------------------- cards
def test_card_says_everything() -> None:
    card = model_card(
        small_vit(method="vtp", pruning_ratio=0.5, skipped=None),
        before={"accuracy": 0.8125},
        after={"accuracy": 0.8},
        dataset="uoft-cs/cifar100",
        dataset_split="test",
        timings={"before": timing(0.02), "after": timing(0.01)},
        license="apache-2.0",
        tags=["tiny"],
        repo_id=REPO,
    )
    data = ModelCard(str(card)).data.to_dict()
    assert data["base_model"] == "google/vit-base" and "base_model_relation" not in data
    assert data["license"] == "apache-2.0" and data["datasets"] == "uoft-cs/cifar100"
    assert data["tags"] == ["hf_vitprune", "pruning", "vit", "tiny"]
    assert data["pipeline_tag"] == "image-classification"
    (result,) = data["model-index"][0]["results"]
    assert data["model-index"][0]["name"] == "small-vit"
    assert result["metrics"] == [{"type": "accuracy", "value": 0.8}] and result["dataset"]["split"] == "test"
    text = card.text
    assert "# small-vit" in text and "[google/vit-base](https://huggingface.co/google/vit-base)" in text
    assert "| before | 81.2% |" in text and "| 20.00 | 1.00x |" in text and "| 10.00 | 2.00x |" in text
    assert environment()["device"] in text and "batch of 2 images of 16 x 16 in float32" in text
    assert "- method: `vtp`\n- pruning ratio: `0.5`" in text and "skipped" not in text and "- plan" not in text
    assert "| 0 | attention | 2 | 8 | 8 | 24 |" in text
    assert f'AutoModelForImageClassification.from_pretrained("{REPO}")' in text and "import hf_vitprune" in text


def test_card_of_little_is_short() -> None:
    card = str(model_card(make(VIT)))
    assert "import hf_vitprune" not in card and "stock transformers model" in card
    for absent in ("Before and after", "How it was pruned", "base_model", "license", "model-index", "datasets"):
        assert absent not in card
    small = small_vit(base="/home/me/private/vit")
    assert "/home/me" not in str(model_card(small))
    folder = str(Path(__file__).parent)
    assert (
        folder not in (named := str(model_card(small, after={"accuracy": 1.0}, dataset=folder))) and "publish" in named
    )
    native = str(model_card(to_native(small), dense=make(VIT)))
    assert "| before |" in native and "import hf_vitprune" not in native


def test_card_snippets_name_what_loads_the_model() -> None:
    for name, line in (
        ("ViTModel", "from transformers import AutoModel\n"),
        ("Dinov2Backbone", "from transformers import AutoBackbone\n"),
        ("CLIPVisionModelWithProjection", "from hf_vitprune.modeling import PrunedCLIPVisionModelWithProjection\n"),
    ):
        model = make(name)
        assert line in str(model_card(prune(model, PruningPlan.random(model, 0.5, ["mlp"]), stock=False)))
    assert "from transformers import CLIPVisionModelWithProjection" in str(model_card(model))


def test_impossible_cards() -> None:
    with pytest.raises(InvalidConfigError, match="dataset"):
        model_card(small_vit(), after={"accuracy": 1.0})
    with pytest.raises(InvalidConfigError, match="'before' and 'after', got dense"):
        model_card(small_vit(), timings={"dense": timing(1)})
    from transformers import BertConfig, BertModel

    tiny_bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(UnsupportedModelError):
        model_card(BertModel(tiny_bert))


# ---------------------------------------------------------------------- pushes
class Processor:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text("{}")


def test_one_commit_with_everything(hub: HubStandIn) -> None:
    card = model_card(small_vit(), repo_id=REPO)
    info = push_to_hub(
        small_vit(), REPO, card, Processor(), token=hub.token, private=True, commit_message="First", tags=["extra"]
    )
    assert hub.repos[REPO].private
    assert [commit.title for commit in hub.repos[REPO].at("main").history()][:-1] == ["First"]
    assert info.oid == hub.repos[REPO].at("main").oid
    files = hub.files(REPO)
    assert set(files) == MODEL_FILES | {"preprocessor_config.json", ".gitattributes"}
    assert ModelCard(files["README.md"].decode()).data.tags == [*card.data.tags, "extra"]
    assert bool(hub.blobs) is hub.lfs


def test_card_on_the_hub_is_kept(hub: HubStandIn) -> None:
    push_to_hub(small_vit(), REPO, "---\nlicense: mit\ntags:\n- mine\n---\n# My words\n", token=hub.token)
    model = small_vit()
    model.classifier.bias.data += 1
    model.push_to_hub(REPO, token=hub.token)
    assert hub.files(REPO)["README.md"] == b"---\nlicense: mit\ntags:\n- mine\n---\n# My words\n"
    model.add_model_tags(["new", "mine"])
    model.push_to_hub(REPO, token=hub.token)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.tags == ["mine", "new"] and card.data.license == "mit" and "# My words" in card.text
    assert len(hub.repos[REPO].at("main").history()) == 4


def test_card_beside_the_model_goes_along(hub: HubStandIn, tmp_path: Path) -> None:
    make(VIT).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("# The dense model")
    dense = type(make(VIT)).from_pretrained(tmp_path / "dense")
    small = prune(dense, PruningPlan.random(dense, 0.5), stock=False)
    small.push_to_hub("fresh", token=hub.token)
    text = hub.files("tester/fresh")["README.md"].decode()
    assert "dense model" not in text and str(tmp_path) not in text and 'from_pretrained("tester/fresh")' in text
    small.save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text("---\nlicense: mit\n---\n# The small model")
    type(small).from_pretrained(tmp_path / "small").push_to_hub(REPO, token=hub.token)
    assert hub.files(REPO)["README.md"].decode() == "---\nlicense: mit\n---\n# The small model"


def test_the_figure_of_a_card_goes_along(hub: HubStandIn, tmp_path: Path) -> None:
    """From the folder that the card is in, of a Trainer too; drawn where there is none."""
    pytest.importorskip("matplotlib")
    small, data = small_vit(), [{"pixel_values": x, "labels": i % LABELS} for i, x in enumerate(images(4))]
    trainer = PruningTrainer(small, arguments(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="mit")
    (tmp_path / "kept.png").write_bytes(b"drawn by the author")
    trainer.args.hub_model_id = REPO
    trainer.push_to_hub(token=hub.token)
    files = hub.files(REPO)
    assert files["kept.png"] == b"drawn by the author" and ModelCard(files["README.md"].decode()).data.license == "mit"
    push_to_hub(small_vit(), "tester/drawn", token=hub.token)
    drawn = hub.files("tester/drawn")
    assert "](kept.png)" in drawn["README.md"].decode() and drawn["kept.png"][:4] == b"\x89PNG"


def test_weights_of_an_earlier_push_go(hub: HubStandIn) -> None:
    small = small_vit()
    small.push_to_hub(REPO, max_shard_size="10KB", token=hub.token)
    assert "model.safetensors.index.json" in hub.files(REPO)
    push_to_hub(to_native(small), REPO, "# Native", token=hub.token)
    weights = [name for name in hub.files(REPO) if name.startswith("model") and not name.endswith(".py")]
    assert weights == ["model.safetensors"]


def test_bigger_models(hub: HubStandIn) -> None:
    """Of their own class or of ours: weights, config and a card of the tower."""
    for name, part, title in (("CLIP", "vision", "CLIPModel"), ("DPT", None, "DPTForDepthEstimation")):
        model = COMPOSITES[name]()[0]
        small = prune(model, PruningPlan.random(model, 0.4, ["qk", "mlp"], part=part))
        pushed = f"tester/{name}"
        if name == "CLIP":
            small.push_to_hub(pushed, token=hub.token)
        else:
            push_to_hub(small, pushed, token=hub.token)
        files = hub.files(pushed)
        assert {"config.json", "model.safetensors", "README.md"} <= files.keys()
        assert "nothing else is changed" in files["README.md"].decode()
        assert json.loads(files["config.json"])["architectures"][0].endswith(title)


def test_branch_and_adapter(hub: HubStandIn) -> None:
    small = small_vit()
    push_to_hub(small, REPO, token=hub.token)
    tuned = get_peft_model(small, LoraConfig(target_modules=["q_proj"]))
    push_to_hub(tuned, REPO, "# Adapter", token=hub.token, revision="lora")
    files = hub.files(REPO, "lora")
    assert "base/model.safetensors" in files and "adapter_config.json" not in hub.files(REPO)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == REPO
    push_to_hub(tuned.merge_and_unload(), REPO, token=hub.token, revision="lora")
    files = hub.files(REPO, "lora")  # neither the adapter, nor an index that points to its base
    assert not any("adapter" in name or "base/" in name or "index" in name for name in files)


def test_numbers_that_are_none_stay_here(hub: HubStandIn) -> None:
    broken = to_native(make(VIT))
    broken.vit.layernorm.weight.data[1] = float("inf")
    with pytest.raises(NotFiniteError, match=r"1 tensors .* \(vit.layernorm.weight, ...\), so it is not pushed"):
        push_to_hub(broken, REPO, token=hub.token)
    assert not hub.repos


def test_cut_connection_leaves_nothing_to_load(hub: HubStandIn) -> None:
    for upload in (1, 2) if hub.lfs else (1,):  # large weights go before the commit, small ones in it
        repo = f"{REPO}-{upload}"
        hub.blobs.clear()
        hub.cut_uploads_after = upload
        with pytest.raises(HubUploadError, match="nothing half-finished can be loaded. Push again") as caught:
            small_vit().push_to_hub(repo, token=hub.token)
        assert isinstance(caught.value, ConnectionError) and "\n" not in str(caught.value)
        assert set(hub.files(repo)) == {".gitattributes"}
        hub.cut_uploads_after = None
        small_vit().push_to_hub(repo, token=hub.token)
        assert set(hub.files(repo)) >= MODEL_FILES


def test_cut_connection_keeps_the_version_before(hub: HubStandIn) -> None:
    small_vit().push_to_hub(REPO, token=hub.token)
    before = hub.files(REPO)
    hub.cut_uploads_after = 1
    model = make(VIT)
    with pytest.raises(HubUploadError):
        prune(model, PruningPlan.random(model, 0.25, ["mlp"]), stock=False).push_to_hub(REPO, token=hub.token)
    assert hub.files(REPO) == before


def test_no_right_and_no_connection(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubUploadError, match=r"answered 401 \(.*nothing was changed there; sign in with `hf auth"):
        small_vit().push_to_hub(REPO, token="another-token")
    monkeypatch.setattr(hub_module, "HfApi", functools.partial(HfApi, endpoint="http://127.0.0.1:1"))
    with pytest.raises(HubUploadError, match=r"the connection failed \(ConnectError: .*; nothing was changed there"):
        small_vit().push_to_hub(REPO, token=hub.token)
    assert not hub.repos


# ---------------------------------------------------------------------- in processes of their own
DIGEST = """
import hashlib, json, sys, torch
sys.path.insert(0, "tests/support")
def digest(model):
    weights = [name.encode() + value.numpy().tobytes() for name, value in sorted(model.state_dict().items())]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # aligned: weights mapped from a file may run other kernels
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        logits = model.eval()(pixel_values=image).logits
    return [hashlib.sha256(part).hexdigest() for part in (b"".join(weights), logits.numpy().tobytes())]
"""
PUSH = (
    DIGEST
    + """
from hf_vitprune import PruningPlan, prune
from tiny import make
from tiny_composites import COMPOSITES
digests = {}
for name in ("ViTForImageClassification", "SwinForImageClassification"):
    model = make(name)
    small = prune(model, PruningPlan.random(model, 0.5), stock=False)
    small.push_to_hub("tester/" + name, private=name.startswith("Swin"))
    digests[name] = digest(small)
print(json.dumps(digests))
"""
)
PULL = (
    DIGEST
    + """
import hf_vitprune
from transformers import AutoModelForImageClassification
names = ("ViTForImageClassification", "SwinForImageClassification")
print(json.dumps({name: digest(AutoModelForImageClassification.from_pretrained("tester/" + name)) for name in names}))
"""
)


def run(script: str, env: dict[str, str]) -> Any:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_pushed_models_come_back_bit_exact_elsewhere(tmp_path: Path) -> None:
    with HubStandIn(lfs=True) as hub:
        pushed = run(PUSH, hub_environment(hub, tmp_path / "a"))
        assert run(PULL, hub_environment(hub, tmp_path / "b")) == pushed
        assert hub.repos["tester/SwinForImageClassification"].private
        assert all(set(hub.files(repo)) >= MODEL_FILES for repo in hub.repos)
        weights = hub.files("tester/ViTForImageClassification")["model.safetensors"]
        assert hashlib.sha256(weights).hexdigest() in hub.blobs


def test_the_config_names_a_hub_id_but_no_local_folder(tmp_path: Path) -> None:
    assert small_vit("google/vit-base").config.pruning_config["info"]["base_model"] == "google/vit-base"
    assert "base_model" not in small_vit(str(tmp_path)).config.pruning_config["info"]
