"""Layer splitting: a product of arrays and what is added to it are one constraint.

`y = Σ_j s_j B_j(l_j, r_j) + Σ_i c_i x_i (+ const)` with any bilinear operations `B_j` is one node,
whatever the sizes: its operands have no copies. A dense layer with its bias is one, and so are the
sum of two products in a recurrent cell, and a product of two activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.options import Exactness
from pjax.projections import layer, scaling
from pjax.projections.products.convolution import Convolution
from pjax.projections.products.operation import Multiply
from pjax.rules.base import Force, Geometry, Reference, Rule
from pjax.rules.layer_terms import (
    SIDES,
    Addend,
    Product,
    addend_gain,
    addend_map,
    broadcast_axes,
    product_gain,
    product_maps,
    transpose_of,
)


@dataclass(frozen=True)
class LayerSum(Rule):
    """A sum of bilinear and linear parts, with one multiplier for each output entry.

    One Gauss-Newton step of `argmin Σ ρ|x' − x|² + W |f(x') − z|²`, see
    `pjax.projections.layer`; the output is the sum at the new operands. Exact where at most one
    operand of each product moves and conjugate gradients have converged.
    """

    exactness: ClassVar[Exactness] = "inexact"

    terms: tuple[Product | Addend, ...]
    name: str = "dot"

    @property
    def accepts_unmoved(self) -> bool:
        return True

    def _operands(self, slots: Sequence[Any], knowns: Sequence[Any]) -> list[tuple[Any, ...]]:
        """For each term its operands, slots and data in their places."""
        slot, known = iter(slots), iter(knowns)
        operands: list[tuple[Any, ...]] = []
        for term in self.terms:
            if isinstance(term, Product):
                operands.append(tuple(next(slot if free else known) for free in term.is_slot))
            else:
                operands.append((next(slot), [next(known) for _ in term.term.factors]))
        return operands

    def project(self, reference, states, weights, target, target_weight):
        geometry = reference.geometry
        exponent = geometry.exponent
        # The values that operands have now; a state that rests is None, and costs nothing.
        current = [
            value if state is None else value + scaling.from_unit(state, exponent)
            for value, state in zip(reference.inputs, states, strict=True)
        ]
        at = self._operands(current, reference.knowns)
        before = self._operands(reference.inputs, reference.knowns)
        deviations = self._operands(states, reference.knowns)
        value = None
        if any(state is not None for state in states):
            value = self._deviation(before, at, deviations, target)
        parts = self._parts(at, weights, geometry, target)
        target_weight = scaling.number(target_weight, target.dtype)
        request = target if value is None else target - value
        moves, change, forces = layer.solve(
            parts, request, target_weight, geometry.iterations, reference.force
        )
        second, is_free = self._second_order(moves, geometry)
        if second is not None and not is_free:
            # A bounded or resting operand moves little: the product of the moves is not in the way.
            change = change + second
        elif second is not None:
            energy = sum(
                (jnp.sum(part.weight * move**2) for part, move in zip(parts, moves, strict=True)),
                start=jnp.zeros((), target.dtype),
            )
            length = layer.step_length(energy, change, second, request, target_weight)
            moves = tuple(length * move for move in moves)
            forces = (None,) * len(moves)
            change = length * change + length**2 * second
        moved = []
        for state, move, force in zip(states, moves, forces, strict=True):
            if state is not None:
                moved.append(state + move)
            else:
                moved.append(move if force is None else Force(force))
        return tuple(moved), change if value is None else value + change

    def force(self, geometry: Geometry, target: Array, target_weight: Any) -> Array:
        """The multiplier `Λ` of a projection whose operands begin at rest and are all bounded."""
        shift: Any = sum(c for c, curved in zip(geometry.compliances, geometry.curved, strict=True)
                         if not curved)  # fmt: skip
        target_weight = scaling.number(target_weight, target.dtype)
        return scaling.times(target_weight / (1 + target_weight * shift), target)

    def operand_beside(self, place: int, reference: Reference) -> Array:
        """The other operand of the product that slot number `place` is part of."""
        count = 0
        for term, operands in zip(
            self.terms, self._operands(reference.inputs, reference.knowns), strict=True
        ):
            if isinstance(term, Addend):
                count += 1
                continue
            for side, free in enumerate(term.is_slot):
                if free:
                    if count == place:
                        return term.scale * operands[1 - side]
                    count += 1
        raise IndexError(place)

    def diagonal(self, place: int, reference: Reference, asked: Array) -> Array:
        """A diagonal `D ≥ JᵀA J` of the map from slot number `place` to the output.

        **Arguments:**

        - `asked`: `A`, 1 for each output entry that counts, else 0.
        """
        count = 0
        for term, now in zip(
            self.terms, self._operands(reference.inputs, reference.knowns), strict=True
        ):
            if isinstance(term, Addend):
                if count == place:
                    # Of a matrix of one sign the sums of the rows of `JᵀJ` bound it.
                    apply = addend_map(term, now[1], asked)
                    ones = asked * apply(jnp.ones_like(now[0]))
                    return jnp.abs(transpose_of(apply, now[0])(ones))
                count += 1
                continue
            for side, free in zip(SIDES, term.is_slot, strict=True):
                if not free:
                    continue
                if count == place:
                    op, scale = term.operation, term.scale
                    left, right = now
                    if side == "left":
                        squares = op.transpose_left(asked, jnp.square(right))
                    else:
                        squares = op.transpose_right(asked, jnp.square(left))
                    return scale**2 * op.slice_length * squares
                count += 1
        raise IndexError(place)

    def _deviation(self, before: Any, at: Any, deviations: Any, like: Array) -> Array:
        """`f(reference + deviation) − f(reference)`, without forming either."""
        total = jnp.zeros_like(like)
        for term, ref, now, dev in zip(self.terms, before, at, deviations, strict=True):
            if isinstance(term, Addend):
                if dev[0] is not None:
                    total = total + addend_map(term, now[1], like)(dev[0])
                continue
            op = term.operation
            if term.left and dev[0] is not None:
                total = total + term.scale * op(dev[0], now[1])
            if term.right and dev[1] is not None:
                total = total + term.scale * op(ref[0], dev[1])
        return total

    def _parts(self, at: Any, weights: Any, geometry: Any, like: Array) -> list[layer.Part]:
        linear = []
        for term, now in zip(self.terms, at, strict=True):
            if isinstance(term, Addend):
                apply = addend_map(term, now[1], like)
                linear.append((apply, transpose_of(apply, now[0])))
                continue
            for side, free in zip(SIDES, term.is_slot, strict=True):
                if free:
                    linear.append(product_maps(term, side, now))
        return [
            layer.Part(apply, transpose, weight, compliance, curved)
            for (apply, transpose), weight, compliance, curved in zip(
                linear, weights, geometry.compliances, geometry.curved, strict=True
            )
        ]

    def _second_order(
        self, moves: Sequence[Array], geometry: Geometry
    ) -> tuple[Array | None, bool]:
        """`Σ s B(δl, δr)` in the node's unit, over products both of whose operands are slots; and
        whether both operands of one of them move as they like.
        """
        move, curved = iter(moves), iter(geometry.curved)
        total, is_free = None, False
        for term in self.terms:
            if isinstance(term, Addend):
                next(move)
                next(curved)
                continue
            pair = [next(move) if free else None for free in term.is_slot]
            kinds = [next(curved) for free in term.is_slot if free]
            if pair[0] is not None and pair[1] is not None:
                left = scaling.from_unit(pair[0], geometry.exponent)
                part = term.scale * term.operation(left, pair[1])
                total = part if total is None else total + part
                is_free |= all(kinds)
        return total, is_free

    def steadied(self, request: Array, shapes: Sequence[tuple[int, ...]]) -> Array:
        """`(1 − (1 − 1/p) Π) g` for each bias that `p` places of a convolution's output share, with
        `Π` the mean over all that it is shared by; elsewhere `p` is 1, and it is `g`.

        Thresholds ask for each entry as if it moved alone, and by a bias all `p` move at once:
        blank places have equal values, and would cross together. Solved for, weights are nearly
        blind to the mean; so it is the biases that are asked for less.

        **Arguments:**

        - `request`: `g`, in the shape of the output.
        - `shapes`: of the node's slots.
        """
        operations = (term.operation for term in self.terms if isinstance(term, Product))
        places = {
            axis
            for operation in operations
            if isinstance(operation, Convolution)
            for axis in operation.dimension_numbers[2][2:]
        }
        shape = iter(shapes)
        for term in self.terms:
            if isinstance(term, Product):
                for free in term.is_slot:
                    if free:
                        next(shape)
                continue
            shape_of_slot = next(shape)
            if term.dimensions is None:
                continue
            differs = {axis for axis, _ in broadcast_axes(term, shape_of_slot)}
            shared = tuple(axis for axis in range(request.ndim) if axis not in differs)
            count = math.prod(request.shape[axis] for axis in shared if axis in places)
            if count > 1:
                mean = jnp.mean(request, axis=shared, keepdims=True)
                request = request - (1 - 1 / count) * mean
        return request

    def copies(self, shapes):
        counts_of_slots: list[int] = []
        shape = iter(shapes)
        for term in self.terms:
            if isinstance(term, Addend):
                size = math.prod(next(shape))
                repeats = math.prod(term.shape) // max(size, 1) if term.shape else 1
                counts_of_slots.append(repeats if term.dimensions is not None else 1)
                continue
            counts = (term.operation.left_copies, term.operation.right_copies)
            for count, free in zip(counts, term.is_slot, strict=True):
                if free:
                    next(shape)
                    counts_of_slots.append(int(np.max(count)))
        return tuple(counts_of_slots)

    def gains(self, reference, wanted, vectors):
        bounds = []
        vector, want = iter(vectors), iter(wanted)
        values = (
            self._operands(slots, reference.knowns)
            for slots in (reference.inputs, reference.entries or reference.inputs)
        )
        for term, now, entries in zip(self.terms, *values, strict=True):
            if isinstance(term, Addend):
                next(vector)
                next(want)
                bounds.append(addend_gain(term, now[1], now[0].shape))
                continue
            operands = entries if isinstance(term.operation, Multiply) else now
            for side, free in zip(SIDES, term.is_slot, strict=True):
                if free:
                    start = next(vector)
                    bounds.append(product_gain(term, side, operands, start) if next(want) else 0.0)
        return tuple(bounds)
