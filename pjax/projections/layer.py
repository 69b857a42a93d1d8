"""Nearest points of a sum of linear parts, one constraint for the whole array (layer splitting).

A node `y = Σ_s f_s(x_s)`, each part linear in its operand at the current point, is projected as

    argmin  Σ_s ρ_s |δ_s|² + Σ_i W_i (Σ_s J_s δ_s − R)_i²

over the moves `δ_s` of all operands at once: no copy of any entry exists, so that a state holds one
number for each entry whatever the algorithm. With the multiplier `Λ` it is `δ_s = J_sᵀΛ/ρ_s` and
`Λ/W + Σ_s J_s J_sᵀ Λ/ρ_s = R`. Two kinds of parts take part in that system:

- *curved*: `J_s J_sᵀ` as it is, by conjugate gradients;
- *diagonal*: a bound `λ_s` on it in its place, exact where `J_s J_sᵀ` is that multiple of the
  identity; else the step is a contraction, and iterated projections meet the nearest point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pjax.projections import scaling


class Part(NamedTuple):
    """One operand of the sum.

    **Attributes:**

    - `apply`: `J δ`, in the shape of the output.
    - `transpose`: `Jᵀ Λ`, in the shape of the operand.
    - `weight`: `ρ > 0`, a scalar or an array that broadcasts to the operand.
    - `compliance`: `λ/ρ` with `λ ≥ ‖J‖²`, for a diagonal part.
    - `curved`: which of the two kinds it is.
    """

    apply: Callable[[Array], Array]
    transpose: Callable[[Array], Array]
    weight: Any
    compliance: Any
    curved: bool

    def pull(self, force: Array) -> Array:
        """`Jᵀ Λ/ρ`."""
        # Divided at last: so all parts read one array, and what comes next divides on its way.
        return self.transpose(force) / self.weight

    def response(self, force: Array) -> Array:
        """`J Jᵀ Λ/ρ`."""
        return self.apply(self.pull(force))


class Solution(NamedTuple):
    """What `solve` finds.

    **Attributes:**

    - `moves`: `δ_s` of each part.
    - `change`: `Σ J_s δ_s`.
    - `forces`: `ρ_s δ_s = J_sᵀ Λ` of each diagonal part; None of a curved one.
    """

    moves: tuple[Array, ...]
    change: Array
    forces: tuple[Array | None, ...]


def solve(
    parts: Sequence[Part],
    request: Array,
    target_weight: Any,
    iterations: int,
    force: Array | None = None,
) -> Solution:
    """`argmin_δ Σ_s ρ_s |δ_s|² + Σ_i W_i (Σ_s J_s δ_s − R)_i²`.

    **Arguments:**

    - `parts`: the operands.
    - `request`: `R`, in the shape of the output.
    - `target_weight`: `W ≥ 0`, broadcasting to the output; 0 where nothing is asked.
    - `iterations`: steps of conjugate gradients on the curved parts. Each decreases the objective;
        with fewer than the rank the result is a regularised one, and inexact.
    - `force`: the multiplier of the diagonal parts, where it is known.

    **Returns:** a `Solution`.
    """
    shift: Any = 0.0
    for part in parts:
        if not part.curved:
            shift = shift + part.compliance
    stiffness = target_weight / (1 + target_weight * shift)
    curved = [part for part in parts if part.curved]
    if curved:
        found, change = _conjugate_gradients(curved, request, stiffness, iterations)
    else:
        found, change = [], None
    if force is None:
        force = scaling.times(stiffness, request if change is None else request - change)
        if len(parts) > 1:
            force = scaling.once(force)
    inner = iter(found)
    moves, forces = [], []
    for part in parts:
        if part.curved:
            moves.append(next(inner))
            forces.append(None)
        else:
            pulled = part.transpose(force)
            move = pulled / part.weight
            applied = part.apply(move)
            change = applied if change is None else change + applied
            moves.append(move)
            forces.append(pulled)
    change = jnp.zeros_like(request) if change is None else change
    return Solution(tuple(moves), change, tuple(forces))


def _conjugate_gradients(
    parts: Sequence[Part], request: Array, stiffness: Any, iterations: int
) -> tuple[list[Array], Array]:
    """Minimises `Σ ρ|δ|² + Σ ω (J δ − R)²` over the moves: monotone in the objective.

    Every vector of the method is `Jᵀ a/ρ` for an array `a` of the output's shape, so it is the
    `a` that are kept, and each step needs one response `J ρ⁻¹ Jᵀ a`. In units of the largest
    request, whose square might underflow.
    """
    size = jnp.max(jnp.abs(request))
    size = jnp.where(size > 0, size, 1)

    def response(force: Array) -> Array:
        total = parts[0].response(force)
        for part in parts[1:]:
            total = total + part.response(force)
        return total

    gradient = stiffness * (request / size)
    image = response(gradient)
    gamma = jnp.sum(gradient * image)
    direction, force, change = gradient, jnp.zeros_like(request), jnp.zeros_like(request)
    length = gamma  # of the direction: the gradients that follow are orthogonal to it
    for count in range(iterations):
        weighed = stiffness * image
        curvature = length + jnp.sum(image * weighed)
        rate = gamma / jnp.where(curvature > 0, curvature, 1)
        force = force + rate * direction
        change = change + rate * image
        if count + 1 == iterations:
            break
        gradient = gradient - rate * direction - rate * weighed
        pulled = response(gradient)
        new = jnp.sum(gradient * pulled)
        ratio = new / jnp.where(gamma > 0, gamma, 1)
        direction, image, gamma = gradient + ratio * direction, pulled + ratio * image, new
        length = new + ratio**2 * length
    return [part.pull(size * force) for part in parts], size * change


#: Step lengths tried by `step_length`: evenly spaced, and geometric towards 0.
_LENGTHS = tuple(sorted({k / 64 for k in range(1, 65)} | {2.0**-k for k in range(7, 30)}))


def step_length(
    energy: Array, change: Array, second: Array, request: Array, target_weight: Any
) -> Array:
    """`τ` in (0, 1] that minimises `τ² Σρ|δ|² + Σ W (τ Jδ + τ² Q − R)²`: a quartic.

    A large request makes a step of the linearised problem too long: the product of the moves of
    two operands, `Q`, grows with its square.

    **Arguments:**

    - `energy`: `Σ ρ |δ|²`.
    - `change`, `second`: `Jδ` and `Q`.
    - `request`, `target_weight`: `R` and `W`.
    """
    size = jnp.max(jnp.abs(request))
    size = jnp.where(size > 0, size, 1)
    energy, change, second, request = (
        energy / size**2, change / size, second / size, request / size,
    )  # fmt: skip
    fourth = jnp.sum(target_weight * second**2)
    third = 2 * jnp.sum(target_weight * change * second)
    square = energy + jnp.sum(target_weight * (change**2 - 2 * second * request))
    first = -2 * jnp.sum(target_weight * change * request)

    def value(t: Array) -> Array:
        return t * (first + t * (square + t * (third + t * fourth)))

    lengths = jnp.asarray(_LENGTHS, request.dtype)
    best = lengths[jnp.argmin(value(lengths))]
    slope = first + best * (2 * square + best * (3 * third + best * 4 * fourth))
    curvature = 2 * square + best * (6 * third + best * 12 * fourth)
    refined = jnp.clip(best - slope / jnp.where(curvature > 0, curvature, jnp.inf), 0, 1)
    return jnp.where(value(refined) < value(best), refined, best)
