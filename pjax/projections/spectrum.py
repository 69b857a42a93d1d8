"""Second moments by their largest eigenvectors: what a solve needs of `XᵀX`, at a small part of its
cost.

A matrix `C` is kept as `U diag(λ) Uᵀ + μ (I − U Uᵀ)`: its largest eigenvalues with their
eigenvectors, and the mean of the others. A memory of many batches never forms `XᵀX`: it is renewed
by products of `X` with a few columns.

Matrices of one rank are a stack, whatever their sizes: all that has no size is computed for a whole
stack at once, and of the rest the matrices of one size share their kernels. A network has many
parameters, and most of the time that XLA takes to compile a step is that of different kernels.

```python
>>> import jax.numpy as jnp
>>> from pjax.projections import spectrum
>>> x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
>>> shape = spectrum.Shape(rank=1, sizes=(2,))
>>> memory = spectrum.empty(shape, jnp.float32)
>>> for _ in range(4):
...     times = lambda vectors: [x.T @ (x @ u) for u in vectors]
...     trace = jnp.sum(x**2)[None]
...     memory = spectrum.renew(shape, memory, times, trace, keep=0.0, scale=jnp.ones(1))
>>> [round(float(value), 3) for value in (memory.values[0, 0], memory.rest[0])]
[9.0, 1.0]

```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pjax.backend import device

#: A factor on the rounding error that orthonormal columns are found beside.
_SHIFT = 4
#: How often columns are made orthonormal: once leaves what is nearly parallel.
_PASSES = 3


@dataclass(frozen=True)
class Shape:
    """The shape of a stack of spectra.

    **Attributes:**

    - `rank`: how many eigenvectors each has.
    - `sizes`: of the matrices. Either all are the rank, or all are larger.
    - `blocks`: for each member whether it is a stack of so many matrices of its size; 0: one.
    """

    rank: int
    sizes: tuple[int, ...]
    blocks: tuple[int, ...] = ()

    @property
    def full(self) -> bool:
        """Whether eigenvectors span all."""
        return self.rank == self.sizes[0]

    def places(self, member: int) -> tuple[int, int]:
        """Which spectra are those of a member: the first, and how many."""
        counts = [self._count(i) for i in range(member + 1)]
        return sum(counts[:-1]), counts[-1]

    def _count(self, member: int) -> int:
        return max(self.blocks[member], 1) if self.blocks else 1

    @property
    def owners(self) -> np.ndarray:
        """The member that each spectrum belongs to."""
        return np.repeat(np.arange(len(self.sizes)), [*map(self._count, range(len(self.sizes)))])

    @property
    def lengths(self) -> np.ndarray:
        """The size of each spectrum's matrix."""
        return np.asarray(self.sizes)[self.owners]

    @property
    def counts(self) -> np.ndarray:
        """How many spectra the member of each has."""
        return np.bincount(self.owners)[self.owners]

    def sums(self, numbers: Array) -> Array:
        """For each spectrum the sum of the numbers of its member."""
        if len(self.owners) == len(self.sizes):
            return numbers
        same = self.owners[:, None] == self.owners
        return jnp.sum(jnp.where(same, numbers, 0), axis=-1)

    def of(self, stack: Array, member: int) -> Array:
        """A member's part of an array for all spectra; without an axis of blocks if it has none."""
        first, count = self.places(member)
        if self.blocks and self.blocks[member]:
            return stack[first : first + count]
        return pick(stack, first)

    def split(self, stack: Array) -> list[Array]:
        """The parts of all members, see `of`."""
        return [self.of(stack, member) for member in range(len(self.sizes))]

    def join(self, parts: Sequence[Array]) -> Array:
        """An array for all spectra from those of members."""
        if not self.blocks or not any(self.blocks):
            return jnp.stack(parts)
        own = [part if blocks else part[None]
               for part, blocks in zip(parts, self.blocks, strict=True)]  # fmt: skip
        return jnp.concatenate(own)


class Spectra(NamedTuple):
    """`C ≈ U diag(λ) Uᵀ + μ (I − U Uᵀ)` for each matrix of a stack.

    **Attributes:**

    - `vectors`: for each member `U`, orthonormal columns: `[*blocks, size, rank]`.
    - `values`: `λ ≥ 0`, about the largest eigenvalues, in descending order.
    - `rest`: `μ ≥ 0`, the mean of all others; 0 where there are none.
    """

    vectors: tuple[Array, ...]
    values: Float[Array, "spectra rank"]
    rest: Float[Array, " spectra"]

    def trace(self, shape: Shape) -> Float[Array, " spectra"]:
        """`tr C`."""
        others = (shape.lengths - shape.rank).astype(self.rest.dtype)
        return jnp.sum(self.values, axis=-1) + others * self.rest

    @property
    def largest(self) -> Float[Array, " spectra"]:
        """The largest eigenvalue."""
        return jnp.maximum(self.values[:, 0], self.rest)


