"""Modules: a model is a function of a flat dictionary of named parameters.

`model.init(key)` returns `{"dense1.weight": array, …}` and `model.apply(params, *inputs)` computes
the output. Names are the attribute names on the way to a parameter, joined by dots.

>>> import jax
>>> import pjax.nn as nn
>>> class Network(nn.Module):
...     def __init__(self):
...         self.dense1 = nn.Linear(4, 8)
...         self.relu1 = nn.ReLU(8)
...         self.dense2 = nn.Linear(8, 2)
...
...     def __call__(self, x):
...         return self.dense2(self.relu1(self.dense1(x)))
>>> model = Network()
>>> params = model.init(jax.random.key(0))
>>> {name: value.shape for name, value in params.items()}
{'dense1.weight': (4, 8), 'relu1.bias': (8,), 'dense2.weight': (8, 2)}
>>> model.apply(params, jax.numpy.ones((3, 4))).shape
(3, 2)
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from pjax import numpy as pnp

__all__ = [
    "Conv2D",
    "Embedding",
    "Linear",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "ReLU",
]
Initializer = Callable[..., Array]
"""`initializer(key, shape, dtype) -> array`, as in `jax.nn.initializers`."""

he_normal = jax.nn.initializers.he_normal()
glorot_normal = jax.nn.initializers.glorot_normal()
standard_normal = jax.nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """The place of a parameter: an attribute of a module that `init` fills and `apply` binds.

    **Arguments:**

    - `shape`: the parameter's shape.
    - `initializer`: `initializer(key, shape, dtype)`, as in `jax.nn.initializers`.
    - `dtype`: a floating-point type; the default is JAX's (`float32` unless x64 is enabled).
    """

    shape: tuple[int, ...]
    initializer: Initializer = jax.nn.initializers.zeros
    dtype: Any = None

    def __jax_array__(self) -> Array:
        raise TypeError(
            "this module has no parameters yet. Call the model through "
            "`model.apply(params, *inputs)`, with `params = model.init(key)`."
        )


class Module:
    """A model or a part of one: `__call__` (or `forward`) computes, attributes hold the parts.

    Attributes that are a `Parameter`, a `Module`, or a list, tuple or dictionary of these, make up
    the parameters. A module that appears twice has one set of parameters, under its first name.
    """

    def init(self, key: Array) -> dict[str, Array]:
        """New parameters, drawn from `key`.

        **Arguments:**

        - `key`: from `jax.random.key(seed)` or `jax.random.PRNGKey(seed)`. The same key gives the
          same parameters.

        **Returns:** a flat dictionary from dotted names to arrays, in the order of declaration.
        """
        declared = self._declared()
        _check_key(key)
        keys = jax.random.split(key, max(len(declared), 1))
        return {
            name: parameter.initializer(
                part, parameter.shape, parameter.dtype or jnp.result_type(float)
            )
            for part, (name, parameter) in zip(keys, declared.items(), strict=False)
        }

    def apply(self, params: Mapping[str, ArrayLike], *inputs: Any, **options: Any) -> Any:
        """The model's output for these parameters.

        **Arguments:**

        - `params`: a dictionary with exactly the names and shapes that `init` returns.
        - `inputs`, `options`: passed on to `__call__` (or `forward`).

        **Raises:** `ValueError` for missing and unknown names and for wrong shapes.
        """
        declared = self._declared()
        _check_params(type(self).__name__, declared, params)
        values = {id(parameter): jnp.asarray(params[name]) for name, parameter in declared.items()}
        return _bind(self, values, {})(*inputs, **options)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        forward = getattr(self, "forward", None)
        if forward is None:
            raise NotImplementedError(
                f"`{type(self).__name__}` must define `__call__` (or `forward`)."
            )
        return forward(*inputs, **options)

    def _declared(self) -> dict[str, Parameter]:
        """Every parameter once, by its first dotted name, in the order of declaration."""
        return dict(_walk(self, "", set()))


class Linear(Module):
    """`y = x W` on the last axis, without a bias (a `ReLU` has one).

    **Arguments:**

    - `in_features`, `out_features`: the shape of `weight`.
    - `initializer`: He's normal distribution (variance `2 / in_features`) by default.
    """

    def __init__(
        self, in_features: int, out_features: int, initializer: Initializer = he_normal
    ) -> None:
        shape = _sizes("Linear", in_features=in_features, out_features=out_features)
        self.weight: Any = Parameter(shape, initializer)

    def __call__(self, x: ArrayLike) -> Array:
        _check_last_axis("Linear", x, self.weight.shape[0])
        return pnp.dot(x, self.weight)


class ReLU(Module):
    """`y = max(x1 + x2 + … + b, 0)`: one node for the sum of the inputs, the bias and the relu.

    **Arguments:**

    - `features`: the length of the inputs' last axis and of `bias`, which starts at zero.
    """

    def __init__(self, features: int) -> None:
        self.bias: Any = Parameter(_sizes("ReLU", features=features))

    def __call__(self, *inputs: ArrayLike) -> Array:
        if not inputs:
            raise TypeError("`ReLU` needs at least one input.")
        for x in inputs:
            _check_last_axis("ReLU", x, self.bias.shape[0])
        return pnp.sum_relu(*inputs, self.bias)


class Conv2D(Module):
    """`y[i, j] = Σ_{a, b, k} x[i·sh + a, j·sw + b, k] W[a, b, k]`, without a bias.

    It is the dot product of patches with the kernel (`pjax.numpy.conv_patch`).

    **Arguments:**

    - `in_channels`, `out_channels`: the last two axes of `weight`.
    - `kernel_size`, `stride`: one number, or one for height and one for width.
    - `padding`: `"SAME"`, `"VALID"`, a number, or for height and width a number or a pair.
    - `initializer`: He's normal distribution by default.

    Inputs have shape `(…, height, width, in_channels)`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: pnp.Padding = "SAME",
        initializer: Initializer = he_normal,
    ) -> None:
        channels = _sizes("Conv2D", in_channels=in_channels, out_channels=out_channels)
        if not isinstance(kernel_size, Sequence):
            kernel_size = (kernel_size, kernel_size)
        if len(kernel_size) != 2:
            raise ValueError(f"`kernel_size` must be one integer or two, got {kernel_size!r}.")
        height, width = _sizes("Conv2D", kernel_height=kernel_size[0], kernel_width=kernel_size[1])
        self.stride = stride
        self.padding: pnp.Padding = padding
        self.weight: Any = Parameter((height, width, *channels), initializer)

    def __call__(self, x: ArrayLike) -> Array:
        height, width, in_channels, out_channels = self.weight.shape
        _check_last_axis("Conv2D", x, in_channels)
        patches = pnp.conv_patch(x, (height, width), self.stride, self.padding)
        return pnp.dot(patches, pnp.reshape(self.weight, (-1, out_channels)))


