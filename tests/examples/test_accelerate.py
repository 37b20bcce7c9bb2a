"""The configs of ``accelerate launch``: accelerate reads them, and each starts what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
KINDS = {
    "ddp": (DistributedType.MULTI_GPU, {}),
    "fsdp2": (DistributedType.FSDP, {"fsdp_version": 2}),
    **{f"zero{stage}": (DistributedType.DEEPSPEED, {"zero_stage": stage}) for stage in (1, 2, 3)},
}


def test_every_file_is_known() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_read(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kind, settings = KINDS[name]
    assert config.distributed_type == kind and config.num_processes == 8
    given = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    assert settings.items() <= given.items()
    assert f"accelerate launch --config_file examples/accelerate/{name}.yaml" in path.read_text().splitlines()[0]
