"""``python -m benchmarks.compare``."""

from .cli import app

app()