class Embedding(Module):
    """`y = W[indices]`: row `i` of `weight` for every index `i`.

    **Arguments:**

    - `num_embeddings`, `features`: the shape of `weight`.
    - `initializer`: the standard normal distribution by default.

    Inputs are integers of any shape; the output has `features` as its last axis.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        initializer: Initializer = standard_normal,
    ) -> None:
        shape = _sizes("Embedding", num_embeddings=num_embeddings, features=features)
        self.weight: Any = Parameter(shape, initializer)

    def __call__(self, indices: pnp.Values) -> Array:
        if not isinstance(indices, jax.Array):
            indices = np.asarray(indices)
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"`Embedding` needs integers, got {indices.dtype}.")
        return pnp.index(self.weight, indices)


class MultiHeadAttention(Module):
    """`y = [relu(Q Kᵀ / √d) / L · V] W_o`, head by head.

    Here `Q = x W_q`, `K = x W_k` and `V = x W_v`.
    The weights of the positions come from a relu divided by the number `L` of positions that are
    attended to, not from a softmax: a relu and products have exact projections, a softmax needs a
    projection rule of its own.

    **Arguments:**

    - `features`: the length of the inputs' last axis; `query`, `key`, `value` and `output` are
      `Linear(features, features)`.
    - `num_heads`: a divisor of `features`; `d = features / num_heads`.
    - `causal`: position `i` attends to positions up to `i` only (then `L = i + 1`).
    - `initializer`: for the four weights; Glorot's normal distribution by default.

    Inputs have shape `(…, positions, features)`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        causal: bool = False,
        initializer: Initializer = glorot_normal,
    ) -> None:
        _sizes("MultiHeadAttention", features=features, num_heads=num_heads)
        if features % num_heads:
            raise ValueError(
                f"`num_heads` must divide `features`, got {num_heads} heads, {features} features."
            )
        self.num_heads = num_heads
        self.causal = causal
        self.query = Linear(features, features, initializer)
        self.key = Linear(features, features, initializer)
        self.value = Linear(features, features, initializer)
        self.output = Linear(features, features, initializer)

    def __call__(self, x: ArrayLike) -> Array:
        if jnp.ndim(x) < 2:
            raise ValueError(
                f"`MultiHeadAttention` needs (…, positions, features), got {jnp.shape(x)}."
            )
        *batch, length, features = jnp.shape(x)
        depth = features // self.num_heads

        def heads(projected: Array) -> Array:
            split = pnp.reshape(projected, (*batch, length, self.num_heads, depth))
            return pnp.swapaxes(split, -3, -2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        scores = pnp.matmul(query, pnp.swapaxes(key, -1, -2)) * (1 / math.sqrt(depth))
        if self.causal:
            visible = np.tri(length)
            share = visible / visible.sum(-1, keepdims=True)
        else:
            share = np.asarray(1 / length)
        attention = pnp.relu(scores) * share.astype(scores.dtype)
        mixed = pnp.swapaxes(pnp.matmul(attention, value), -3, -2)
        return self.output(pnp.reshape(mixed, (*batch, length, features)))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Module):
        yield from vars(value).items()
    elif isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(position), part) for position, part in enumerate(value))


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Parameter]]:
    if isinstance(value, Module | Parameter):
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, Parameter):
        yield path, value
        return
    for name, part in _children(value):
        if isinstance(part, Module | Parameter | Mapping | list | tuple):
            yield from _walk(part, f"{path}.{name}" if path else name, seen)


