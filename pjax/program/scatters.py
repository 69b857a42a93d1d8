"""`jax.lax.scatter_add` and what a scatter writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import lax
from jaxtyping import Array

from pjax.backend import compat


def is_overwriting(params: Mapping[str, Any]) -> bool:
    """Whether a `scatter` writes its updates: not `x.at[i].apply(f)`."""
    if params["update_jaxpr"] is None:
        return True
    jaxpr, _ = compat.open_jaxpr(params["update_jaxpr"])
    return list(jaxpr.outvars) == list(jaxpr.invars[1:])


def bind_scatter(scatter: Any, x: Array, indices: Array, updates: Array, params: Any) -> Array:
    return scatter(
        x, indices, updates, params["dimension_numbers"],
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"], mode=params["mode"],
    )  # fmt: skip


def scatter_add(x: Array, indices: Array, updates: Array, params: Mapping[str, Any]) -> Array:
    """`x` with each entry of the updates added to the entry that its index names."""
    return bind_scatter(lax.scatter_add, x, indices, updates, params)
