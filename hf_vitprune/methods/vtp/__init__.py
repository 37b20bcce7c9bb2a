"""VTP: visual transformer pruning with learned importance scores (arXiv 2104.08500)."""

from .config import VTPConfig
from .method import VTP

__all__ = ["VTP", "VTPConfig"]
