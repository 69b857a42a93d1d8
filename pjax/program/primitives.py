"""Operations that the library gives a name of their own, so that a trace keeps them whole.

Each is an ordinary JAX function: it works under `jit`, `vmap`, `grad`, and outside of projection
training. The losses are *per row*: the last axis holds the classes or the outputs of one example.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from pjax.backend import custom_primitives
from pjax.projections import losses
from pjax.projections.quantize import uniform_quantize


def to_front(args: Any, dims: Any, size: int) -> list[Array]:
    """All operands with the batch axis first; unbatched ones are broadcast."""
    return [
        jnp.broadcast_to(arg, (size, *jnp.shape(arg)))
        if custom_primitives.is_unmapped(dim)
        else jnp.moveaxis(arg, dim, 0)
        for arg, dim in zip(args, dims, strict=True)
    ]


def _batch_rows(bind: Any, size: int, args: Any, dims: Any, params: Any) -> Any:
    return bind(*to_front(args, dims, size), **params), 0


def _batch_elementwise(bind: Any, size: int, args: Any, dims: Any, params: Any) -> Any:
    (arg,), (dim,) = args, dims
    return bind(arg, **params), dim


#: The losses of the library, whose proximal operators are in `rules/losses.py`.
LOSSES: set[Any] = set()


def _define_loss(name: str, value: Any) -> Any:
    """The primitive of a loss of rows, `value(prediction, data, **params)`."""
    primitive = custom_primitives.define_primitive(f"pjax_{name}", value, _batch_rows)
    LOSSES.add(primitive)
    return primitive


cross_entropy_p = _define_loss("cross_entropy", losses.cross_entropy_value)
margin_loss_p = _define_loss("margin_loss", losses.margin_value)
squared_error_p = _define_loss("squared_error", losses.squared_error_value)
identity_p = custom_primitives.define_primitive("pjax_identity", lambda x: x, _batch_elementwise)
step_p = custom_primitives.define_primitive(
    "pjax_step", lambda x: (x > 0).astype(x.dtype), _batch_elementwise
)
quantize_p = custom_primitives.define_primitive(
    "pjax_quantize",
    lambda x, levels, low, high: uniform_quantize(x, levels, low, high),
    _batch_elementwise,
)

threshold_p = custom_primitives.define_primitive(
    "pjax_threshold",
    lambda x, margin: jnp.where(x > 0, 1, -1).astype(x.dtype),
    _batch_elementwise,
)


def _batch_constrain(bind: Any, size: int, args: Any, dims: Any, params: Any) -> Any:
    """What is constrained has the axis in front; the numbers of the set, where they have one."""
    mapped = [not custom_primitives.is_unmapped(dim) for dim in dims]
    x, *_ = to_front(args[:1], dims[:1], size)
    numbers = [
        jnp.moveaxis(arg, dim, 0) if own else arg
        for arg, dim, own in zip(args[1:], dims[1:], mapped[1:], strict=True)
    ]
    axes = tuple(0 if own else None for own in mapped[1:])
    return bind(x, *numbers, **{**params, "axes": (axes, *params["axes"])}), 0


constrain_p = custom_primitives.define_primitive(
    "pjax_constrain", lambda x, *numbers, structure, axes: x, _batch_constrain
)


def _row_operands(name: str, prediction: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    prediction = jnp.asarray(prediction)
    target = jnp.asarray(target)
    if prediction.ndim == 0:
        raise ValueError(
            f"`{name}` needs at least one axis (the last one is the row), got a scalar."
        )
    if prediction.shape != target.shape:
        what_to_do = (
            "Labels that are class numbers must be one-hot first: "
            "`jax.nn.one_hot(labels, num_classes)`."
        )
        if prediction.ndim == target.ndim:
            what_to_do = "Are both of the same batch, and of as many classes or outputs?"
        raise ValueError(
            f"`{name}` needs two arrays of one shape, got {prediction.shape} and {target.shape}. "
            + what_to_do
        )
    if not jnp.issubdtype(prediction.dtype, jnp.floating):
        raise TypeError(f"`{name}` needs floating-point predictions, got {prediction.dtype}.")
    return prediction, target.astype(prediction.dtype)


def cross_entropy(
    logits: Float[ArrayLike, "*batch classes"], labels: Float[ArrayLike, "*batch classes"]
) -> Float[Array, "*batch"]:
    """`−Σ_c y_c log softmax(x)_c` of every row.

    In a projection solve its rule is the exact proximal operator,
    `argmin_x' ½|x' − x|² + λ·CE(x', y)`.

    **Arguments:**

    - `logits`: scores, classes on the last axis.
    - `labels`: probabilities of the same shape, one-hot or soft.

    **Returns:** one loss per row, without the last axis.
    """
    return cross_entropy_p.bind(*_row_operands("cross_entropy", logits, labels))


def margin_loss(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Float[ArrayLike, "*batch classes"],
    margin: float = 1.0,
) -> Float[Array, "*batch"]:
    """`½ Σ_c max(margin − s_c x_c, 0)²` of every row, with `s = 2·labels − 1`.

    It vanishes on the set of rows whose true class scores at least `margin` and whose other
    classes score at most `−margin`; its proximal operator is closed form.

    **Arguments:**

    - `logits`: scores, classes on the last axis.
    - `labels`: one-hot, of the same shape.
    - `margin`: a positive number.

    **Returns:** one loss per row, without the last axis.

    **Raises:** `ValueError` for unequal shapes or a margin that is not positive and finite.
    """
    margin = float(margin)
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"`margin` must be positive and finite, got {margin}.")
    return margin_loss_p.bind(*_row_operands("margin_loss", logits, labels), margin=margin)


def squared_error(
    prediction: Float[ArrayLike, "*batch outputs"], target: Float[ArrayLike, "*batch outputs"]
) -> Float[Array, "*batch"]:
    """`½ Σ_i (x_i − t_i)²` of every row; its proximal operator is closed form.

    **Arguments:** two arrays of one shape, the outputs on the last axis.

    **Returns:** one loss per row, without the last axis.
    """
    return squared_error_p.bind(*_row_operands("squared_error", prediction, target))


def identity(x: ArrayLike) -> Array:
    """`x`, as a node of its own in the graph (the library inserts those that it needs itself)."""
    return identity_p.bind(jnp.asarray(x))


def floating(name: str, x: ArrayLike) -> Array:
    """`x` as an array; `TypeError` if its type is no floating-point type."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"`{name}` needs a floating-point array, got {x.dtype}.")
    return x


