"""Models as files of other runtimes, checked against the model before they are left in place."""

from .run import export

__all__ = ["export"]
