"""Arrays on several devices: which lie alike, explicit axes of a mesh, and axes of `shard_map`.

- `alike`: what comes out of a step lies on the devices as what went in.
- `automatic`: where axes of a mesh are explicit, as those of `jax.make_mesh` are, every operation
  would need its sharding; within it the compiler finds them.
- `local`: inside of `jax.shard_map` a value is typed by the axes along which devices have values of
  their own, and mixing makes it *varying*: but not the start of a loop, nor a point of which a
  derivative is taken, whose transpose would be a sum over devices. Within it all that is computed
  from the data of one device is varying from the start: `varying`, `struct`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from pjax.backend import compat, device

_Tree = TypeVar("_Tree")
_SUMMED: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("summed", default=())
_AXES: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


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


@contextlib.contextmanager
def local(arrays: Any, summed: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Within it all is computed along the axes that any of the arrays varies along: these axes.

    **Arguments:**

    - `summed`: axes whose devices are one to `everywhere`.
    """
    axes = tuple(sorted({axis for leaf in jax.tree.leaves(arrays) for axis in compat.varies(leaf)}))
    if axes:
        raise ValueError(TYPED)
    tokens = _AXES.set(axes), _SUMMED.set(summed)
    try:
        yield axes
    finally:
        _AXES.reset(tokens[0])
        _SUMMED.reset(tokens[1])


def everywhere(array: Any) -> Any:
    """The sum over all devices that `local` says are one."""
    return summed(array, _SUMMED.get())


def mean_everywhere(array: Any) -> Any:
    """The mean over them."""
    axes = _SUMMED.get()
    return lax.pmean(array, axes) if axes else array


def largest_everywhere(array: Any) -> Any:
    """The largest on any of them."""
    axes = _SUMMED.get()
    return lax.pmax(varying(jnp.asarray(array)), axes) if axes else array


def agreed(tree: _Tree) -> _Tree:
    """Floating-point arrays that are the same on all of them, typed so."""
    axes = _SUMMED.get()

    def one(array: Any) -> Any:
        names = tuple(axis for axis in axes if axis in compat.varies(array))
        return lax.pmean(array, names) if names else array

    return jax.tree.map(one, tree) if axes else tree


def varying(tree: _Tree) -> _Tree:
    """The arrays, varying along the axes of `local`."""
    axes = _AXES.get()
    return jax.tree.map(lambda leaf: compat.vary(leaf, axes), tree) if axes else tree


def matched(arrays: Sequence[Any]) -> Sequence[Any]:
    """Operands of one primitive, which must vary along the same axes; a plain function of JAX does
    that by itself.
    """
    if not _AXES.get():
        return arrays
    axes = sorted(frozenset[str]().union(*map(compat.varies, arrays)))
    return [compat.vary(array, axes) for array in arrays]


def struct(shape: Any, dtype: Any) -> Any:
    """What stands for an array of this shape, that varies along the axes of `local`."""
    if _AXES.get():
        return varying(jnp.zeros(shape, dtype))
    return jax.ShapeDtypeStruct(shape, dtype)


def fori_loop(start: Any, stop: Any, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """`jax.lax.fori_loop`, whose state is varying."""
    return lax.fori_loop(start, stop, lambda i, now: varying(step(i, now)), varying(state))


def while_loop(going: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
    """`jax.lax.while_loop`, whose state is varying."""
    return lax.while_loop(going, lambda now: varying(step(now)), varying(state))


def repeat(going: Callable[[Any], Any], step: Callable[[Any], Any], state: Any, most: int) -> Any:
    """Steps while `going`, at most so many; all of them where arrays may lie on several devices,
    which would exchange in every step whether to go on.

    For steps that change nothing where they are not needed any more.
    """
    if device.several():
        return fori_loop(0, most, lambda _, state: step(state), state)
    _, state = while_loop(
        lambda counted: (counted[0] < most) & going(counted[1]),
        lambda counted: (counted[0] + 1, step(counted[1])),
        (0, state),
    )
    return state


def summed(array: Any, axes: tuple[str, ...]) -> Any:
    """The sum over the devices along these axes."""
    return lax.psum(array, axes) if axes else array


__all__ = [
    "agreed", "alike", "automatic", "everywhere", "fori_loop", "largest_everywhere", "local",
    "matched", "mean_everywhere", "repeat", "spec", "struct", "summed", "varying",
    "while_loop", "zeros_like",
]  # fmt: skip
