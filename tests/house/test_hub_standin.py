"""The Hub stand-in, seen by the real client: stock transformers and huggingface_hub in processes of their own.

What test_hub.py shows with pruned models as well is slow here: every process imports transformers anew.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_standin import HubStandIn, hub_environment

REPO = "tester/tiny-vit"

# Prints a digest of the weights and of the logits on a fixed image.
DIGEST = """
import hashlib, torch
def digest(model):
    parts = [name.encode() + value.numpy().tobytes() for name, value in sorted(model.state_dict().items())]
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        parts.append(model.eval()(pixel_values=image).logits.numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()
"""

PUSH = (
    DIGEST
    + """
import sys
from transformers import ViTConfig, ViTForImageClassification
torch.manual_seed(0)
config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                   patch_size=8, num_labels=3)
model = ViTForImageClassification(config)
print(digest(model), flush=True)
model.push_to_hub(sys.argv[1], private=len(sys.argv) > 2)
"""
)

LOAD = (
    DIGEST
    + """
import sys
from transformers import AutoModelForImageClassification
print(digest(AutoModelForImageClassification.from_pretrained(sys.argv[1])))
"""
)


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as running:
        yield running


@pytest.fixture
def lfs_hub() -> Iterator[HubStandIn]:
    with HubStandIn(lfs=True) as running:
        yield running


def run(script: str, *args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def run_well(script: str, *args: str, env: dict[str, str]) -> str:
    done = run(script, *args, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_model_comes_back_bit_exact_inline(hub: HubStandIn, tmp_path: Path) -> None:
    pushed = run_well(PUSH, REPO, env=hub_environment(hub, tmp_path / "a"))
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files(REPO))
    assert not hub.blobs
    assert run_well(LOAD, REPO, env=hub_environment(hub, tmp_path / "b", signed_in=False)) == pushed


@pytest.mark.slow
def test_model_comes_back_bit_exact_from_a_private_repo_in_lfs(lfs_hub: HubStandIn, tmp_path: Path) -> None:
    pushed = run_well(PUSH, REPO, "private", env=hub_environment(lfs_hub, tmp_path / "a"))
    weights = lfs_hub.files(REPO)["model.safetensors"]
    assert lfs_hub.blobs == {hashlib.sha256(weights).hexdigest(): weights}
    assert lfs_hub.repos[REPO].private

    refused = run(LOAD, REPO, env=hub_environment(lfs_hub, tmp_path / "b", signed_in=False))
    assert refused.returncode != 0
    assert "OSError" in refused.stderr and "private repository" in refused.stderr

    assert run_well(LOAD, REPO, env=hub_environment(lfs_hub, tmp_path / "c")) == pushed


@pytest.mark.slow
@pytest.mark.parametrize("lfs", [False, True], ids=["inline", "lfs"])
def test_connection_cut_in_the_commit_leaves_nothing_behind(lfs: bool, tmp_path: Path) -> None:
    with HubStandIn(lfs=lfs) as hub:
        hub.cut_uploads_after = 2 if lfs else 1  # in LFS mode the weights arrive first, and then the commit is lost
        failed = run(PUSH, REPO, env=hub_environment(hub, tmp_path))
        assert failed.returncode != 0
        error = failed.stderr.strip().splitlines()[-1]
        assert error.split(":")[0].endswith(("RemoteProtocolError", "ReadError", "WriteError")), error
        assert len(hub.blobs) == (1 if lfs else 0)
        assert set(hub.files(REPO)) == {".gitattributes"}
        assert len(hub.repos[REPO].at("main").history()) == 1


UPLOAD = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
api.create_repo(sys.argv[1])
api.create_commit(sys.argv[1], [CommitOperationAdd("model.safetensors", b"0123456789" * 9)], commit_message="weights")
"""


def test_client_tries_again_after_a_cut_lfs_upload(lfs_hub: HubStandIn, tmp_path: Path) -> None:
    lfs_hub.cut_uploads_after, lfs_hub.cuts_left = 1, 1
    run_well(UPLOAD, REPO, env=hub_environment(lfs_hub, tmp_path))
    assert [r.split()[0] for r in lfs_hub.requests if "/lfs/" in r and "batch" not in r] == ["PUT", "PUT"]
    assert lfs_hub.files(REPO)["model.safetensors"] == b"0123456789" * 9


