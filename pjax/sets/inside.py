"""Values inside of a network that are to lie in a set."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from pjax.program import primitives
from pjax.sets.base import Set


def constrain(x: ArrayLike, set: Set) -> Array:
    """`x`, which is to lie in a set: a hard constraint of the problem, the identity otherwise.

    In a solve `x ∈ set` is a constraint of its own beside the operations that read `x`: its
    projection is the nearest point of the set. The forward pass does not change; how far `x` is
    from the set there is in `info.violations` of [`pjax.optim.Projection`][], by the line of the
    call, and in `Problem.violations`.

    A solver of many steps ends near the set where it can. One sweep, as for
    [`pjax.optim.Projection`][] and displacements, asks `x` to move there: the force is
    `P(x) − x`, as if the loss had the term `|x − P(x)|²/2λ` with the prox step λ, for as long as
    `x` is not in the set. For parameters use `sets` of the optimisers, which are satisfied exactly.

    Under `vmap` the set is one for each mapped entry. Where `x` depends on no parameter there is
    nothing to constrain.

    **Arguments:**

    - `x`: a floating-point array.
    - `set`: from `pjax.sets`, or your own; its numbers are data, and may be traced.

    **Raises:** `TypeError` for an array of another type or what is no set, `ValueError` for a set
    that has no point of this shape.

    >>> import pjax
    >>> pjax.constrain(jnp.array([0.5, 0.7]), pjax.sets.Simplex())
    Array([0.5, 0.7], dtype=float32)
    """
    x = primitives.floating("constrain", x)
    if not isinstance(set, Set):
        raise TypeError(f"`constrain` needs a set of `pjax.sets`, got {set!r}.")
    set.check(x.shape)
    numbers, structure = jax.tree.flatten(set)
    return primitives.constrain_p.bind(x, *map(jnp.asarray, numbers), structure=structure, axes=())
