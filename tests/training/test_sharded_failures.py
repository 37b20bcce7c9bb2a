"""What goes wrong between processes is said, or does not matter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from processes import SUPPORT, run_on_several
from pruning_runs import VIT
from tiny import make

pytestmark = pytest.mark.slow


def start(folder: Path, *cases: str, processes: int = 2) -> None:
    run_on_several(str(SUPPORT / "failing_shards.py"), str(folder), *cases, processes=processes, timeout=200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(VIT).double().save_pretrained(tmp_path / "dense")
    return tmp_path


def test_processes_that_disagree(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"processes disagree about what is pruned.*target is 0\.6 and 0\.9"):
        start(folder, "disagree:native")


def test_a_process_that_dies(folder: Path) -> None:
    """The others do not wait for it."""
    with pytest.raises(AssertionError, match="exitcode  : 3"):
        start(folder, "dies:native")


def test_another_number_of_processes_resumes(folder: Path) -> None:
    start(folder, "saved:plugin")
    start(folder, "resume:plugin", processes=1)
    through, resumed = (load_file(folder / f"{what}.plugin.safetensors") for what in ("saved", "resume"))
    for name, tensor in through.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_without_one_of_its_shards(folder: Path) -> None:
    start(folder, "saved:plugin")
    shard = folder / "plugin/checkpoint-2/pytorch_model_fsdp_0/__1_0.distcp"
    shard.unlink()
    with pytest.raises(AssertionError, match=f"No such file.*{shard.name}"):
        start(folder, "resume:plugin")


def test_another_number_of_processes_under_zero(folder: Path) -> None:
    pytest.importorskip("deepspeed")
    start(folder, "saved:zero2")
    with pytest.raises(AssertionError, match="world size"):
        start(folder, "resume:zero2", processes=1)
