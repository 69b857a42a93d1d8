"""What differs between versions of JAX: primitives, and the types and bodies of jaxprs.

`jax.extend` promises no compatibility, and names moved between releases (`pjit` became `jit`,
`remat` was `checkpoint`). Everything that depends on such facts is looked up here, once.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray as ShapedArray
from jax.extend import core as jex
from jax.extend.core import primitives as P

# Of any type for the type checker: their attributes are not declared.
ClosedJaxpr: Any = jex.ClosedJaxpr
Jaxpr: Any = jex.Jaxpr
Literal: Any = jex.Literal
DropVar: Any = getattr(jex, "DropVar", ())


def primitive_path(name: str) -> str | None:
    """Where JAX exports the primitive of this name, as source code; None if nowhere."""
    attribute = f"{name}_p"
    if hasattr(jax.lax, attribute):
        return f"jax.lax.{attribute}"
    return f"jax.extend.core.primitives.{attribute}" if hasattr(P, attribute) else None


def find_primitives(*names: str) -> frozenset[Any]:
    """The primitives of these names that this JAX has (`add` stands for `add_p`)."""
    # Not every primitive is in both places: `split_p` and `stack_p` are in `jax.lax` only.
    found = (getattr(place, f"{name}_p", None) for name in names for place in (P, jax.lax))
    return frozenset(primitive for primitive in found if primitive is not None)


#: Calls whose body is traced as if it stood in the caller's place.
CALLS = find_primitives(
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "call",
    "remat",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
)
_BODY_PARAMETERS = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
#: Also matched by name: not every version exports every call primitive.
_CALL_NAMES = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_vmap_call"}
)
#: Calls of functions with a derivative of their own.
CUSTOM_JVP = find_primitives("custom_jvp_call")
CUSTOM_VJP = find_primitives("custom_vjp_call", "custom_vjp_call_jaxpr")


def as_function(jaxpr: Any, consts: Any) -> Any:
    """A body as a function of its operands, which returns a list."""
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, consts))


def function_name(jaxpr: Any) -> str:
    """The name of the function that a called `jaxpr` was traced from; empty if unknown."""
    try:
        return str(jaxpr.debug_info.func_name)
    except Exception:  # not promised by `jax.extend`: any failure only costs the name
        return ""


def call_body(primitive: Any, params: dict[str, Any]) -> tuple[Any, tuple[Any, ...]] | None:
    """The `(jaxpr, consts)` of a call primitive, or None if `primitive` is not a call to inline."""
    if primitive not in CALLS and primitive.name not in _CALL_NAMES:
        return None
    for name in _BODY_PARAMETERS:
        body: Any = params.get(name)
        if isinstance(body, (ClosedJaxpr, Jaxpr)):
            return open_jaxpr(body)
    return None


def open_jaxpr(body: Any) -> tuple[Any, tuple[Any, ...]]:
    """The `(jaxpr, consts)` of a body, which may be open or closed."""
    return (body.jaxpr, tuple(body.consts)) if isinstance(body, ClosedJaxpr) else (body, ())


def bind(equation: Any, operands: Any) -> list[Any]:
    """The outputs of an equation of a jaxpr."""
    params: Any = equation.primitive.get_bind_params(equation.params)
    functions: Any = ()
    if isinstance(params, tuple):  # before JAX 0.10.2 functions go in front of the operands
        functions, params = params
    out = equation.primitive.bind(*functions, *operands, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def scan_body(params: dict[str, Any]) -> tuple[Any, tuple[Any, ...], int, int]:
    """The `(jaxpr, consts, num_consts, num_carry)` of a `scan`.

    JAX 0.11 has the structure of the inputs, `(consts, carry, xs)`, in place of the two numbers.
    """
    jaxpr, consts = open_jaxpr(params["jaxpr"])
    if "num_carry" in params:
        return jaxpr, consts, params["num_consts"], params["num_carry"]
    num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    return jaxpr, consts, num_consts, num_carry


def is_narrow(dtype: Any) -> bool:
    """Whether a type cannot hold deviations: float16 and the 8-bit floats, not bfloat16."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).minexp > -100


@functools.cache
def broadcast_params(operand: tuple[int, ...], shape: tuple[int, ...]) -> dict[str, Any]:
    """The parameters of `broadcast_in_dim` to `shape` from a scalar or a shape of its rank."""
    axes = tuple(range(len(operand)))
    closed = jax.make_jaxpr(lambda x: jax.lax.broadcast_in_dim(x, shape, axes))(
        jax.ShapeDtypeStruct(operand, "float32")
    )
    return dict(closed.eqns[0].params)


@functools.cache
def binary_params(name: str, dtype: Any) -> dict[str, Any]:
    """The parameters of `jax.lax.add`, `mul` or `div` of two arrays of one type."""
    operand = jax.ShapeDtypeStruct((2,), dtype)
    return dict(jax.make_jaxpr(getattr(jax.lax, name))(operand, operand).eqns[0].params)