def step(x: ArrayLike) -> Array:
    """`1 where x > 0, else 0`, in the dtype of `x`, which must be a floating-point type."""
    return step_p.bind(floating("step", x))


def threshold(x: ArrayLike, margin: float = 0.0) -> Array:
    """`1 where x > 0, else −1`, as a constraint that asks for `|x| ≥ margin`.

    In neuron splitting `threshold(x @ w, margin)` is one constraint for each scalar product: with
    `y = ±1` its output, `y (x·w) ≥ margin`. Where the product is read elsewhere too, or `x` is
    another value, it is `y x ≥ margin` for each entry. In layer splitting, and wherever the
    function is only evaluated, the margin does not matter.

    **Arguments:**

    - `x`: a floating-point array.
    - `margin`: a number, not negative.

    **Raises:** `ValueError` for a margin that is negative or not finite, `TypeError` for an array
    of another type.

    >>> threshold(jnp.array([-0.2, 0.0, 3.0]), margin=1.0)
    Array([-1., -1.,  1.], dtype=float32)

    Source: V. Elser and M. Krishan Lal, *Learning with Boolean threshold functions*, arXiv
    2602.17493.
    """
    x, margin = floating("threshold", x), float(margin)
    if not (margin >= 0 and math.isfinite(margin)):
        raise ValueError(f"`margin` must be finite and not negative, got {margin}.")
    return threshold_p.bind(x, margin=margin)


def quantize(x: ArrayLike, levels: int = 2, low: float = -1.0, high: float = 1.0) -> Array:
    """The nearest of `levels` equally spaced values in `[low, high]`, elementwise.

    **Arguments:**

    - `x`: a floating-point array.
    - `levels`: how many values, at least 2.
    - `low`, `high`: the least and the greatest value.

    **Raises:** `ValueError` for fewer than two levels or bounds that are not ordered, `TypeError`
    for an array of another type.
    """
    x = floating("quantize", x)
    if levels < 2:
        raise ValueError(f"`levels` must be at least 2, got {levels}.")
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"`low` must be below `high`, both finite, got {low} and {high}.")
    return quantize_p.bind(x, levels=int(levels), low=float(low), high=float(high))
