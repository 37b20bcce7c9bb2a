"""What the Hub stand-in keeps: files, commits and repositories, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True)
class StoredFile:
    """The content of one file, and whether it came through large-file storage."""

    data: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def git_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_id

    def describe(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_id}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files, with the snapshot it was made from."""

    oid: str
    title: str
    files: dict[str, StoredFile]
    parent: Commit | None = None

    @classmethod
    def create(cls, title: str, files: dict[str, StoredFile], parent: Commit | None = None) -> Commit:
        content = sorted((path, file.etag) for path, file in files.items())
        identity = json.dumps([title, parent.oid if parent else None, content])
        return cls(hashlib.sha1(identity.encode()).hexdigest(), title, files, parent)

    def listing(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders below ``folder``; only the first level of them unless ``recursive``."""
        top = PurePosixPath(folder)
        entries: dict[str, dict[str, Any]] = {}
        for path in (p for p in sorted(self.files) if PurePosixPath(p).is_relative_to(top)):
            parents = [top / parent for parent in PurePosixPath(path).relative_to(top).parents][-2::-1]
            for parent in map(str, parents if recursive else parents[:1]):
                tree_id = hashlib.sha1(parent.encode()).hexdigest()
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": tree_id}
            if recursive or not parents:
                entries[path] = self.files[path].describe(path)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist in {self.oid}", "EntryNotFound")
        return list(entries.values())

    def history(self) -> list[Commit]:
        return [self, *(self.parent.history() if self.parent else [])]


class HubError(Exception):
    """A refusal, in the form the client understands: a status and the Hub's own name for the error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Repo:
    """One model repository: branches that point at commits."""

    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private = repo_id, private
        self.branches = {"main": Commit.create(f"initial commit of {repo_id}", {".gitattributes": StoredFile(b"")})}

    def at(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision]
        for head in self.branches.values():
            for commit in head.history():
                if commit.oid == revision:
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def branch_head(self, branch: str) -> Commit:
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return self.branches[branch]

    def commit(self, branch: str, changes: list[dict[str, Any]], blobs: dict[str, bytes]) -> Commit:
        """Apply the changes of one commit request, entirely or not at all."""
        parent = self.branch_head(branch)
        files, title = dict(parent.files), ""
        for change in changes:
            key, value = change["key"], change["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent.oid):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in blobs:
                    raise HubError(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = StoredFile(blobs[value["oid"]], is_lfs=True)
            elif key in ("deletedFile", "deletedFolder"):
                gone = value["path"].rstrip("/")
                files = {p: f for p, f in files.items() if p != gone and not p.startswith(gone + "/")}
            else:
                raise HubError(400, f"Unknown change {key!r}")
        made = self.branches[branch] = Commit.create(title, files, parent)
        return made
