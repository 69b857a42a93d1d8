"""The interface of the paper's library: modules, named parameters and `update`."""

from __future__ import annotations

import jax

import pjax
from pjax import nn
from pjax.lab.data import batch_rows, load


class Network(nn.Module):
    """A convolution, a relu and a dense layer."""

    def __init__(self) -> None:
        self.conv1 = nn.Conv2D(1, 8, kernel_size=3, stride=2)
        self.relu1 = nn.ReLU(8)
        self.dense1 = nn.Linear(8 * 16, 10)

    def __call__(self, images):
        x = self.relu1(self.conv1(images))
        return self.dense1(pjax.reshape(x, (x.shape[0], -1)))


digits = load("digits")
model = Network()
params = model.init(jax.random.key(0))
print({name: value.shape for name, value in params.items()})

optimizer = pjax.optim.DouglasRachford(steps_per_update=20)
for step, rows in zip(range(10), batch_rows(len(digits.train), 64, seed=0), strict=False):
    x = pjax.array(digits.train.x[rows].reshape(-1, 8, 8, 1), name="images")
    y = pjax.array(jax.nn.one_hot(digits.train.y[rows], 10), name="labels")
    params, residual = optimizer.update(
        lambda p, x=x, y=y: pjax.cross_entropy(model.apply(p, x), y), params
    )
    print(f"batch {step + 1}: residual {residual:.3f}")

outputs = model.apply(params, digits.test.x.reshape(-1, 8, 8, 1))
accuracy = (outputs.argmax(-1) == digits.test.y).mean()
print(f"test accuracy: {accuracy:.1%}")
assert accuracy > 0.6
