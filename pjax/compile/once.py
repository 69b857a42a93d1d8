"""A method that is traced once for all nodes that are alike.

Equal layers, and the steps of a loop, have equal rules and arrays of equal shapes. What Python
makes of a rule is the same equations for each: they are written down once and copied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.core import Tracer

from pjax.backend import device, shardings


def traced_once(owner: Any, method: str, *args: Any) -> Any:
    """`getattr(owner, method)(*args)`, inside of a trace.

    **Arguments:**

    - `owner`: hashable; equal owners do the same.
    - `args`: pytrees of arrays, and of numbers, which are known to the method as they are. One
        array that stands at two places is one to the method.
    """
    leaves, tree = jax.tree_util.tree_flatten(args)
    numbers: dict[int, int] = {}
    arrays: list[Any] = []
    known: list[tuple[type, Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tracer):
            if id(leaf) not in numbers:
                numbers[id(leaf)] = len(arrays)
                arrays.append(leaf)
            known.append((Tracer, numbers[id(leaf)]))
        elif isinstance(leaf, (bool, int, float)):
            known.append((type(leaf), leaf))
        else:  # an array that is known, which the method may look into
            return getattr(owner, method)(*args)
    # What a trace may ask of the world around it.
    world = device.several(), device.launches_kernels(), shardings.summed_axes()
    return _call(owner, method, tree, tuple(known), world, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), inline=True)
def _call(owner: Any, method: str, tree: Any, known: Any, world: Any, *arrays: Any) -> Any:
    leaves = [arrays[value] if kind is Tracer else value for kind, value in known]
    return getattr(owner, method)(*jax.tree_util.tree_unflatten(tree, leaves))
