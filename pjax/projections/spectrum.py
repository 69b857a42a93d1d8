"""Second moments by their largest eigenvectors: what a solve needs of `XᵀX`, at a small part of its
cost.

A matrix `C` is kept as `U diag(λ) Uᵀ + μ (I − U Uᵀ)`: its largest eigenvalues with their
eigenvectors, and the mean of the others. A memory of many batches never forms `XᵀX`: it is renewed
by products of `X` with a few columns.

```python
>>> import jax.numpy as jnp
>>> from pjax.projections import spectrum
>>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
>>> memory = spectrum.empty(2, 1, jnp.float32)
>>> for _ in range(4):
...     memory = spectrum.renew(memory, lambda u: x.T @ (x @ u), jnp.sum(x**2), keep=0.0)
>>> [round(float(value), 3) for value in (memory.values[0], memory.rest)]
[9.0, 1.0]

```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Spectrum(NamedTuple):
    """`C ≈ U diag(λ) Uᵀ + μ (I − U Uᵀ)`, or one such matrix for each block.

    **Attributes:**

    - `vectors`: `U`, orthonormal columns.
    - `values`: `λ ≥ 0`, about the largest eigenvalues.
    - `rest`: `μ ≥ 0`, the mean of all others; 0 where there are none.
    """

    vectors: Float[Array, "*blocks size rank"]
    values: Float[Array, "*blocks rank"]
    rest: Float[Array, "*blocks"]

    @property
    def trace(self) -> Float[Array, "*blocks"]:
        """`tr C`."""
        size, rank = self.vectors.shape[-2:]
        return jnp.sum(self.values, axis=-1) + (size - rank) * self.rest

    @property
    def largest(self) -> Float[Array, "*blocks"]:
        """The largest eigenvalue."""
        return jnp.maximum(jnp.max(self.values, axis=-1), self.rest)


def empty(size: int, rank: int, dtype: Any, blocks: tuple[int, ...] = ()) -> Spectrum:
    """The spectrum of 0, with directions to begin with: fixed ones, that no input is likely to be
    orthogonal to.

    **Arguments:**

    - `size`: of the matrix.
    - `rank`: how many eigenvectors, at most `size`.
    - `blocks`: the shape of a stack of such matrices.
    """
    rank = min(rank, size)
    start, _ = np.linalg.qr(np.random.default_rng(size).normal(size=(size, rank)))
    return Spectrum(
        jnp.broadcast_to(jnp.asarray(start, dtype), (*blocks, size, rank)),
        jnp.zeros((*blocks, rank), dtype),
        jnp.zeros(blocks, dtype),
    )


def renew(
    before: Spectrum,
    times: Callable[[Array], Array],
    trace: Array,
    keep: Any,
    iterations: Any = 1,
) -> Spectrum:
    """The spectrum of `keep · before + (1 − keep) · C`.

    By subspace iteration, with the eigenvalues that `C` has within the subspace (Rayleigh-Ritz):
    where the rank is the size the result is exact, else it converges with every product.

    **Arguments:**

    - `times`: `U ↦ C U`.
    - `trace`: `tr C`.
    - `keep`: in [0, 1).
    - `iterations`: how many products, at least 1; a number, also a traced one.
    """
    size, rank = before.vectors.shape[-2:]

    def step(_: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
        vectors = found[0]
        product = keep * _function(before, vectors, lambda value: value)
        product = product + (1 - keep) * times(vectors)
        inside = jnp.swapaxes(vectors, -1, -2) @ product
        values, turn = jnp.linalg.eigh((inside + jnp.swapaxes(inside, -1, -2)) / 2)
        # The largest first, which are then the ones that others are made orthogonal to.
        values, turn = jnp.maximum(values[..., ::-1], 0), turn[..., ::-1]
        if rank == size:
            return vectors @ turn, values
        return jnp.linalg.qr(product @ turn)[0], values

    start = before.vectors, before.values
    once = isinstance(iterations, int) and iterations == 1
    vectors, values = step(0, start) if once else jax.lax.fori_loop(0, iterations, step, start)
    rest = jnp.zeros_like(before.rest)
    if rank < size:
        total = keep * before.trace + (1 - keep) * trace
        rest = (jnp.maximum(total - jnp.sum(values, axis=-1), 0) / (size - rank)).astype(rest.dtype)
    return Spectrum(vectors, values, rest)


def solve(
    spectrum: Spectrum, matrix: Float[Array, "*blocks size columns"], damping: Any
) -> Float[Array, "*blocks size columns"]:
    """`(C + ρ)⁻¹ M`; 0 in directions in which `C + ρ` is 0.

    **Arguments:**

    - `matrix`: `M`.
    - `damping`: `ρ ≥ 0`, one for each block.
    """
    damping = jnp.asarray(damping)[..., None]
    return _function(spectrum, matrix, lambda value: inverse(value + damping))


def equalise(
    spectrum: Spectrum, matrix: Float[Array, "*blocks rows size"], damping: float
) -> Float[Array, "*blocks rows size"]:
    """`M (C/c + δ)^-½` with `c` the mean eigenvalue, times a factor that keeps the size of rows
    whose second moment is `C`.

    **Arguments:**

    - `matrix`: `M`; its rows are what is equalised.
    - `damping`: `δ > 0`; as it grows, the result tends to `M`.
    """
    size, rank = spectrum.vectors.shape[-2:]
    scale = inverse(spectrum.trace / size)[..., None]

    def root(value: Array) -> Array:
        return 1 / jnp.sqrt(value * scale + damping)

    rest = spectrum.rest[..., None]
    left = jnp.sum(spectrum.values * root(spectrum.values) ** 2, axis=-1, keepdims=True)
    left = left + (size - rank) * rest * root(rest) ** 2
    norm = jnp.where(left > 0, jnp.sqrt(spectrum.trace[..., None] * inverse(left)), 1)
    values = root(spectrum.values)[..., None, :]
    inside = matrix @ spectrum.vectors
    back = jnp.swapaxes(spectrum.vectors, -1, -2)
    if rank == size:
        return ((norm[..., None] * values) * inside) @ back
    other = root(rest)[..., None]
    return norm[..., None] * (other * matrix + ((values - other) * inside) @ back)


def _function(spectrum: Spectrum, matrix: Array, f: Callable[[Array], Array]) -> Array:
    """`f(C) M`."""
    vectors, (size, rank) = spectrum.vectors, spectrum.vectors.shape[-2:]
    inside = jnp.swapaxes(vectors, -1, -2) @ matrix
    values = f(spectrum.values)[..., None]
    if rank == size:
        return vectors @ (values * inside)
    rest = f(spectrum.rest[..., None])[..., None]
    return rest * matrix + vectors @ ((values - rest) * inside)


def inverse(value: Array) -> Array:
    """`1/value`, 0 where it is not positive."""
    return jnp.where(value > 0, 1 / jnp.where(value > 0, value, 1), 0)


__all__ = ["Spectrum", "empty", "equalise", "inverse", "renew", "solve"]