TOUR = """
import json, sys
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
repo, api, seen = sys.argv[1], HfApi(), {}

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as raised:
        return type(raised).__name__

seen["user"] = api.whoami()["name"]
seen["missing repo"] = error(api.model_info, repo)
api.create_repo(repo)
seen["created twice"] = error(api.create_repo, repo)
api.create_repo(repo, exist_ok=True)
seen["dataset"] = error(api.create_repo, repo, repo_type="dataset")
add = [CommitOperationAdd(path, content) for path, content in
       {"config.json": b"{}", "deep/er/weights.bin": b"0123456789", "deep/note.txt": b"old"}.items()]
first = api.create_commit(repo, add, commit_message="first").oid
changes = [CommitOperationAdd("deep/note.txt", b"new"), CommitOperationDelete("config.json")]
second = api.create_commit(repo, changes, commit_message="second").oid
again = [CommitOperationAdd("deep/note.txt", b"new")]
seen["no change, no commit"] = api.create_commit(repo, again, commit_message="third").oid == second
seen["stale parent"] = error(api.create_commit, repo, [CommitOperationAdd("late", b"x")], commit_message="late",
                             parent_commit=first)
seen["top"] = sorted(entry.path for entry in api.list_repo_tree(repo))
seen["all"] = sorted(entry.path for entry in api.list_repo_tree(repo, recursive=True))
seen["files"] = api.list_repo_files(repo)
seen["files at first"] = api.list_repo_files(repo, revision=first)
seen["sizes"] = {info.path: info.size for info in api.get_paths_info(repo, ["deep/er/weights.bin", "none"])}
seen["is lfs"] = api.get_paths_info(repo, ["deep/er/weights.bin"])[0].lfs is not None
seen["titles"] = [commit.title for commit in api.list_repo_commits(repo)][:2]
api.create_branch(repo, branch="old", revision=first)
seen["branch taken"] = error(api.create_branch, repo, branch="old")
refs = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).branches}
seen["refs"] = refs == {"main": second, "old": first}
seen["sha"] = [api.model_info(repo).sha == second, api.model_info(repo, revision="old").sha == first]
seen["note"] = [open(hf_hub_download(repo, "deep/note.txt", revision=r)).read() for r in (None, "old", first)]
seen["missing file"] = error(hf_hub_download, repo, "nothing.txt")
seen["missing revision"] = error(hf_hub_download, repo, "config.json", revision="nowhere")
ModelCard("---\\nlicense: apache-2.0\\n---\\n# A card").push_to_hub(repo)
seen["license"] = ModelCard.load(repo).data.license
stranger, late = HfApi(token="another-token"), [CommitOperationAdd("late", b"x")]
seen["write as stranger"] = error(stranger.create_commit, repo, late, commit_message="late")
api.create_repo(repo + "-private", private=True)
seen["look as stranger"] = error(stranger.model_info, repo + "-private")
seen["own private repo"] = api.model_info(repo + "-private").private
api.delete_repo(repo)
api.delete_repo(repo + "-private")
seen["deleted"] = not api.repo_exists(repo)
print(json.dumps(seen))
"""


def test_client_finds_its_way_about(lfs_hub: HubStandIn, tmp_path: Path) -> None:
    seen = json.loads(run_well(TOUR, REPO, env=hub_environment(lfs_hub, tmp_path)))
    assert seen == {
        "user": "tester",
        "missing repo": "RepositoryNotFoundError",
        "created twice": "HfHubHTTPError",
        "dataset": "BadRequestError",
        "no change, no commit": True,
        "stale parent": "HfHubHTTPError",
        "top": [".gitattributes", "deep"],
        "all": [".gitattributes", "deep", "deep/er", "deep/er/weights.bin", "deep/note.txt"],
        "files": [".gitattributes", "deep/er/weights.bin", "deep/note.txt"],
        "files at first": [".gitattributes", "config.json", "deep/er/weights.bin", "deep/note.txt"],
        "sizes": {"deep/er/weights.bin": 10},
        "is lfs": True,
        "titles": ["second", "first"],
        "branch taken": "HfHubHTTPError",
        "refs": True,
        "sha": [True, True],
        "note": ["new", "old", "old"],
        "missing file": "RemoteEntryNotFoundError",
        "missing revision": "RevisionNotFoundError",
        "license": "apache-2.0",
        "write as stranger": "HfHubHTTPError",
        "look as stranger": "RepositoryNotFoundError",
        "own private repo": True,
        "deleted": True,
    }
    assert not lfs_hub.repos


def ask(url: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    try:
        request = urllib.request.Request(url, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read(), dict(refusal.headers)


def test_parts_of_a_file(hub: HubStandIn) -> None:
    token = f"Bearer {hub.token}"
    ask(f"{hub.url}/api/repos/create", "POST", b'{"name": "tiny-vit"}', Authorization=token)
    line = {"key": "file", "value": {"path": "digits", "content": "MDEyMzQ1Njc4OQ=="}}
    status, _, _ = ask(
        f"{hub.url}/api/models/{REPO}/commit/main", "POST", json.dumps(line).encode(), Authorization=token
    )
    assert status == 200
    url = f"{hub.url}/{REPO}/resolve/main/digits"
    status, body, headers = ask(url)
    assert (status, body, headers["X-Repo-Commit"]) == (200, b"0123456789", hub.repos[REPO].at("main").oid)
    status, body, headers = ask(url, Range="bytes=2-4")
    assert (status, body, headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
    assert ask(url, Range="bytes=7-")[:2] == (206, b"789")
    assert ask(url, Range="bytes=10-")[0] == 416
    status, body, headers = ask(url, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "10")


def test_uploads_that_are_not_what_they_claim(hub: HubStandIn) -> None:
    assert ask(f"{hub.url}/lfs/{'0' * 64}", "PUT", b"something else")[0] == 400
    assert not hub.blobs
    token = f"Bearer {hub.token}"
    ask(f"{hub.url}/api/repos/create", "POST", b'{"name": "tiny-vit"}', Authorization=token)
    lines = [
        {"key": "file", "value": {"path": "fine", "content": ""}},
        {"key": "lfsFile", "value": {"path": "model.safetensors", "oid": "0" * 64, "size": 3}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    assert ask(f"{hub.url}/api/models/{REPO}/commit/main", "POST", body, Authorization=token)[0] == 400
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert ask(f"{hub.url}/api/models/{REPO}/commit/main", "POST", body)[0] == 401
