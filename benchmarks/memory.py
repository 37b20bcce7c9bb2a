"""Resident memory of this process, and its peak from a moment on (Linux)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Spent(NamedTuple):
    """What a call took: seconds by the clock and of the processor (all threads), peak of the resident set in bytes."""

    result: Any
    seconds: float
    processor: float
    peak: int


def resident() -> int:
    """Bytes, once what was freed has been given back."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def spent(call: Callable[[], Any]) -> Spent:
    resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return Spent(result, time.perf_counter() - clock, time.process_time() - processor, _status("VmHWM"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
