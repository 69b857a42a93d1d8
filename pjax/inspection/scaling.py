"""What a batch costs on many devices: products, bytes sent, bytes kept, idle time.

A model of dense networks, in numbers that are counted from compiled programs (the tests do): it
tells which way of training fits a machine before there is one.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from pjax.training.requests import Requests

#: Products of a layer's size: forward, force on the inputs, force on the weights.
_STEP = 3
#: A stage that waits for its request makes its output again when it comes.
_AGAIN = 1

Way = Literal["data", "sharded", "pipelined"]


class Network(NamedTuple):
    """Equal dense layers.

    **Attributes:**

    - `layers`, `width`: how many, and of how many inputs and outputs.
    - `batch`: rows.
    - `itemsize`: bytes of a number.
    """

    layers: int
    width: int
    batch: int
    itemsize: int = 4

    @property
    def weights(self) -> int:
        """Bytes of the parameters."""
        return self.layers * self.width * (self.width + 1) * self.itemsize

    @property
    def activations(self) -> int:
        """Bytes of one layer's outputs for a batch."""
        return self.batch * self.width * self.itemsize

    @property
    def solve(self) -> int:
        """Operations of one layer's solve: thin products with the eigenvectors of its inputs and
        outputs, forth and back.
        """
        rule = Requests()
        return 4 * (rule.rank + rule.output_rank) * self.width**2

    @property
    def product(self) -> int:
        """Operations of one layer's product with a batch."""
        return 2 * self.batch * self.width**2


class Machine(NamedTuple):
    """Devices of one kind.

    **Attributes:**

    - `operations`: of one device, a second.
    - `bandwidth`: bytes that a device sends, a second.
    - `latency`: seconds until the first byte of a message is there.
    """

    operations: float
    bandwidth: float
    latency: float


class ScalingCost(NamedTuple):
    """One batch, for the device that has the most to do.

    **Attributes:**

    - `operations`: of the batch's products and of the solves, which all devices that share the rows
        of a layer repeat; two for each multiplication and addition.
    - `sent`: bytes that it sends.
    - `messages`: that wait for each other.
    - `kept`: bytes of parameters, memory of requests, last moves, and activations.
    - `idle`: the share of the device-seconds of products in which devices wait for the slowest.
    - `delay`: how many batches old a request can be.
    """

    operations: float
    sent: float
    messages: int
    kept: float
    idle: float
    delay: int

    def seconds(self, machine: Machine) -> float:
        """The time of a batch; of a pipeline messages and products overlap."""
        compute = self.operations / machine.operations
        send = self.sent / machine.bandwidth + self.messages * machine.latency
        return max(compute, send) if self.delay else compute + send


def scaling_cost(
    network: Network, way: Way, devices: int, stages: int | None = None
) -> ScalingCost:
    """What one batch of pure projection costs on many devices.

    - `"data"`: each device has all parameters and a share of the rows; the sums of forces on all
      weights are added once, by a ring: each device sends `2 (P − 1)/P` of their bytes.
    - `"sharded"`: rows and parameters are shared out; weights are gathered for the forward pass and
      for the sweep, and sums of forces are added where the weights are: three times `(P − 1)/P`.
    - `"pipelined"`: each stage has a share of the layers; it sends outputs to the stage behind and
      requests to the one before. With more devices than stages each stage is done by several, that
      share the rows of its batch and add its sums of forces.

    **Arguments:**

    - `devices`: `P`.
    - `stages`: of a pipeline; by default one for each device, but at most one for each layer.

    **Raises:** `ValueError` for an unknown way, and for numbers that do not divide each other as
    they must.

    ```python
    network = pjax.inspection.Network(layers=64, width=4096, batch=2048)
    pjax.inspection.scaling_cost(network, "pipelined", 64).sent
    ```
    """
    if devices < 1:
        raise ValueError(f"`devices` must be at least 1, got {devices}.")
    n = network
    if way == "pipelined":
        return _pipelined(n, devices, min(devices, n.layers) if stages is None else stages)
    if way not in ("data", "sharded"):
        raise ValueError(f'`way` must be "data", "sharded" or "pipelined", got {way!r}.')
    _require_rows(n, devices)
    if stages is not None:
        raise ValueError(f'`stages` are of `way="pipelined"`, and not of {way!r}.')
    share = (devices - 1) / devices
    split = devices if way == "sharded" else 1
    operations = n.layers * (_STEP * n.product / devices + n.solve / split)
    kept = 3 * n.weights / split + n.layers * n.activations / devices
    times = 2 if way == "data" else 3
    rounds = 2 * math.ceil(math.log2(devices)) if way == "data" else 3 * n.layers
    return ScalingCost(
        operations, times * share * n.weights, rounds if devices > 1 else 0, kept, 0.0, 0
    )


def _require_rows(n: Network, shares: int) -> None:
    if shares > n.batch:
        raise ValueError(f"A batch of {n.batch} rows cannot be shared out to {shares} devices.")


def _pipelined(n: Network, devices: int, stages: int) -> ScalingCost:
    if not 1 <= stages <= n.layers:
        raise ValueError(
            f"`stages` must be from 1 to the {n.layers} layers of the network, got {stages}."
        )
    if devices % stages:
        raise ValueError(f"{stages} stages cannot share {devices} devices evenly.")
    replicas, delay = devices // stages, 2 * (stages - 1)
    _require_rows(n, replicas)
    least, more = divmod(n.layers, stages)
    # The last stage, which does not wait for its request, has no more layers than others.
    layers = [least + (number < more) for number in range(stages)]
    again = [_AGAIN] * (stages - 1) + [0]
    work = [
        own * ((_STEP + more) * n.product / replicas + n.solve)
        for own, more in zip(layers, again, strict=True)
    ]
    share = (replicas - 1) / replicas
    own = max(layers) / n.layers * n.weights
    messages = (2 if stages > 1 else 0) + (2 * math.ceil(math.log2(replicas)))
    edges = 2 * n.activations / replicas if stages > 2 else 0.0
    if stages == 2:  # each end sends one way
        edges = n.activations / replicas
    # Inputs, and outputs beside which a request is met, of the batches on their way.
    waiting = 2 * delay * n.activations / replicas
    kept = 3 * own + waiting + max(layers) * n.activations / replicas
    idle = 1 - sum(work) / (stages * max(work))
    return ScalingCost(max(work), edges + 2 * share * own, messages, kept, idle, delay)


__all__ = ["Machine", "Network", "ScalingCost", "Way", "scaling_cost"]
