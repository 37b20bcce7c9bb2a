"""The wheel and the source distribution: what is in them, and that they work without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from processes import ROOT

PACKAGES = ("hf_vitprune", "hf_vitprune_cli")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both; the wheel is made from the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True, capture_output=True)
    return out


def sources() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_they_hold_the_package_and_nothing_else(built: Path) -> None:
    wheel, source = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    assert len(list(built.iterdir())) == 2
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == sources() and "hf_vitprune/py.typed" in names
    with tarfile.open(source) as files:
        inside = {member.name.partition("/")[2] for member in files.getmembers() if member.isfile()}
    own = {name for name in inside if ".egg-info/" not in name}
    assert own == sources() | {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}


def test_the_wheel_works_without_the_checkout(built: Path, tmp_path: Path) -> None:
    wheel = next(built.glob("*.whl"))
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True)
    script = (
        "import hf_vitprune, sys\n"
        "from hf_vitprune_cli.main import main\n"
        "print(hf_vitprune.__file__)\n"
        "sys.argv = ['hf-vitprune', 'demo', '--help']\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(site)) and "real digits" in done.stdout
