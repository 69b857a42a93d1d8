"""What differs between versions of JAX: primitives, and the types and bodies of jaxprs.

`jax.extend` promises no compatibility, and names moved between releases (`pjit` became `jit`,
`remat` was `checkpoint`). Everything that depends on such facts is looked up here, once.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray as ShapedArray
from jax.extend import core as jex
from jax.extend.core import primitives as P
from jax.interpreters import batching, mlir

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


# --- Several devices: names of primitives that JAX does not export, and types of arrays ----------

#: Sums over the devices along an axis of `shard_map` or `vmap`. Their transposes depend on how JAX
#: was told to type values, and are JAX's own.
SUMS_OVER_DEVICES = frozenset({"psum", "psum_invariant"})
#: What changes how a value is typed and where it lies, and not the value.
_CASTS = frozenset({"reshard", "mesh_cast"})
_PLACES = frozenset({"sharding_constraint", "device_put", "shard_map"})


def is_cast(equation: Any) -> bool:
    """Whether an equation's outputs are its operands, typed or placed in another way."""
    name = equation.primitive.name
    if name != "sharding_constraint":
        return name in _CASTS
    mesh = getattr(equation.params.get("sharding"), "mesh", None)
    return bool(getattr(mesh, "explicit_axes", ()))


def without_shardings(equation: Any) -> Any:
    """The equation without what it says of explicit axes: where its output lies."""
    names = [n for n in ("sharding", "out_sharding") if equation.params.get(n) is not None]
    if not names or equation.primitive.name in _PLACES:
        return equation
    return equation.replace(params={**equation.params, **dict.fromkeys(names)})


def explicit_mesh(arrays: Any) -> Any:
    """The mesh of an array that has explicit axes; None if none has."""
    for array in arrays:
        sharding = getattr(jax.typeof(array), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if mesh is not None and mesh.explicit_axes:
            concrete = getattr(getattr(array, "sharding", None), "mesh", None)
            return concrete if isinstance(concrete, jax.sharding.Mesh) else mesh
    return None


def use_mesh(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """Within it this is the mesh, if there is none yet."""
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    if isinstance(mesh, jax.sharding.Mesh):
        return jax.set_mesh(mesh)
    return jax.sharding.use_abstract_mesh(mesh)


def manual_axes() -> tuple[str, ...]:
    """The axes of the `shard_map` around."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def varies(array: Any) -> frozenset[str]:
    """The axes of `shard_map` along which a value is typed as varying."""
    manual = getattr(jax.typeof(array), "mat", None)
    return frozenset() if manual is None else manual.varying


def _define_alike() -> Any:
    """The primitive `(x, y) -> x` that lets the compiler have both on the devices alike; None if
    this JAX has none.

    As `jax.experimental.shard_alike`, whose lowering JAX keeps for arrays of equal types: two pairs
    of one shape then are one group, all four alike.
    """
    try:
        from jax._src.shard_alike import shard_alike_lowering
    except ImportError:  # pragma: no cover - of another JAX
        return None
    primitive = jex.Primitive("pjax_alike")
    primitive.def_impl(lambda x, y: x)
    primitive.def_abstract_eval(lambda x, y: x)

    def lowering(ctx: Any, x: Any, y: Any) -> Any:
        found, _ = shard_alike_lowering(ctx.replace(avals_out=ctx.avals_in), x, y)
        return [found]

    mlir.register_lowering(primitive, lowering, cacheable=False)

    def batch(arrays: Any, dims: Any) -> Any:
        size = next(x.shape[d] for x, d in zip(arrays, dims, strict=True) if isinstance(d, int))
        x, y = (
            jnp.moveaxis(array, dim, 0)
            if isinstance(dim, int)
            else jnp.broadcast_to(array, (size, *array.shape))
            for array, dim in zip(arrays, dims, strict=True)
        )
        return primitive.bind(x, y), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


_ALIKE = _define_alike()


def lying_as(array: Any, other: Any) -> Any:
    """The array, which the compiler is to have on the devices as the other one of its shape."""
    return array if _ALIKE is None else _ALIKE.bind(array, other)


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