def empty(shape: Shape, dtype: Any) -> Spectra:
    """The spectra of 0, with directions to begin with: fixed ones, that no input is likely to be
    orthogonal to.
    """
    vectors = []
    for member, size in enumerate(shape.sizes):
        start = np.random.default_rng(size).normal(size=(size, shape.rank))
        start = jnp.asarray(np.linalg.qr(start)[0], dtype)
        blocks = shape.blocks[member : member + 1] if shape.blocks else (0,)
        vectors.append(jnp.broadcast_to(start, (*blocks, *start.shape)) if blocks[0] else start)
    count = len(shape.owners)
    return Spectra(tuple(vectors), jnp.zeros((count, shape.rank), dtype), jnp.zeros(count, dtype))


def renew(
    shape: Shape,
    before: Spectra,
    times: Callable[[Sequence[Array]], Sequence[Array]],
    trace: Float[Array, " spectra"],
    keep: Any,
    scale: Float[Array, " spectra"],
    iterations: Any = 1,
) -> Spectra:
    """The spectra of `keep · before + (1 − keep) · scale · C`.

    By subspace iteration, with the eigenvalues that `C` has within the subspace (Rayleigh-Ritz):
    where the rank is the size the result is exact, else it converges with every product.

    **Arguments:**

    - `times`: `U ↦ C U`, for all members at once.
    - `trace`: `tr C` times the scale.
    - `keep`: in [0, 1).
    - `scale`: a factor on each `C`.
    - `iterations`: how many products, at least 1; a number, also a traced one. More than one are
        for `keep = 0`.
    """
    dtype = before.values.dtype

    def weights(spectra: Spectra, trace: Array, keep: Array, scale: Array) -> Any:
        total = keep * spectra.trace(shape) + (1 - keep) * trace
        # Matrices of trace 1: their squares are within the range of numbers. What is nowhere in the
        # rows keeps its direction.
        unit = jnp.where(total > 0, total, 1)
        kept = keep * spectra.values / unit[:, None] + _tiny(dtype)
        return total, shape.split(kept), shape.split((1 - keep) * scale / unit)

    small = before._replace(vectors=()), trace, jnp.asarray(keep, dtype), scale
    total, kept, shares = weights(*small)

    def step(_: Any, found: tuple[tuple[Array, ...], Array]) -> tuple[tuple[Array, ...], Array]:
        vectors = found[0]
        products = [
            (u * own[..., None, :] + new * share[..., None, None]).astype(dtype)
            for u, new, own, share in zip(vectors, times(vectors), kept, shares, strict=True)
        ]
        inside = _symmetric(shape, [_gram(u, p) for u, p in zip(vectors, products, strict=True)])
        turn, values = jax.lax.linalg.eigh(inside, symmetrize_input=False)
        turns, values = _largest_first(shape, turn, values, total)
        if shape.full:
            new = [u @ turn for u, turn in zip(vectors, turns, strict=True)]
        else:
            columns = [p @ turn for p, turn in zip(products, turns, strict=True)]
            new = orthonormal(shape, columns)
        return tuple(new), values

    start = before.vectors, before.values
    once = isinstance(iterations, int) and iterations == 1
    vectors, values = step(0, start) if once else jax.lax.fori_loop(0, iterations, step, start)
    return Spectra(vectors, values, _rest(shape, total, values))


def _tiny(dtype: Any) -> Array:
    return jnp.asarray(jnp.finfo(dtype).eps, dtype)


def _symmetric(shape: Shape, parts: Sequence[Array]) -> Array:
    inside = shape.join(parts)
    return (inside + jnp.swapaxes(inside, -1, -2)) / 2


def _largest_first(
    shape: Shape, turn: Array, values: Array, total: Array
) -> tuple[list[Array], Array]:
    """Eigenvectors for each member, the largest first, which are then the ones that others are made
    orthogonal to; and the eigenvalues of matrices of this trace.
    """
    values = jnp.maximum(values[..., ::-1] - _tiny(values.dtype), 0)
    return shape.split(turn[..., ::-1]), values * jnp.maximum(total, 0)[:, None]


def _rest(shape: Shape, total: Array, values: Array) -> Array:
    if shape.full:
        return jnp.zeros_like(total)
    others = (shape.lengths - shape.rank).astype(total.dtype)
    return jnp.maximum(total - jnp.sum(values, axis=-1), 0) / others


def orthonormal(shape: Shape, columns: Sequence[Array]) -> list[Array]:
    """Orthonormal columns, each of the span of those up to it: the Q of a QR decomposition.

    By Cholesky factors of `QᵀQ`, which is of one size for a whole stack: shifted, so that there is
    one, and more than once, so that what it leaves is rounding.

    **Source:** Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa (2020), shifted Cholesky QR.
    """
    shift = _SHIFT * shape.rank * float(jnp.finfo(columns[0].dtype).eps)

    def scaled(parts: Sequence[Array]) -> tuple[Array, Array, Array]:
        gram = shape.join(parts)
        ones = jnp.eye(shape.rank, dtype=gram.dtype)
        size = jax.lax.rsqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
        gram = gram * size[..., None, :] * size[..., :, None] + shift * ones
        return gram * (1 / (1 + shift)), size, jnp.broadcast_to(ones, gram.shape)

    def split(turn: Array, size: Array) -> list[Array]:
        return shape.split(jnp.swapaxes(turn * size[..., None, :], -1, -2))

    def once(_: Any, found: Sequence[Array]) -> list[Array]:
        gram, size, ones = scaled([_gram(column, column) for column in found])
        factor = jax.lax.linalg.cholesky(gram, symmetrize_input=False)
        turn = jax.lax.linalg.triangular_solve(factor, ones, left_side=True, lower=True)
        turns = split(turn, size)
        return [column @ turn for column, turn in zip(found, turns, strict=True)]

    return jax.lax.fori_loop(0, _PASSES, once, list(columns))


