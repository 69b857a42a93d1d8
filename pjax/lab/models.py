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

ActivationName = Literal["relu", "tanh", "sigmoid", "gelu", "silu", "sign"]
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sign": jnp.sign,
}


class Activation(nn.Module):
    """`y = f(x + b)`, with a bias that starts at zero.

    **Arguments:**

    - `name`: of `f`.
    - `features`: the length of `b` and of the inputs' last axis.
    """

    def __init__(self, name: str, features: int) -> None:
        self.function = _ACTIVATIONS[name]
        self.bias: Any = nn.Parameter((features,))

    def __call__(self, x: ArrayLike) -> Array:
        return self.function(x + self.bias)


class MLP(nn.Module):
    """`f(… f(x W1 + b1) …) W`: hidden layers with an activation each, a last layer without bias.

    **Arguments:**

    - `features`, `classes`: lengths of an input row and of an output row.
    - `hidden`: the width of each hidden layer.
    - `skip`: the last layer reads the outputs of all hidden layers, concatenated.
    - `activation`: `f`.

    Weights start from He's distribution, biases from zero.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        hidden: Sequence[int] = (128,),
        skip: bool = False,
        activation: ActivationName = "relu",
    ) -> None:
        widths = [features, *hidden]
        self.dense = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        if activation == "relu":
            self.relu = [nn.ReLU(width) for width in hidden]
        else:
            self.activation = [Activation(activation, width) for width in hidden]
        self.skip = skip
        read = sum(hidden) if skip and hidden else widths[-1]
        self.output = nn.Linear(read, classes)

    def __call__(self, x: ArrayLike) -> Array:
        outputs = [x]
        activations = self.relu if hasattr(self, "relu") else self.activation
        for dense, activation in zip(self.dense, activations, strict=True):
            outputs.append(activation(dense(outputs[-1])))
        if self.skip and len(outputs) > 2:
            return self.output(pnp.concatenate(outputs[1:], axis=-1))
        return self.output(outputs[-1])


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

    def __call__(self, x: ArrayLike) -> Array:
        rows = jnp.shape(x)[0]
        image = jnp.reshape(x, (rows, *self.shape))
        activations = self.relu if hasattr(self, "relu") else self.activation
        for kernel, activation in zip(self.kernel, activations, strict=True):
            image = activation(
                jax.lax.conv_general_dilated(
                    image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
        return self.output(jnp.reshape(image, (rows, -1)))
