"""Sets for a tree of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pjax.sets.base import Set


def for_leaves(sets: PyTree[Set | None], params: PyTree[Array]) -> list[Set | None]:
    """For each leaf of `params` its set, from a prefix of the tree whose leaves are sets or None.

    **Raises:** `ValueError` for sets that are no prefix of the tree, or are not meant for a leaf of
    that shape; `TypeError` for what is no set, and for a leaf that is no floating-point array.
    """
    try:
        whole = jax.tree.map(
            lambda one, part: jax.tree.map(lambda _: one, part), sets, params, is_leaf=_is_leaf
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`sets` is no prefix of `params` (None stands for no set): {error}"
        ) from error
    found = jax.tree.leaves(whole, is_leaf=_is_leaf)
    for one, (path, leaf) in zip(found, jax.tree_util.tree_leaves_with_path(params), strict=True):
        name = f"`params{jax.tree_util.keystr(path)}`"
        if one is None:
            continue
        if not isinstance(one, Set):
            raise TypeError(f"{name}: `sets` must have a set of `pjax.sets` or None, got {one!r}.")
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{name} is no floating-point array, and cannot be in {one}.")
        try:
            one.check(jnp.shape(leaf))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def project(sets: PyTree[Set | None], params: PyTree[Array]) -> PyTree[Array]:
    """`params`, each leaf at the nearest point of its set.

    **Arguments:**

    - `sets`: a prefix of `params` whose leaves are sets, or None for what may lie anywhere.

    >>> import pjax
    >>> project(pjax.sets.Nonnegative(), {"w": jnp.array([-1.0, 2.0])})
    {'w': Array([0., 2.], dtype=float32)}
    """
    leaves, structure = jax.tree.flatten(params)
    pairs = zip(for_leaves(sets, params), leaves, strict=True)
    return jax.tree.unflatten(structure, [into(one, leaf) for one, leaf in pairs])


def into(one: Set | None, leaf: Any) -> Any:
    """The nearest point of a set, in the type of `leaf`; `leaf` where there is none."""
    return leaf if one is None else one.project(leaf).astype(jnp.result_type(leaf))


class Transformation(NamedTuple):
    """`init(params)` and `update(updates, state, params)`, as a `optax.GradientTransformation`."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def keep(sets: PyTree[Set | None]) -> Transformation:
    """A transformation for Optax, the last one of a chain: `P(params + updates) − params`.

    What `optax.apply_updates` makes of it lies in the sets, up to the rounding of one addition.

    ```python
    optimizer = optax.chain(optax.adam(1e-3), pjax.sets.keep({"w": pjax.sets.Nonnegative()}))
    ```

    **Arguments:**

    - `sets`: see [`project`][pjax.sets.project].

    **Raises:** when called, `ValueError` without `params`, and what `project` raises.
    """

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "`pjax.sets.keep` needs the parameters: `optimizer.update(updates, state, params)`."
            )
        moved = jax.tree.map(lambda p, u: p if u is None else p + u, params, updates)
        found = jax.tree.map(
            lambda u, m, p: u if u is None else (m - p).astype(jnp.result_type(u)),
            updates, project(sets, moved), params, is_leaf=lambda u: u is None,
        )  # fmt: skip
        return found, state

    return Transformation(lambda params: (for_leaves(sets, params), ())[1], update)


def _is_leaf(x: Any) -> bool:
    return x is None or isinstance(x, Set)
