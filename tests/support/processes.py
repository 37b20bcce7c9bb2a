"""Fresh processes that can import the package, the benchmarks and the test helpers."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def run(*arguments: str, timeout: float = 300, **environment: str) -> str:
    """What Python prints, given these arguments.

    Raises:
        AssertionError: it ended with an error; the end of what it wrote about it.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], env={**os.environ, **ENVIRONMENT, **environment}, cwd=ROOT,
        capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What ``code`` prints."""
    return run("-c", code, *arguments, **environment)


def run_on_two(*arguments: str, timeout: float = 500, **environment: str) -> str:
    """What two processes of one job print."""
    return run_on_several(*arguments, timeout=timeout, **environment)


def run_on_several(*arguments: str, processes: int = 2, timeout: float = 500, **environment: str) -> str:
    """What the processes of one job print."""
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    return run(*start, *arguments, timeout=timeout, **environment)
