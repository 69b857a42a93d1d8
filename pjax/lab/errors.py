"""What the command line reports without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """A wrong option; the message is one line."""


class RunError(ValueError):
    """A file or folder of a run cannot be used; the message names it and the problem."""


def shown(value: object, limit: int = 60) -> str:
    """A value in an error message: its `repr`, cut to a length that fits a line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
