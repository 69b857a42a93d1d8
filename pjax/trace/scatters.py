"""Scatters: sums, extrema and products over segments, and `x.at[i].set`, `.add`, `.max`, ….

Where the indices are known, each entry of the updates belongs to one entry of the result:

- a sum is one linear operation, with a nearest point in closed form (`pjax.rules.ScatterAdd`);
- what is written over others is a choice by known indices, and wiring. Of several updates of one
  entry the one that is written rests, like any other choice;
- a maximum is the mean of all that are as large. Which ones these are rests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.backend import compat
from pjax.backend.compat import P
from pjax.program import Atom, TraceError, bind_scatter, is_overwriting, scatter_add
from pjax.trace.writer import Writer

_SUB, _MUL = (compat.find_primitives(f"scatter_{name}") for name in ("sub", "mul"))
_EXTREMA: dict[Any, Callable[..., Array]] = {
    **dict.fromkeys(compat.find_primitives("scatter_max"), lax.scatter_max),
    **dict.fromkeys(compat.find_primitives("scatter_min"), lax.scatter_min),
}


def expand(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The outputs of a scatter by operations that have rules; None if it stays as it is."""
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    if eqn.primitive is P.scatter_p and not is_overwriting(eqn.params):
        raise TraceError(
            f"`x.at[i].apply(f)` ({source}) has no derivative: write `x.at[i].set(f(x[i]))`."
        )
    function = _find(writer, eqn, inputs)
    return None if function is None else writer.add_function(function, inputs, source)


def _find(writer: Writer, eqn: Any, inputs: Sequence[Atom]) -> Callable[..., Any] | None:
    primitive, params = eqn.primitive, eqn.params
    if primitive in _EXTREMA:
        return _extremum(_EXTREMA[primitive], params)
    if primitive in _SUB:
        return lambda x, indices, updates: [scatter_add(x, indices, -updates, params)]
    if primitive in _MUL:
        # Of several free factors of one entry there is no sum of constraints.
        if params["unique_indices"] or not writer.is_variable(inputs[2]):
            return _product(params)
        return None
    if primitive is P.scatter_p and is_overwriting(params) and not params["unique_indices"]:
        return _written(params)
    return None


def _read(x: Array, indices: Array, updates: Array, params: Any) -> Array:
    """For each entry of the updates the entry of `x` that it belongs to."""
    zeros = jnp.zeros(x.shape, x.dtype)
    shape = jax.ShapeDtypeStruct(updates.shape, x.dtype)
    return jax.linear_transpose(lambda u: scatter_add(zeros, indices, u, params), shape)(x)[0]


def _written(params: Any) -> Callable[..., Any]:
    def written(x: Array, indices: Array, updates: Array) -> list[Array]:
        if not updates.size:
            return [x]
        places = jnp.arange(1, updates.size + 1, dtype=jnp.int32).reshape(updates.shape)
        origin = jnp.zeros(x.shape, jnp.int32)
        origin = bind_scatter(lax.scatter, origin, indices, places, params)
        taken = jnp.take(updates.reshape(-1), jnp.maximum(origin - 1, 0), mode="clip")
        return [jnp.where(origin > 0, taken, x)]

    return written


def _extremum(scatter: Any, params: Any) -> Callable[..., Any]:
    def extremum(x: Array, indices: Array, updates: Array) -> list[Array]:
        known, changes = lax.stop_gradient(x), lax.stop_gradient(updates)
        best = bind_scatter(scatter, known, indices, changes, params)
        stays, wins = known == best, changes == _read(best, indices, updates, params)
        ones = stays.astype(x.dtype)
        count = scatter_add(ones, indices, wins.astype(x.dtype), params)
        share = 1 / jnp.maximum(count, 1)
        own = jnp.where(stays, x, 0) * share
        others = jnp.where(wins, updates, 0) * _read(share, indices, updates, params)
        return [scatter_add(own, indices, others, params)]

    return extremum


def _product(params: Any) -> Callable[..., Any]:
    def product(x: Array, indices: Array, factors: Array) -> list[Array]:
        ones = jnp.ones_like(x)
        scatter = lax.scatter if params["unique_indices"] else lax.scatter_mul
        return [x * bind_scatter(scatter, ones, indices, factors, params)]

    return product
