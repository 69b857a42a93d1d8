"""The laboratory: data, models, training, comparison with gradient methods, plots, command line.

It needs more than the core does, namely the packages of the extra `lab`.
"""

from __future__ import annotations

import importlib.util

#: The modules that the extra `lab` installs; a test compares it with pyproject.toml.
REQUIREMENTS = (
    "certifi",
    "filelock",
    "matplotlib",
    "optax",
    "orbax",
    "pooch",
    "rich",
    "sklearn",
    "tomli_w",
    "tyro",
)

_missing = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"pjax.lab needs packages that are not installed ({', '.join(_missing)}). "
        'Install them in a clone of pjax: pip install ".[lab]"'
    )

from pjax.lab.logger import Logger as Logger  # noqa: E402 (after the message above)
