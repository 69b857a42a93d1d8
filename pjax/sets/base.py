"""What a set is, and what sets of entries, of vectors and of matrices have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from pjax.projections import vectors

#: One axis, several, or None for all.
Axis = int | tuple[int, ...] | None
_T = TypeVar("_T")
#: Marks a field that is no leaf of the pytree.
STATIC = {"static": True}


class Set(ABC):
    """A set of arrays that has nearest points.

    For a set of your own write a frozen dataclass with `project`, and register it with
    `jax.tree_util.register_dataclass`.
    """

    @abstractmethod
    def project(self, x: ArrayLike) -> Array:
        """`argmin_y |y − x|²` over the set: of several nearest points one, always the same."""

    def project_weighted(self, x: ArrayLike, weights: Array) -> Array:
        """`argmin_y Σ w (y − x)²` over the set, where there is a closed form; else `project(x)`,
        which lies in the set and is nearest for equal weights.
        """
        return self.project(x)

    def distance(self, x: ArrayLike) -> Array:
        """`min_y |y − x|₂`, one number; 0 in the set."""
        return vectors.length(jnp.ravel(jnp.asarray(x) - self.project(x)))[0]

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027 - may stay as it is
        """Raises `ValueError` if the set has no point of this shape."""


def registered(cls: type[_T]) -> type[_T]:
    names = {True: [], False: []}
    for name, one in cls.__dataclass_fields__.items():  # pyright: ignore
        names[one.metadata.get("static", False)].append(name)
    return jax.tree_util.register_dataclass(cls, names[False], names[True])


class Entrywise(Set):
    """Each entry has a set of its own, so that weights do not matter."""

    def project(self, x: ArrayLike) -> Array:
        x = floating(self, x)
        self.check(x.shape)
        return self._nearest(x)

    @abstractmethod
    def _nearest(self, x: Array) -> Array: ...


class Along(Set):
    """A set of the vectors along `axis`."""

    axis: Axis

    def project(self, x: ArrayLike) -> Array:
        return self.project_weighted(x, None)

    def project_weighted(self, x: ArrayLike, weights: Array | None) -> Array:
        x = floating(self, x)
        self.check(x.shape)
        rows, back = as_rows(x, self.axis)
        if weights is None or jnp.ndim(weights) == 0:
            return back(self._nearest(rows, None))
        of_rows, _ = as_rows(jnp.broadcast_to(weights, x.shape).astype(x.dtype), self.axis)
        return back(self._nearest(rows, of_rows))

    @abstractmethod
    def _nearest(self, rows: Array, weights: Array | None) -> Array: ...

    def check(self, shape: tuple[int, ...]) -> None:
        self._check_length(math.prod(shape[axis] for axis in axes_of(self, shape)), shape)

    def _check_length(self, length: int, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` if vectors of this length cannot be in the set."""


class OfMatrices(Set):
    """A set of the matrices in the last two axes."""

    def project(self, x: ArrayLike) -> Array:
        x = floating(self, x)
        self.check(x.shape)
        return self._nearest(x)

    @abstractmethod
    def _nearest(self, x: Array) -> Array: ...

    def check(self, shape: tuple[int, ...]) -> None:
        require_matrix(self, shape)


def is_known(*numbers: Any) -> bool:
    """Whether these are numbers, and not what stands for them in a trace or in a tree."""
    return all(
        isinstance(n, (int, float, list, tuple, np.ndarray, np.generic))
        or (isinstance(n, jax.Array) and not isinstance(n, Tracer))
        for n in numbers
    )


def floating(one: Set, x: ArrayLike) -> Array:
    """`x` in at least single precision."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{type(one).__name__}` holds floating-point arrays, got {x.dtype}.")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def axes_of(one: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    if one.axis is None:
        return tuple(range(len(shape)))
    given = (one.axis,) if isinstance(one.axis, int) else one.axis
    found = tuple(axis % len(shape) if -len(shape) <= axis < len(shape) else None for axis in given)
    if None in found or len(set(found)) != len(found):
        raise ValueError(
            f"`{type(one).__name__}`: an array of shape {shape} has no axes {one.axis}."
        )
    return found  # pyright: ignore[reportReturnType]


def as_rows(x: Array, axis: Axis) -> tuple[Array, Callable[[Array], Array]]:
    """The vectors along `axis` as the last axis, and the way back."""
    if axis is None:
        return x.reshape(-1), lambda rows: rows.reshape(x.shape)
    axes = (axis,) if isinstance(axis, int) else axis
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(x, axes, last)
    rows = moved.reshape(*moved.shape[: -len(axes)], math.prod(moved.shape[-len(axes) :]))
    return rows, lambda rows: jnp.moveaxis(rows.reshape(moved.shape), last, axes)


def require_matrix(one: Set, shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ValueError(f"`{type(one).__name__}` holds matrices, got an array of shape {shape}.")
    require_entries(one, math.prod(shape[-2:]), shape)


def require_entries(one: Set, length: int, shape: tuple[int, ...]) -> None:
    if length == 0:
        raise ValueError(f"`{type(one).__name__}` has no point without entries: shape {shape}.")


def require_count(one: Set, name: str, count: Any) -> None:
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"`{type(one).__name__}`: `{name}` must be a whole number, at least 1, got {count!r}."
        )
