"""The networks that the laboratory trains."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jaxtyping import Array, ArrayLike

from pjax import nn
from pjax import numpy as pnp


class MLP(nn.Module):
    """`relu(… relu(x W1 + b1) …) W`: hidden layers with a relu each and a last layer without bias.

    **Arguments:**

    - `features`, `classes`: lengths of an input row and of an output row.
    - `hidden`: the width of each hidden layer.
    - `skip`: the last layer reads the outputs of all hidden layers, concatenated.

    Weights start from He's distribution, biases from zero.
    """

    def __init__(
        self, features: int, classes: int, hidden: Sequence[int] = (128,), skip: bool = False
    ) -> None:
        widths = [features, *hidden]
        self.dense = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        self.relu = [nn.ReLU(width) for width in hidden]
        self.skip = skip
        read = sum(hidden) if skip and hidden else widths[-1]
        self.output = nn.Linear(read, classes)

    def __call__(self, x: ArrayLike) -> Array:
        outputs = [x]
        for dense, relu in zip(self.dense, self.relu, strict=True):
            outputs.append(relu(dense(outputs[-1])))
        if self.skip and len(outputs) > 2:
            return self.output(pnp.concatenate(outputs[1:], axis=-1))
        return self.output(outputs[-1])
