"""The requests that the Hub stand-in answers: one method each, found through the table at the end."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_standin_store import HubError, Repo

if TYPE_CHECKING:
    from hub_standin import HubStandIn

DATE = "2024-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".pt")


class HubHandler(BaseHTTPRequestHandler):
    """Turns requests into calls on the repositories. A new one is made for every connection."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: ``hub.requests`` has it all."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append(f"{self.command} {unquote(url.path)}")
        is_upload = self.command == "PUT" or (self.command == "POST" and "/commit/" in url.path)
        if is_upload and self.hub.loses_next_upload():
            self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
            self.close_connection = True  # the other half is never read, and no answer is sent
            return
        self.body = self.read_body()
        try:
            with self.hub.lock:
                self.dispatch(url.path)
        except HubError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.send_json({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def dispatch(self, path: str) -> None:
        for methods, pattern, action in ROUTES:
            if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                getattr(self, action)(**{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
                return
        raise HubError(404, f"The stand-in has no {self.command} {path}", "EntryNotFound")

    # -- reading and writing ------------------------------------------------------------------------------------

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send_bytes(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who may do what ----------------------------------------------------------------------------------------

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def require_token(self) -> None:
        if not self.signed_in:
            raise HubError(401, "Invalid username or password.")

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        """The repository, if this client may know of it: a private one looks like one that is not there."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.signed_in):
            raise HubError(404 if self.signed_in else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_token()
        return repo

    # -- the account and its repositories -----------------------------------------------------------------------

    def who_am_i(self) -> None:
        self.require_token()
        role = {"accessToken": {"role": "write", "displayName": "test"}}
        self.send_json({"type": "user", "name": self.hub.user, "orgs": [], "auth": role})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def requested_repo_id(self, request: dict[str, Any]) -> str:
        self.require_token()
        if request.get("type", "model") != "model":
            raise HubError(400, f"The stand-in keeps models only, not a {request['type']}")
        return f"{request.get('organization') or self.hub.user}/{request['name']}"

    def create_repo(self) -> None:
        request = json.loads(self.body)
        repo_id = self.requested_repo_id(request)
        answer = {"id": repo_id, "name": repo_id, "url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self.send_json(answer | {"error": "You already created this model repo"}, 409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repos[repo_id] = Repo(repo_id, private)
        self.send_json(answer)

    def delete_repo(self) -> None:
        repo_id = self.requested_repo_id(json.loads(self.body))
        del self.hub.repos[self.repo(repo_id).repo_id]
        self.send_json({})

    # -- pushing ------------------------------------------------------------------------------------------------

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self.repo(repo_id, write=True).at(revision).files
        plans = []
        for path in (entry["path"] for entry in json.loads(self.body)["files"]):
            mode = "lfs" if self.hub.lfs and path.endswith(LFS_SUFFIXES) else "regular"
            oid = files[path].etag if path in files else None
            plans.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": plans})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id, write=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            oid, wanted = entry["oid"], {"oid": entry["oid"], "size": entry["size"]}
            if oid not in self.hub.blobs:
                upload, verify = f"{self.hub.url}/lfs/{oid}", f"{self.hub.url}/lfs-verify"
                wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(wanted)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"The content sent is not that of {oid}")
        self.hub.blobs[oid] = self.body
        self.send_json({})

    def lfs_verify(self) -> None:
        request = json.loads(self.body)
        if len(self.hub.blobs.get(request["oid"], b"")) != request["size"]:
            raise HubError(404, f"{request['oid']} was not uploaded")
        self.send_json({})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id, write=True)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.at(json.loads(self.body or b"{}").get("startingPoint", "main"))
        self.send_json({})

    def commit(self, repo_id: str, branch: str) -> None:
        changes = [json.loads(line) for line in self.body.decode().splitlines()]
        made = self.repo(repo_id, write=True).commit(branch, changes, self.hub.blobs)
        url = f"{self.hub.url}/{repo_id}/commit/{made.oid}"
        self.send_json({"success": True, "commitOid": made.oid, "commitUrl": url, "pullRequestUrl": None})

    # -- looking and loading ------------------------------------------------------------------------------------

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(repo_id)
        commit = repo.at(revision)
        siblings = [
            {"rfilename": path, "size": len(file.data), "blobId": file.git_id} for path, file in commit.files.items()
        ]
        facts = {"_id": repo_id, "id": repo_id, "author": repo_id.split("/")[0], "private": repo.private}
        counts = {"tags": [], "downloads": 0, "likes": 0, "lastModified": DATE, "createdAt": DATE}
        self.send_json(facts | counts | {"sha": commit.oid, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        recursive = self.query.get("recursive", [""])[0].lower() in ("1", "true")
        self.send_json(self.repo(repo_id).at(revision).listing(folder, recursive))

    def paths_info(self, repo_id: str, revision: str) -> None:
        files = self.repo(repo_id).at(revision).files
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode())).get("paths", [])
        self.send_json([files[path].describe(path) for path in paths if path in files])

    def refs(self, repo_id: str) -> None:
        branches = self.repo(repo_id).branches.items()
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": commit.oid} for n, commit in branches]
        self.send_json({"branches": heads, "tags": [], "converts": [], "pullRequests": []})

    def commits(self, repo_id: str, revision: str) -> None:
        history = self.repo(repo_id).at(revision).history()
        authors = [{"user": self.hub.user}]
        self.send_json(
            [{"id": c.oid, "title": c.title, "message": "", "date": DATE, "authors": authors} for c in history]
        )

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.repo(repo_id).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if (file := commit.files.get(path)) is None:
            missing = headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send_json({"error": "Entry not found"}, 404, missing)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send_bytes(file.data, 200, headers)
        size = len(file.data)
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first > last:
            return self.send_bytes(b"", 416, headers | {"Content-Range": f"bytes */{size}"})
        self.send_bytes(file.data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"})


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
ROUTES: tuple[tuple[str, str, str], ...] = (
    ("GET", r"/api/whoami-v2", "who_am_i"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("POST", rf"{_MODEL}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs-verify", "lfs_verify"),
    ("POST", rf"{_MODEL}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", rf"{_MODEL}/commit/(?P<branch>[^/]+)", "commit"),
    ("GET", rf"{_MODEL}(/revision/(?P<revision>[^/]+))?", "model_info"),
    ("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", rf"{_MODEL}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"{_MODEL}/refs", "refs"),
    ("GET", rf"{_MODEL}/commits/(?P<revision>[^/]+)", "commits"),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)
