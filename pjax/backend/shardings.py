"""Arrays on several devices: which lie alike, explicit axes of a mesh, and axes of `shard_map`.

- `alike`: what comes out of a step lies on the devices as what went in.
- `automatic`: where axes of a mesh are explicit, as those of `jax.make_mesh` are, every operation
  would need its sharding; within it the compiler finds them.
- `summed_over`: inside of `jax.shard_map` each device sees its own rows. Within it sums over rows
  are those of all devices: `everywhere`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pjax.backend import compat, device

_Tree = TypeVar("_Tree")
_SUMMED: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("summed", default=())


def alike(found: _Tree, like: Any) -> _Tree:
    """A pytree of arrays that lie on the devices as those of another of the same shapes do: what
    comes out of a step goes into the next one, and the compiler would choose anew.
    """
    if not device.several() or compat.manual_axes():
        return found

    def one(array: Any, other: Any) -> Any:
        return compat.lying_as(array, other) if jnp.ndim(array) else array

    return jax.tree.map(one, found, like)


def zeros_like(array: Any) -> Any:
    """Zeros that lie on the devices as an array does."""
    if not device.several() or compat.manual_axes():
        return jnp.zeros(array.shape, array.dtype)
    # Made of the array: all zeros of one shape would be one array to the compiler.
    return alike(0 * array, array)


# --- Explicit axes -------------------------------------------------------------------------------


def automatic(function: Callable[..., Any], *args: Any, like: Any) -> Any:
    """`function(*args)`, within which no axis of a mesh is explicit.

    **Arguments:**

    - `like`: the `PartitionSpec` of the results, a pytree prefix of them; see `spec`.
    """
    if not device.several():
        return function(*args)
    mesh = compat.explicit_mesh(jax.tree.leaves(args))
    if mesh is None:
        return function(*args)
    with compat.use_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=like)(*args)


def spec(array: Any) -> PartitionSpec:
    """How an array lies along explicit axes."""
    found = getattr(jax.typeof(array), "sharding", None)
    return PartitionSpec() if found is None else found.spec


# --- Inside of `shard_map` -----------------------------------------------------------------------

#: What is said of values that are typed by the axes along which they vary.
TYPED = (
    "Inside of `jax.shard_map` pjax does not work with types of varying values (`check_vma=True`, "
    "the default): give `jax.shard_map(…, check_vma=False)`, and the axis of the rows to pjax, "
    "`axis_name=…`; or leave the devices to `jax.jit`, with a sharded batch."
)


def axes_of(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes that an `axis_name=` of one, several or no axes is."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


@contextlib.contextmanager
def summed_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Within it the devices along these axes of `shard_map` are one to `everywhere`."""
    token = _SUMMED.set(axes)
    try:
        yield
    finally:
        _SUMMED.reset(token)


def summed_axes() -> tuple[str, ...]:
    """The axes that `summed_over` names; none outside of it."""
    return _SUMMED.get()


def everywhere(array: Any) -> Any:
    """The sum over all devices that `summed_over` says are one."""
    axes = _SUMMED.get()
    return lax.psum(array, axes) if axes else array


def mean_everywhere(array: Any) -> Any:
    """The mean over them."""
    axes = _SUMMED.get()
    return lax.pmean(array, axes) if axes else array


def largest_everywhere(array: Any) -> Any:
    """The largest on any of them."""
    axes = _SUMMED.get()
    return lax.pmax(array, axes) if axes else array


def repeat(going: Callable[[Any], Any], step: Callable[[Any], Any], state: Any, most: int) -> Any:
    """Steps while `going`, at most so many; all of them where arrays may lie on several devices,
    which would exchange in every step whether to go on.

    For steps that change nothing where they are not needed any more.
    """
    if device.several():
        return lax.fori_loop(0, most, lambda _, state: step(state), state)
    _, state = lax.while_loop(
        lambda counted: (counted[0] < most) & going(counted[1]),
        lambda counted: (counted[0] + 1, step(counted[1])),
        (0, state),
    )
    return state


__all__ = [
    "alike", "automatic", "axes_of", "everywhere", "largest_everywhere", "mean_everywhere",
    "repeat", "spec", "summed_axes", "summed_over", "zeros_like",
]  # fmt: skip