def _gram(left: Array, right: Array) -> Array:
    return jnp.swapaxes(left, -1, -2) @ right


class SpectralFunction(NamedTuple):
    """`f(C) = U diag(inside) Uᵀ + outside` for each matrix of a stack.

    **Attributes:**

    - `inside`: what `f(λ)` is more than `f(μ)`.
    - `outside`: `f(μ)`; 0 where there is nothing but the eigenvectors.
    """

    inside: Float[Array, "spectra rank"]
    outside: Float[Array, " spectra"]


def resolvent(
    shape: Shape, spectra: Spectra, damping: Float[Array, " spectra"]
) -> SpectralFunction:
    """`(C + ρ)⁻¹`; 0 in directions in which `C + ρ` is 0.

    **Arguments:**

    - `damping`: `ρ ≥ 0`.
    """
    return _function(shape, spectra, lambda value: inverse(value + damping[:, None]))


def equaliser(shape: Shape, spectra: Spectra, damping: float) -> SpectralFunction:
    """`(C/c + δ)^-½` with `c` the mean eigenvalue, times a factor that keeps the size of rows whose
    second moment is `C`: on the right of a matrix whose rows are to be equalised.

    **Arguments:**

    - `damping`: `δ > 0`; as it grows, the result tends to 1.
    """
    trace, others = spectra.trace(shape), (shape.lengths - shape.rank).astype(spectra.rest.dtype)
    scale = inverse(trace / shape.lengths.astype(trace.dtype))[:, None]

    def root(value: Array) -> Array:
        return 1 / jnp.sqrt(value * scale + damping)

    rest = spectra.rest[:, None]
    left = jnp.sum(spectra.values * root(spectra.values) ** 2, axis=-1)
    left = left + others * (rest * root(rest) ** 2)[:, 0]
    norm = jnp.where(left > 0, jnp.sqrt(trace * inverse(left)), 1)
    return _function(shape, spectra, lambda value: norm[:, None] * root(value))


def _function(shape: Shape, spectra: Spectra, f: Callable[[Array], Array]) -> SpectralFunction:
    values, rest = f(spectra.values), f(spectra.rest[:, None])
    if shape.full:
        return SpectralFunction(values, jnp.zeros_like(spectra.rest))
    return SpectralFunction(values - rest, rest[:, 0])


class Side(NamedTuple):
    """`f(C)` of one member, on one side of a matrix.

    **Attributes:**

    - `vectors`: `U`.
    - `inside`, `outside`: see [`SpectralFunction`][]; `outside` None where it is 0.
    """

    vectors: Array
    inside: Array
    outside: Array | None


def between(left: Side | None, matrix: Array, right: Side) -> Array:
    """`F M G`, with functions `F` and `G` of two spectra on both sides of a matrix.

    `M` is read by two products and by the sum of the parts, and by nothing in between.

    **Arguments:**

    - `left`, `right`: `F`, 1 if not given, and `G`.
    - `matrix`: `M`, `[*blocks, rows, columns]`.
    """
    narrow = right.inside[..., :, None] * jnp.swapaxes(right.vectors, -1, -2)
    along = matrix @ right.vectors
    if left is None:
        part = along @ narrow
        return part if right.outside is None else right.outside * matrix + part
    across = jnp.swapaxes(left.vectors, -1, -2) @ matrix
    inner = (across @ right.vectors) @ narrow
    if right.outside is not None:
        inner = right.outside * across + inner
    found = left.vectors @ (left.inside[..., :, None] * inner)
    if left.outside is None:
        return found
    part = along @ narrow
    return found + left.outside * (part if right.outside is None else right.outside * matrix + part)


def pick(stack: Array, number: int) -> Array:
    """`stack[number]`.

    XLA compiles a kernel for each place that is read, but one for all sums of what a mask leaves.
    """
    if len(stack) == 1 or device.launches_kernels():
        return stack[number]
    mask = (np.arange(len(stack)) == number).reshape(-1, *(1,) * (stack.ndim - 1))
    return jnp.sum(jnp.where(mask, stack, 0), axis=0)


def entries(stack: Array) -> list[Array]:
    """All of them, see `pick`."""
    return [pick(stack, number) for number in range(len(stack))]


def inverse(value: Array) -> Array:
    """`1/value`, 0 where it is not positive."""
    return jnp.where(value > 0, 1 / jnp.where(value > 0, value, 1), 0)


__all__ = [
    "SpectralFunction", "Shape", "Side", "Spectra", "between", "empty", "equaliser", "inverse",
    "orthonormal", "renew", "resolvent",
]  # fmt: skip
