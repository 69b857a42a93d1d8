"""The networks that the laboratory trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from pjax import nn
from pjax import numpy as pnp

ActivationName = Literal["relu", "tanh", "sigmoid", "gelu", "silu", "sign", "four-level"]
#: Those without a useful derivative.
QUANTIZED = ("sign", "four-level")
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sign": jnp.sign,
    "four-level": lambda x: pnp.quantize(x, 4, -1.0, 1.0),
}


def straight_through(x: Array, y: Array, window: Any) -> Array:
    """`y`, with the derivative of `x` where `|x| < window` and 0 elsewhere; no window: `y`."""
    if window is None:
        return y
    through = jnp.where(jnp.abs(x) < window, x, jax.lax.stop_gradient(x))
    return through + jax.lax.stop_gradient(y - through)


class Activation(nn.Module):
    """`y = f(x + b)`, with a bias that starts at zero.

    **Arguments:**

    - `name`: of `f`.
    - `features`: the length of `b` and of the inputs' last axis.
    """

    def __init__(self, name: str, features: int) -> None:
        self.function = _ACTIVATIONS[name]
        self.bias: Any = nn.Parameter((features,))

    def __call__(self, x: ArrayLike, window: Any = None) -> Array:
        total = x + self.bias
        return straight_through(total, self.function(total), window)


class QuantizedLinear(nn.Linear):
    """`y = x Q(W)`, `Q` the nearest of so many levels from −1.5 σ to 1.5 σ.

    `σ = √(2 / in_features)` is the standard deviation of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, levels: int) -> None:
        super().__init__(in_features, out_features)
        self.levels = levels
        self.largest = 1.5 * (2 / in_features) ** 0.5

    def __call__(self, x: ArrayLike, window: Any = None) -> Array:
        stored = pnp.quantize(self.weight, self.levels, -self.largest, self.largest)
        width = None if window is None else window * self.largest
        return pnp.dot(x, straight_through(self.weight, stored, width))


class MLP(nn.Module):
    """`f(… f(x W1 + b1) …) W`: hidden layers with an activation each, a last layer without bias.

    **Arguments:**

    - `features`, `classes`: lengths of an input row and of an output row.
    - `hidden`: the width of each hidden layer.
    - `skip`: the last layer reads the outputs of all hidden layers, concatenated.
    - `activation`: `f`.
    - `weight_levels`: the weights that layers read are the nearest of so many levels, see
      `QuantizedLinear`; 0: they are real numbers.

    Weights start from He's distribution, biases from zero. A `window` makes gradients those of a
    straight-through estimator, see `straight_through`.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        hidden: Sequence[int] = (128,),
        skip: bool = False,
        activation: ActivationName = "relu",
        weight_levels: int = 0,
    ) -> None:
        def dense(inputs: int, outputs: int) -> nn.Linear:
            if weight_levels:
                return QuantizedLinear(inputs, outputs, weight_levels)
            return nn.Linear(inputs, outputs)

        widths = [features, *hidden]
        self.dense = [dense(*pair) for pair in itertools.pairwise(widths)]
        if activation == "relu":
            self.relu = [nn.ReLU(width) for width in hidden]
        else:
            self.activation = [Activation(activation, width) for width in hidden]
        self.skip = skip
        read = sum(hidden) if skip and hidden else widths[-1]
        self.output = dense(read, classes)

    def __call__(self, x: ArrayLike, window: Any = None) -> Array:
        outputs = [x]
        activations = self.relu if hasattr(self, "relu") else self.activation
        for dense, activation in zip(self.dense, activations, strict=True):
            outputs.append(_call(activation, _call(dense, outputs[-1], window), window))
        if self.skip and len(outputs) > 2:
            return _call(self.output, pnp.concatenate(outputs[1:], axis=-1), window)
        return _call(self.output, outputs[-1], window)


def _call(module: nn.Module, x: ArrayLike, window: Any) -> Array:
    """`module(x)`; one that quantizes gets the window."""
    if isinstance(module, (Activation, QuantizedLinear)):
        return module(x, window)
    return module(x)


class CNN(nn.Module):
    """Convolutions of 3 x 3 with stride 2, an activation after each, and a last layer without bias.

    **Arguments:**

    - `shape`: height, width and channels of an image; inputs are rows of their product.
    - `classes`: the length of an output row.
    - `channels`: of each convolution.
    - `activation`: as for `MLP`.

    Weights start from He's distribution, biases from zero.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        channels: Sequence[int] = (32, 64),
        activation: ActivationName = "relu",
    ) -> None:
        self.shape = shape
        height, width, _ = shape
        self.kernel: Any = [
            nn.Parameter((3, 3, *pair), nn.he_normal)
            for pair in itertools.pairwise((shape[-1], *channels))
        ]
        if activation == "relu":
            self.relu = [nn.ReLU(count) for count in channels]
        else:
            self.activation = [Activation(activation, count) for count in channels]
        for _ in channels:
            height, width = -(-height // 2), -(-width // 2)
        self.output = nn.Linear(height * width * (channels[-1] if channels else shape[-1]), classes)

    def __call__(self, x: ArrayLike, window: Any = None) -> Array:
        rows = jnp.shape(x)[0]
        image = jnp.reshape(x, (rows, *self.shape))
        activations = self.relu if hasattr(self, "relu") else self.activation
        for kernel, activation in zip(self.kernel, activations, strict=True):
            image = jax.lax.conv_general_dilated(
                image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            image = _call(activation, image, window)
        return self.output(jnp.reshape(image, (rows, -1)))


class RNN(nn.Module):
    """`h_t = MLP([e(x_t), h_{t−1}])` from `h_0 = 0`; the output at `t` is `h_t W`.

    **Arguments:**

    - `vocabulary`: how many tokens there are; each position's output row has this length.
    - `hidden`, `activation`: of the cell's `MLP`; embeddings `e` and states have the width of its
      last hidden layer.
    - `skip`: the state goes on as `h_t = h_{t−1} + MLP([e(x_t), h_{t−1}])`; the cell's last weights
      start at a tenth of their size, so that it does not grow much.

    Inputs are rows of tokens, as integers or whole floating-point numbers.
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: Sequence[int] = (64,),
        skip: bool = False,
        activation: ActivationName = "relu",
    ) -> None:
        self.width, self.skip = hidden[-1], skip
        self.embedding = nn.Embedding(vocabulary, self.width)
        self.cell = MLP(2 * self.width, self.width, hidden, activation=activation)
        if skip:
            self.cell.output = nn.Linear(
                self.width, self.width, lambda *args: 0.1 * nn.he_normal(*args)
            )
        self.output = nn.Linear(self.width, vocabulary)

    def __call__(self, x: ArrayLike) -> Array:
        tokens = jnp.asarray(x).astype(jnp.int32).T
        start = jnp.zeros((tokens.shape[1], self.width))

        def step(state: Array, embedded: Array) -> tuple[Array, Array]:
            new = self.cell(pnp.concatenate([embedded, state], axis=-1))
            state = state + new if self.skip else new
            return state, state

        _, states = jax.lax.scan(step, start, self.embedding(tokens))
        return self.output(jnp.swapaxes(states, 0, 1))