def _bind(value: Any, values: dict[int, Array], bound: dict[int, Any]) -> Any:
    """A copy of `value` with arrays in place of its parameters; nothing of `value` is changed."""
    if isinstance(value, Parameter):
        return values[id(value)]
    if isinstance(value, Module):
        if id(value) not in bound:
            clone = bound[id(value)] = copy.copy(value)
            clone.__dict__.update(
                {name: _bind(part, values, bound) for name, part in vars(value).items()}
            )
        return bound[id(value)]
    if isinstance(value, dict):
        return {name: _bind(part, values, bound) for name, part in value.items()}
    if isinstance(value, list):
        return [_bind(part, values, bound) for part in value]
    if isinstance(value, tuple):
        parts = [_bind(part, values, bound) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0
    raw = dtype == jnp.uint32 and key.ndim == 1
    if not (typed or raw):
        raise TypeError(f"`init` needs one random key, `jax.random.key(0)` say; got {key!r}.")


def _check_params(
    model: str, declared: Mapping[str, Parameter], params: Mapping[str, ArrayLike]
) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(
            f"`{model}.apply` needs a dictionary of parameters first, got {type(params).__name__}."
        )
    missing = [name for name in declared if name not in params]
    unknown = [name for name in params if name not in declared]
    if missing or unknown:
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        problems += [f"unknown: {', '.join(map(str, unknown))}"] if unknown else []
        raise ValueError(
            f"the parameters do not fit `{model}` ({'; '.join(problems)}). "
            f"It has: {', '.join(declared) or 'none'}."
        )
    for name, parameter in declared.items():
        if jnp.shape(params[name]) != parameter.shape:
            raise ValueError(
                f"parameter `{name}` of `{model}` has shape {parameter.shape}, "
                f"got {jnp.shape(params[name])}."
            )


def _sizes(owner: str, **sizes: int) -> tuple[int, ...]:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"`{owner}`: `{name}` must be a positive integer, got {size!r}.")
    return tuple(int(size) for size in sizes.values())


def _check_last_axis(owner: str, x: ArrayLike, size: int) -> None:
    if jnp.ndim(x) < 1 or jnp.shape(x)[-1] != size:
        raise ValueError(
            f"`{owner}` needs {size} features on the last axis, got shape {jnp.shape(x)}."
        )
