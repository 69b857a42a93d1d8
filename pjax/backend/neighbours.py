"""A row of equal things along the first axis of arrays, on one device or shared out in order to
the devices along an axis of a mesh; and what neighbours in it exchange.

Code for one of them runs under `jax.vmap`, which makes it code for all that a device has, within
`jax.shard_map`. Then an exchange moves entries along the first axis, and between devices only
those at the borders, one of each array.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array


@dataclass(frozen=True)
class Neighbours:
    """A row with something before it and something behind it.

    **Attributes:**

    - `axis`: the axis of `jax.shard_map` along which it is shared out; None on one device.
    - `devices`: how many devices that axis has.
    """

    axis: str | None = None
    devices: int = 1

    # What is before the row is on its first device, what is behind it on the last one.

    def at_start(self, function: Callable[[], Any]) -> Any:
        """`function()` on the first device, zeros on the others."""
        return self._at(0, function)

    def at_end(self, function: Callable[[], Any]) -> Any:
        """`function()` on the last device, zeros on the others."""
        return self._at(self.devices - 1, function)

    def _at(self, device: int, function: Callable[[], Any]) -> Any:
        if self.axis is None:
            return function()

        def zeros() -> Any:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function))

        return lax.cond(lax.axis_index(self.axis) == device, function, zeros)

    def over_devices(self, tree: Any) -> Any:
        """The sum over all devices."""
        return tree if self.axis is None else lax.psum(tree, self.axis)

    # For one of the row. `number` is its own on the device: an array that `jax.vmap` maps, so that
    # these are exchanges also of what is equal in all.

    def forward(self, number: Array, own: Array, before: Array) -> tuple[Array, Array]:
        """What the one before has for its own, the first what is `before` the row; and what the
        last one has for its own, on the last device.
        """
        return self._shifted(number, own, before, 1)

    def back(self, number: Array, own: Array, behind: Array) -> tuple[Array, Array]:
        """What the one behind has for its own, the last what is `behind` the row; and what the
        first one has for its own, on the first device.
        """
        return self._shifted(number, own, behind, -1)

    def _shifted(self, number: Array, own: Array, beyond: Array, by: int) -> tuple[Array, Array]:
        """`own` of the neighbour, at one end of the row what is `beyond` it; and what leaves the
        row at the other end. `by` is 1 or −1.
        """

        @custom_vmap
        def exchange(number: Array, own: Array, beyond: Array) -> tuple[Array, Array]:
            return beyond, own

        @exchange.def_vmap
        def _(size: int, mapped: Any, number: Array, own: Array, beyond: Array) -> Any:
            own, came = _of_each(size, mapped[1], own), beyond
            leaves = own[-1] if by == 1 else own[0]
            if self.axis is not None:
                sent = lax.ppermute(leaves, self.axis, self._pairs(by))
                end = 0 if by == 1 else self.devices - 1
                came = jnp.where(lax.axis_index(self.axis) == end, beyond, sent)
            row = [came[None], own[:-1]] if by == 1 else [own[1:], came[None]]
            return (jnp.concatenate(row), leaves), (True, False)

        return exchange(number, own, beyond.astype(own.dtype))

    def _pairs(self, by: int) -> list[tuple[int, int]]:
        """Which device sends to which, in a shift by one."""
        every = range(self.devices)
        return [(i, i + by) for i in every if i + by in every]

    def total(self, number: Array, own: Array) -> Array:
        """The sum over those on this device."""

        @custom_vmap
        def add(number: Array, own: Array) -> Array:
            return own

        @add.def_vmap
        def _(size: int, mapped: Any, number: Array, own: Array) -> Any:
            return jnp.sum(_of_each(size, mapped[1], own), 0), False

        return add(number, own)

    # For all of the row on this device.

    def through(
        self, step: Callable[[Any, Any], tuple[Any, Any]], start: Any, stacked: Any
    ) -> tuple[Any, Any]:
        """`x, row ← step(x, entry)` through the whole row, each device in its turn.

        **Arguments:**

        - `start`: what the first one gets.
        - `stacked`: the entries of those on this device, along the first axis of arrays.

        **Returns:** what came out of the last of those on this device, and their rows, stacked.
        """

        def here(x: Any) -> tuple[Any, Any]:
            return lax.scan(step, x, stacked)

        if self.axis is None:
            return here(start)
        own, axis = lax.axis_index(self.axis), self.axis

        def turn(device: Array, carry: Any) -> Any:
            x, done = carry
            done = lax.cond(own == device, lambda: here(x), lambda: done)
            sent = lax.ppermute(done[0], axis, self._pairs(1))
            return jnp.where(own == device + 1, sent, x), done

        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(here, start))
        _, done = lax.fori_loop(0, self.devices, turn, (start, nothing))
        return done


def _of_each(size: int, mapped: bool, array: Array) -> Array:
    """The entries of all, where one stands for them."""
    return array if mapped else jnp.broadcast_to(array, (size, *array.shape))


__all__ = ["Neighbours"]
