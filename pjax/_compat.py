"""The only file that knows JAX versions: primitives, jaxpr types, source lines.

`jax.extend` promises no compatibility, and names moved between releases (`pjit` became `jit`,
`remat` was `checkpoint`). Everything that depends on such facts is looked up here, once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray as ShapedArray
from jax.extend import core as jex
from jax.extend.core import primitives as P
from jax.interpreters import ad, batching, mlir

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


def _directory(path: str) -> str:
    return os.path.join(os.path.abspath(path), "")


#: Files below these are not the user's own: JAX, Flax, the standard library, and this library.
_LIBRARIES = tuple(
    _directory(path)
    for path in (
        os.path.dirname(__file__),
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def is_library_file(file: str) -> bool:
    """Whether a source file is part of an installed package, not the user's own."""
    if file.startswith("<frozen"):
        return True
    path = os.path.abspath(file)
    return path.startswith(_LIBRARIES) or any(part in path for part in _INSTALLED)


def source_line(equation: Any, caller: str = "") -> str:
    """`file:line (function)` of the user's code that made `equation`; empty if unknown.

    Frames of installed packages are passed over: a user looks for the line of the model that calls
    a layer of Flax. Without any frame of the user, `caller` is returned, the line of the call that
    `equation` is in.
    """
    try:
        from jax._src import source_info_util

        frames = list(source_info_util.user_frames(equation.source_info.traceback))
    except Exception:  # a private module: any failure only costs the source line
        return caller
    own = [frame for frame in frames if not is_library_file(frame.file_name)]
    if not own and caller:
        return caller
    for frame in own or frames:
        return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return caller


#: Libraries whose own derivatives are numerical care: `relu`, `softmax`, `logsumexp`.
_CAREFUL = tuple(f"{os.sep}{name}{os.sep}" for name in ("jax", "optax", "flax", "equinox"))


def is_jax_function(equation: Any) -> bool:
    """Whether a called function is one of JAX itself, Optax, Flax or Equinox."""
    body = call_body(equation.primitive, equation.params)
    try:
        file = os.path.abspath(body[0].debug_info.func_filename)  # pyright: ignore
    except Exception:  # not promised by `jax.extend`
        return False
    return is_library_file(file) and any(part in file for part in _CAREFUL)


def is_library_function(jaxpr: Any) -> bool:
    """Whether the function that a called `jaxpr` was traced from is part of an installed package.

    Such a body may have been traced for another caller, so its source lines are not to be trusted.
    """
    try:
        return is_library_file(jaxpr.debug_info.func_filename)
    except Exception:  # not promised by `jax.extend`: any failure only costs the source line
        return False


def define_primitive(name: str, implementation: Any, batch: Any) -> Any:
    """A JAX primitive computed by `implementation(*arrays, **params)`.

    It works under `jit`, `vmap` (by `batch(bind, size, args, dims, params) -> (out, out_dim)`),
    `jvp` and `grad`: derivatives are those of `implementation`.
    """
    primitive = jex.Primitive(name)

    @functools.cache
    def compiled(params: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(functools.partial(implementation, **dict(params)))

    primitive.def_impl(lambda *args, **params: compiled(tuple(sorted(params.items())))(*args))

    def abstract(*avals: Any, **params: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        out = jax.eval_shape(lambda *args: implementation(*args, **params), *shapes)
        return ShapedArray(out.shape, out.dtype)

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=False))

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        tangents = tuple(
            ad.instantiate_zeros(tangent) if isinstance(tangent, ad.Zero) else tangent
            for tangent in tangents
        )
        return jax.jvp(lambda *args: implementation(*args, **params), tuple(primals), tangents)

    ad.primitive_jvps[primitive] = jvp

    def batching_rule(args: Any, dims: Any, **params: Any) -> Any:
        size = next(
            arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if not is_unmapped(dim)
        )
        return batch(primitive.bind, size, args, dims, params)

    batching.primitive_batchers[primitive] = batching_rule
    return primitive


def is_unmapped(dim: Any) -> bool:
    """Whether a batching dimension says "not batched"."""
    return dim is None or dim is getattr(batching, "not_mapped", None)


def compile_time_eval() -> contextlib.AbstractContextManager[Any]:
    """Operations inside run now, also within an outer `jit`."""
    return jax.ensure_compile_time_eval()


def launches_kernels() -> bool:
    """Whether the device runs one launched kernel after the other, as a GPU does: then few large
    operations are faster than many small ones, where a CPU is as fast with either.
    """
    return jax.default_backend() != "cpu"


def run_once(function: Any, *args: Any) -> Any:
    """`function(*args)` now, also within an outer `jit`, compiled as quickly as can be.

    As one program: within `compile_time_eval` each operation on known numbers is compiled by
    itself, also while something is traced.
    """
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(compiler_options=options)(*args)


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
