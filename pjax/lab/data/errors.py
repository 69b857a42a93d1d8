"""The one error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """A data set cannot be used; the message names the file or the folder and says what to do.

    It is one line, except where a download failed: then each mirror has a line of its own.
    """


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none; not longer than a line."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
