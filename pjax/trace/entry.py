"""From a JAX function and its parameters to a program; arguments are checked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.backend import compat, shardings
from pjax.program import Program, TraceError, leaves_of
from pjax.trace.flatten import Flattener


def require_function(fn: Any, name: str) -> None:
    """Raises `TypeError` if what should be the loss is none, as the argument `name` of a call."""
    if not callable(fn):
        raise TypeError(
            f"`{name}` must be the loss as a function, and got {_describe(fn)}: pass the function "
            "itself, `loss_fn`, not what it returns, `loss_fn(params)`, or its gradient."
        )


def trace(
    fn: Callable[[Any], Any],
    params: Any,
    has_aux: bool = False,
    scalar: bool = False,
    mask: Any = None,
    rests: bool = False,
) -> tuple[Program, list[Any], list[Any], Any]:
    """Traces `fn(params)` into a flat program.

    **Arguments:**

    - `fn`: a JAX function of the parameters; what it closes over is data.
    - `has_aux`: `fn` returns `(loss, aux)`, with any pytree of arrays as `aux`.
    - `scalar`: `fn` must return one number, as for `jax.grad`; without it an array will do, whose
      sum is the loss.
    - `params`: a pytree of arrays. Floating-point leaves can move; integer, boolean and key
      leaves are known values, and stay as they are. See `pjax.program.parameters`.
    - `mask`: which leaves are parameters at all, see `pjax.program.leaves_of`.
    - `rests`: nothing moves: the program is what the function computes, without the forms that
      projections need.

    **Returns:** `(program, leaves, consts, output_tree)`: the program, the leaves of `params` and
    the captured arrays (both possibly tracers of an outer `jit`), and the structure of the result
    (of `aux` if there is one).

    **Raises:** `TypeError` for a function that returns what a gradient would be, or no number where
    it must, and for a leaf that is not an array, is complex or narrower than a deviation needs, or
    is an integer that the function uses as a number.
    """
    apart = leaves_of(params, mask)
    paths, leaves = apart.paths, apart.arrays
    given = jax.tree_util.tree_structure(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not _is_array_like(leaf):
            raise TypeError(
                f"`params{path}` is a {type(leaf).__name__}, not an array. Pass only the arrays: "
                "of an Equinox module all of it or "
                "`params, static = eqx.partition(model, eqx.is_inexact_array)`, for Flax NNX "
                "`graphdef, params, rest = nnx.split(model, nnx.Param, ...)`."
            )
    # Python numbers and NumPy arrays take the types that the program gives them.
    leaves = [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in leaves]
    for path, leaf in zip(paths, leaves, strict=True):
        _check_leaf_type(path, leaf.dtype)
    _require_untyped(leaves)
    tree_out: list[Any] = []
    num_outputs: list[int] = []

    def flat(*flat_leaves: Any) -> Any:
        out = fn(apart.tree(flat_leaves))
        if has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    "With `has_aux=True` the function must return a pair `(loss, aux)`; it "
                    f"returned {_describe(out)}."
                )
            out, aux = out
            aux_leaves, structure = jax.tree_util.tree_flatten(aux)
            out_leaves = jax.tree_util.tree_leaves(out)
            if scalar:
                _require_scalar(out, out_leaves)
            num_outputs.append(len(out_leaves))
            tree_out.append(structure)
            return [*out_leaves, *aux_leaves]
        out_leaves, structure = jax.tree_util.tree_flatten(out)
        like_params = structure == given and not jax.tree_util.treedef_is_leaf(structure)
        if like_params and list(map(jnp.shape, out_leaves)) == list(map(jnp.shape, leaves)):
            raise TypeError(
                "The function returns a pytree like `params`, as a gradient is: give the loss "
                "function itself, `loss_fn` and not `jax.grad(loss_fn)`."
            )
        if scalar:
            _require_scalar(out, out_leaves)
        num_outputs.append(len(out_leaves))
        tree_out.append(structure)
        return out_leaves

    closed = jax.make_jaxpr(flat)(*leaves)
    _require_untyped(closed.consts)
    program, consts = Flattener(rests).flatten(closed, paths, num_outputs[0])
    return program, leaves, consts, tree_out[0]


def _require_untyped(arrays: Sequence[Any]) -> None:
    if any(map(compat.varies, arrays)):
        raise TraceError(shardings.TYPED)


def _require_scalar(out: Any, leaves: Sequence[Any]) -> None:
    if len(leaves) == 1 and jnp.shape(leaves[0]) == ():
        return
    what_to_do = (
        "Take the mean or the sum of the losses of its rows; of logits take a loss first, such as "
        "`optax.softmax_cross_entropy`."
    )
    if len(leaves) != 1:
        what_to_do = (
            "With a pair `(loss, aux)` give `has_aux=True`; give the loss function itself, "
            "`loss_fn`, and not `jax.value_and_grad(loss_fn)`."
        )
    raise TypeError(
        f"The loss must be one number, and the function returned {_describe(out)}. {what_to_do}"
    )


def _describe(out: Any) -> str:
    if isinstance(out, tuple):
        return f"a tuple of {len(out)}"
    if hasattr(out, "shape") and hasattr(out, "dtype"):
        return f"an array of shape {tuple(out.shape)}"
    return f"{'an' if type(out).__name__[0] in 'AEIOUaeiou' else 'a'} {type(out).__name__}"


def _is_array_like(leaf: Any) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return False
    dtype = getattr(leaf, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "OSUMm":
        return False
    return (hasattr(leaf, "shape") and dtype is not None) or isinstance(
        leaf, (bool, int, float, complex)
    )


def _check_leaf_type(path: str, dtype: Any) -> None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"`params{path}` is complex ({dtype}); projections are of real numbers. Keep the real "
            "and the imaginary part as two arrays."
        )
    if compat.is_narrow(dtype):
        raise TypeError(
            f"`params{path}` is {dtype}, whose range is too narrow for deviations from a forward "
            "pass. Use float32 or bfloat16."
        )
