"""What must hold of an update: its own form of call, finite parameters, data and loss; errors say
what does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from pjax.program import Leaf
from pjax.trace import require_function

#: Stands for an argument that a call as Optax makes it lacks.
MISSING: Any = object()


class NonFiniteError(ValueError):
    """The parameters, the data or the forward pass hold NaN or infinite values."""


class Checks(NamedTuple):
    """What holds of a solve: each leaf is finite, each captured array has no NaN, and so on."""

    leaves: list[Array]
    not_nan: list[Array]
    finite: list[Array]
    loss: Array
    solved: Array


def require_own_call(
    optimizer: Any, fn: Any, params: Any, state: Any = None, kinds: Any = object
) -> None:
    """Raises `TypeError` if `init` or `update` is called as those of a gradient transformation are,
    `init(params)` and `update(gradients, state, params)`, or with arguments in another order.

    **Arguments:**

    - `kinds`: what `state` must be.
    """
    if params is not MISSING and state is not MISSING and isinstance(state, kinds):
        require_function(fn, "fn")
        return
    wrong = (
        "" if state is MISSING else f"`state` must come from `init`, got {type(state).__name__}. "
    )
    raise TypeError(
        f"{wrong}`pjax.optim.{type(optimizer).__name__}` is called as `init(loss, params, …)` and "
        "`update(loss, params, state, …)`, with the loss as a function. It makes its moves by "
        "itself, and is no gradient transformation for `optax.chain`, `nnx.Optimizer` or a "
        "`TrainState`. Give these an optimiser of Optax, and `pjax.value_and_displacement(loss)` "
        "in the place of `jax.value_and_grad(loss)`."
    )


def check(
    leaves: Sequence[Any], consts: Sequence[Any], loss: Array, moved: Sequence[Any]
) -> Checks:
    return Checks(
        leaves=[_is_finite(leaf) for leaf in leaves],
        not_nan=[_has_no_nan(const) for const in consts],
        finite=[_is_finite(const) for const in consts],
        loss=_is_finite(loss),
        solved=jnp.all(jnp.array([_is_finite(leaf) for leaf in moved])),
    )


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _is_finite(x: Any) -> Array:
    return jnp.all(jnp.isfinite(x)) if _is_floating(x) else jnp.array(True)


def _has_no_nan(x: Any) -> Array:
    return ~jnp.any(jnp.isnan(x)) if _is_floating(x) else jnp.array(True)


def raise_if_unsound(leaves: Sequence[Leaf], consts: Sequence[Any], checks: Checks) -> None:
    if any(isinstance(check, Tracer) for check in jax.tree_util.tree_leaves(checks)):
        return  # inside an outer jit: the verdict of the history says it
    # Inputs first: where they are finite and the loss is not, the forward pass overflowed.
    for leaf, finite in zip(leaves, checks.leaves, strict=True):
        if not finite:
            raise NonFiniteError(f"`params{leaf.path}` {leaf.shape} holds NaN or infinite values.")
    for const, not_nan in zip(consts, checks.not_nan, strict=True):
        if not not_nan:
            raise NonFiniteError(
                "An argument of the function, or an array that it closes over, holds NaN: "
                f"{_describe(const)}. Check the data of this batch."
            )
    if not (checks.loss and checks.solved):
        # Infinite data can be meant (a mask of −inf): they are named only where something failed.
        infinite = [
            _describe(const)
            for const, finite in zip(consts, checks.finite, strict=True)
            if not finite
        ]
        holds = (
            "Arguments of the function, or what it closes over, hold infinite values, in "
            f"{' and in '.join(infinite)}"
        )
        if not checks.loss and infinite:
            raise NonFiniteError(
                f"The loss of the forward pass is not finite. {holds}: check the data of this "
                "batch."
            )
        if not checks.loss:
            raise NonFiniteError(
                "The loss of the forward pass is not finite, although parameters and data are: "
                "look for an overflow (a smaller initialisation or scaled inputs help) or a NaN "
                "made inside the function."
            )
        if infinite:
            raise NonFiniteError(
                "The solve left the range of floating-point numbers, although parameters and loss "
                f"are finite. {holds}: check the data of this batch."
            )
        raise NonFiniteError(
            "The solve left the range of floating-point numbers, although parameters, data and "
            "loss are finite: look for very large data or activations, or lower `prox_step`."
        )


def require_relaxation(relaxation: Any) -> None:
    """Raises `ValueError` for a factor on moves that is no finite number of at least 0.

    An array of JAX is left to the device: a schedule is not waited for.
    """
    if isinstance(relaxation, jax.Array):
        return
    try:
        sound = np.ndim(relaxation) == 0 and 0 <= float(relaxation) < math.inf
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(
            f"`relaxation` must be a finite number of at least 0, a factor on the move; got "
            f"{relaxation!r}."
        )


def _describe(array: Any) -> str:
    return f"an array of shape {np.shape(array)} and dtype {array.dtype}"


__all__ = [
    "MISSING", "Checks", "NonFiniteError", "check", "raise_if_unsound", "require_own_call",
    "require_relaxation",
]  # fmt: skip
