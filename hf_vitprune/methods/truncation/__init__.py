"""Truncation: the first layers stay; a baseline, and the plain way where the number of layers is known."""

from .config import TruncationConfig
from .method import Truncation

__all__ = ["Truncation", "TruncationConfig"]
