"""Imported by star."""

__all__ = ["starred"]


def starred():
    """Comes through `import *`."""


def not_exported():
    """Not in `__all__`."""
