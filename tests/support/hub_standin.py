"""A small stand-in for the Hugging Face Hub that lives inside the test process.

It keeps model repositories in memory and answers the requests that ``huggingface_hub`` 2.x makes to create a
repository, push to it and load from it, so that tests exercise the real client code with no network:

    with HubStandIn() as hub:
        subprocess.run([sys.executable, "-c", script], env=hub_environment(hub, tmp_path), check=True)
        assert "config.json" in hub.files("tester/model")

``huggingface_hub`` reads its settings when it is imported, hence the subprocess. Not covered: datasets and spaces,
pull requests, tags, Xet storage, and the check of a card's YAML (every card is accepted).
"""

from __future__ import annotations

import os
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub_standin_http import HubHandler
from hub_standin_store import Repo


class HubStandIn:
    """The server. Everything a test may look at or switch is a public attribute.

    ``lfs``: whether weights go through large-file storage (as on the real Hub) or inline in the commit.
    ``requests``: "METHOD path" of everything that was asked, in order.
    ``cut_uploads_after``: set it to n to lose the connection half-way through the n-th upload (a large-file PUT or
    a commit) counted from now, and through every later one; None mends the line.
    ``cuts_left``: how many uploads are lost before the line mends by itself; None for no end.
    """

    def __init__(self, *, lfs: bool = False, user: str = "tester", token: str = "stand-in-token"):
        self.lfs, self.user, self.token = lfs, user, token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cuts_left: int | None = None
        self.lock = threading.RLock()
        self._cut_from: int | None = None
        self._uploads = 0
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def cut_uploads_after(self) -> int | None:
        return self._cut_from

    @cut_uploads_after.setter
    def cut_uploads_after(self, upload: int | None) -> None:
        with self.lock:
            self._cut_from, self._uploads = upload, 0

    def loses_next_upload(self) -> bool:
        """Count one upload, and say whether its connection is to be cut."""
        with self.lock:
            self._uploads += 1
            if self._cut_from is None or self._uploads < self._cut_from or self.cuts_left == 0:
                return False
            if self.cuts_left is not None:
                self.cuts_left -= 1
            return True

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, as a test that may see everything finds them."""
        return {path: file.data for path, file in self.repos[repo_id].at(revision).files.items()}


def hub_environment(hub: HubStandIn, home: Path, *, signed_in: bool = True) -> dict[str, str]:
    """The environment in which a new process takes ``hub`` for the Hub and ``home`` for its cache."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    return inherited | settings | ({"HF_TOKEN": hub.token} if signed_in else {})
