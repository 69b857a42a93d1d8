"""Old names of modules, for one release: they warn, and hand out what has moved."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType

#: Documented module paths below `pjax`, and where their names are now.
_MOVED = {
    "displacements": "training.displacements",
    "explanation": "inspection.explanation",
    "loss_terms": "patterns.losses.terms",
    "primitives": "program.primitives",
    "profiles": "inspection.profiles",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is imported by an old name."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        found = package == "pjax" and name in _MOVED
        return importlib.machinery.ModuleSpec(fullname, self) if found else None

    def exec_module(self, module: ModuleType) -> None:
        new = f"pjax.{_MOVED[module.__name__.partition('.')[2]]}"
        warnings.warn(
            f"`{module.__name__}` is `{new}`: the old name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        names = vars(importlib.import_module(new))
        vars(module).update({k: v for k, v in names.items() if not k.startswith("__")})


def install() -> None:
    """Lets old names be imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def attribute(name: str) -> ModuleType:
    """An old name as an attribute of the library.

    **Raises:** `AttributeError` for any other name.
    """
    if name not in _MOVED:
        raise AttributeError(f"module 'pjax' has no attribute {name!r}")
    return importlib.import_module(f"pjax.{name}")
