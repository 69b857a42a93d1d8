"""`pjax explain`: what pjax makes of a function in a file, before it is trained."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

import pjax
from pjax.lab.errors import UsageError
from pjax.options import Splitting


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print how a function would be trained: its nodes, how parameters move, what to look at."""

    target: tyro.conf.Positional[str]
    """FILE.py:FUNCTION; called without arguments, it returns (loss, params) and the loss's other
    arguments, as pjax.explain takes them."""
    splitting: Splitting = "layer"
    """A constraint for each array operation, or for each scalar product."""
    has_aux: bool = False
    """The loss returns (loss, aux)."""


def run(options: Explain) -> int:
    """Imports the file, calls the function and prints the explanation."""
    found = load(options.target)()
    if not (isinstance(found, tuple) and len(found) > 1 and callable(found[0])):
        raise UsageError(
            f"{options.target} must return a tuple (loss, params, *args), with a function first; "
            f"it returned {type(found).__name__}."
        )
    print(pjax.explain(*found, splitting=options.splitting, has_aux=options.has_aux))
    return 0


def load(target: str) -> Callable[[], Any]:
    """The function that `FILE.py:FUNCTION` names."""
    file, _, name = target.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise UsageError(f"{target}: give FILE.py:FUNCTION, such as train.py:problem.")
    if not path.is_file():
        raise UsageError(f"{file}: there is no such file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file}: this is no Python file.")
    module = importlib.util.module_from_spec(spec)
    # As `python FILE.py` does: what lies beside the file can be imported.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{file}: there is no function {name}.")
    return function
