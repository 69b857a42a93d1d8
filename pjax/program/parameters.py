"""Pytrees of parameters: which of their leaves can move, and the same tree with other leaves.

A tree is read as `jax.value_and_grad` reads it: every leaf is an array or a number. Inside of an
Equinox module it is read as `equinox.filter_value_and_grad` does: floating-point arrays are
parameters, and everything else (functions, numbers, integer arrays) stays as it is, and has None in
the place of a displacement.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Leaves(NamedTuple):
    """A tree of parameters, taken apart.

    **Attributes:**

    - `paths`, `arrays`: of the leaves that a program reads: parameters, and what JAX would take.
    - `others`: all leaves in their order, with None in the place of those.
    - `places`: where those stand.
    - `structure`: of the tree.
    """

    paths: tuple[str, ...]
    arrays: tuple[Any, ...]
    others: tuple[Any, ...]
    places: tuple[int, ...]
    structure: Any

    def tree(self, arrays: Sequence[Any]) -> Any:
        """The tree with other arrays; its other leaves are the same."""
        leaves = list(self.others)
        for place, array in zip(self.places, arrays, strict=True):
            leaves[place] = array
        return jax.tree_util.tree_unflatten(self.structure, leaves)

    def moves(self, arrays: Sequence[Any]) -> Any:
        """The tree with a displacement for each array, and None for each other leaf."""
        nothing = (None,) * len(self.others)
        return self._replace(others=nothing).tree(arrays)


def leaves_of(params: Any, mask: Any = None) -> Leaves:
    """Takes a tree apart.

    **Arguments:**

    - `mask`: True where leaves are parameters, False where they stay as they are: a prefix of the
        tree, or a function of it that returns one.

    **Raises:** `ValueError` for a mask that is no prefix of the tree, `TypeError` for one of
    anything but True and False.
    """
    paths, arrays, others, places = [], [], [], []
    move = _chosen(params, mask)
    top, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_equinox)
    for path, part in top:
        inside = _is_equinox(part)
        rows = jax.tree_util.tree_flatten_with_path(part)[0] if inside else [((), part)]
        for rest, leaf in rows:
            if not next(move) or (inside and not _is_inexact_array(leaf)):
                others.append(leaf)
                continue
            paths.append(jax.tree_util.keystr((*path, *rest)))
            arrays.append(leaf)
            places.append(len(others))
            others.append(None)
    structure = jax.tree_util.tree_structure(params)
    return Leaves(tuple(paths), tuple(arrays), tuple(others), tuple(places), structure)


def _chosen(params: Any, mask: Any) -> Iterator[bool]:
    """Whether each leaf is a parameter."""
    if mask is None:
        return itertools.repeat(True)
    given = mask(params) if callable(mask) else mask
    try:
        full = jax.tree.map(lambda one, part: jax.tree.map(lambda _: one, part), given, params)
    except ValueError as error:
        raise ValueError(f"`mask` is no prefix of `params`: {error}") from error
    found = jax.tree.leaves(full)
    for one in found:
        if not isinstance(one, (bool, np.bool_)):
            raise TypeError(f"`mask` must have True or False for each leaf, got {one!r}.")
    return iter(found)


def _is_equinox(x: Any) -> bool:
    """Whether an object is an Equinox module; Equinox need not be installed."""
    return any(
        kind.__name__ == "Module" and kind.__module__.split(".")[0] == "equinox"
        for kind in type(x).__mro__
    )


def _is_inexact_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray)) and jnp.issubdtype(leaf.dtype, jnp.inexact)
