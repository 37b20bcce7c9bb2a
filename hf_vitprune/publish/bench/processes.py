"""Processes that hold one model in one form each, and take turns at being timed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...errors import BenchError
from ...latency.measure import MAX_REPEATS

#: of calls a turn: what a process pays for waking up, and the noise of a single call, are then small beside it
SAMPLE_SECONDS = 0.25


class _Worker:
    """A process with one model in one form."""

    def __init__(self, order: dict[str, Any]) -> None:
        script = str(Path(__file__).with_name("worker.py"))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", script, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=_environment(order["threads"]),
        )
        self.form = order["form"]

    def answer(self) -> dict[str, Any]:
        """Raises:
        BenchError: the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            raise BenchError(f"{self.form} does not run: {said[-1] if said else 'its process ended'}")
        return json.loads(line)

    def ask(self, repeats: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(repeats, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()
        self.errors.close()


def _environment(threads: int) -> dict[str, str]:
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def timed(
    orders: Mapping[tuple[str, str], dict[str, Any]], rounds: int, progress: bool
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], float]]:
    """(seconds round by round, peak megabytes) of every order; each round asks all of them once.

    Raises:
        BenchError: a model does not run in a form.
    """
    with contextlib.ExitStack() as stack:
        workers = {}
        for key, order in orders.items():
            workers[key] = worker = _Worker(order)
            stack.callback(worker.close)
        for worker in workers.values():
            worker.answer()  # ready
        once = {key: min(worker.ask(1)["seconds"] for _ in range(2)) for key, worker in workers.items()}
        repeats = {key: max(1, min(MAX_REPEATS, round(SAMPLE_SECONDS / max(s, 1e-9)))) for key, s in once.items()}
        samples: dict[tuple[str, str], list[float]] = {key: [] for key in orders}
        memory: dict[tuple[str, str], float] = {}
        for _ in tqdm(range(rounds), "measuring", disable=not progress, leave=False):
            for key, worker in workers.items():
                answer = worker.ask(repeats[key])
                samples[key].append(answer["seconds"])
                memory[key] = answer["megabytes"]
        return samples, memory
