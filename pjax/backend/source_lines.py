"""The user's line that made an operation, for messages: frames of libraries are passed over."""

from __future__ import annotations

import os
import sysconfig
from typing import Any

from pjax.backend.compat import call_body


def _directory(path: str) -> str:
    return os.path.join(os.path.abspath(path), "")


#: Files below these are not the user's own: JAX, Flax, the standard library, and this library.
_LIBRARIES = tuple(
    _directory(path)
    for path in (
        os.path.dirname(os.path.dirname(__file__)),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def is_library_file(file: str) -> bool:
    """Whether a source file is part of an installed package, not the user's own."""
    if file.startswith("<frozen"):
        return True
    path = os.path.abspath(file)
    return path.startswith(_LIBRARIES) or any(part in path for part in _INSTALLED)


def source_line(equation: Any, caller: str = "") -> str:
    """`file:line (function)` of the user's code that made `equation`; empty if unknown.

    Frames of installed packages are passed over: a user looks for the line of the model that calls
    a layer of Flax. Without any frame of the user, `caller` is returned, the line of the call that
    `equation` is in.
    """
    try:
        from jax._src import source_info_util

        frames = list(source_info_util.user_frames(equation.source_info.traceback))
    except Exception:  # a private module: any failure only costs the source line
        return caller
    own = [frame for frame in frames if not is_library_file(frame.file_name)]
    if not own and caller:
        return caller
    for frame in own or frames:
        return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return caller


#: Libraries whose own derivatives are numerical care: `relu`, `softmax`, `logsumexp`.
_CAREFUL = tuple(f"{os.sep}{name}{os.sep}" for name in ("jax", "optax", "flax", "equinox"))


def is_jax_function(equation: Any) -> bool:
    """Whether a called function is one of JAX itself, Optax, Flax or Equinox."""
    body = call_body(equation.primitive, equation.params)
    try:
        file = os.path.abspath(body[0].debug_info.func_filename)  # pyright: ignore
    except Exception:  # not promised by `jax.extend`
        return False
    return is_library_file(file) and any(part in file for part in _CAREFUL)


def is_library_function(jaxpr: Any) -> bool:
    """Whether the function that a called `jaxpr` was traced from is part of an installed package.

    Such a body may have been traced for another caller, so its source lines are not to be trusted.
    """
    try:
        return is_library_file(jaxpr.debug_info.func_filename)
    except Exception:  # not promised by `jax.extend`: any failure only costs the source line
        return False
