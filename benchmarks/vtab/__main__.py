"""``python -m benchmarks.vtab``."""

from .cli import app

app(prog_name="python -m benchmarks.vtab")
