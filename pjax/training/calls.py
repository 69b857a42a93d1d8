"""Calls of optimisers: of their own form, or told what to do."""

from __future__ import annotations

from typing import Any

from pjax.trace import require_function

#: Stands for an argument that a call as Optax makes it lacks.
MISSING: Any = object()


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


__all__ = ["MISSING", "require_own_call"]
