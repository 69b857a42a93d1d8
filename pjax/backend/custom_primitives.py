"""JAX primitives of our own, from a function that computes them."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.core import ShapedArray as ShapedArray
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir


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
        out = jax.eval_shape(functools.partial(implementation, **params), *shapes)
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
