"""Power iterations side by side: bounds on largest eigenvalues, and how they are compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.backend import device
from pjax.projections import gains
from pjax.projections.gains import MARGIN, PowerIteration, first_direction, largest
from pjax.projections.products.dot_general import DotGeneral
from pjax.rules import Product
from pjax.rules.layer_terms import product_gain
from tests.programs import equations


def product(matrix, vector=None):
    """The gain of `x ↦ x @ matrix`, for eight rows."""
    rows, columns = matrix.shape
    operation = DotGeneral((((1,), (0,)), ((), ())), (8, rows), (rows, columns))
    return product_gain(Product(operation, True, False), "left", (None, matrix), vector)


def random_matrices(count, shape=(12, 6)):
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), count)]


@pytest.fixture(params=["in turn", "launched"])
def launches(request, monkeypatch):
    """Both ways, that of a CPU and that of a device that launches kernels."""
    monkeypatch.setattr(device, "launches_kernels", lambda: request.param == "launched")


@pytest.mark.parametrize("blocks", [1, 3, 64, 200])
@pytest.mark.usefixtures("launches")
def test_the_bound_is_of_the_largest_of_all_blocks(blocks):
    """Also where one block is 1e8 times the others, whose vectors may vanish: they stay."""
    matrices = jnp.stack(random_matrices(blocks)).at[0].multiply(1e4)
    start = first_direction((blocks, 6), (1,), jnp.float32)
    np.testing.assert_allclose(jnp.linalg.norm(start, axis=1), 1, rtol=1e-6)

    def bound(start):
        def response(x, read):
            return jnp.einsum("nij,nik,nk->nj", read, read, x)

        asked = PowerIteration(response, (matrices,), start.shape, start.dtype, (1,), start)
        ((found, last),) = largest([asked], 4)
        return found, last

    exact = np.max(np.linalg.norm(np.asarray(matrices), 2, axis=(1, 2))) ** 2
    found, last = bound(start)
    assert 0.7 * exact <= found <= MARGIN * exact * (1 + 1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(last, axis=1), 1, rtol=1e-4)
    assert not np.array_equal(last[0], start[0])
    again, _ = bound(last)
    assert found <= again * (1 + 1e-5)


@pytest.mark.parametrize(("count", "scale"), [(3, 1.0), (20, 1e-30), (20, 1e15), (40, 1.0)])
@pytest.mark.usefixtures("launches")
def test_many_at_once_are_what_each_is_by_itself(count, scale, monkeypatch):
    """Also many equal ones, which are stacked."""
    monkeypatch.setattr(gains, "_ONE_LOOP", 30)
    matrices = [scale**0.5 * m for m in random_matrices(count)]
    exact = [float(jnp.linalg.norm(m, 2)) ** 2 for m in matrices]
    bounds = jax.jit(
        lambda vectors: largest([product(m, v) for m, v in zip(matrices, vectors, strict=True)], 4)
    )
    together = bounds([None] * count)
    alone = jax.jit(lambda matrix: largest([product(matrix)], 4)[0])
    for matrix, limit, (bound, last) in zip(matrices, exact, together, strict=True):
        by_itself, vector = alone(matrix)
        np.testing.assert_allclose(last, vector, atol=1e-5)
        assert last.shape == vector.shape == (1, 12)
        assert bound <= MARGIN * limit * (1 + 1e-4)
        np.testing.assert_allclose(bound, by_itself, rtol=1e-5)
    # Power iterations that go on converge.
    for _ in range(20):
        together = bounds([last for _, last in together])
    for limit, (bound, _) in zip(exact, together, strict=True):
        assert 0.95 * MARGIN * limit <= bound


@pytest.mark.usefixtures("as_on_a_cpu")
def test_one_loop_holds_them_all_and_what_is_read_twice_is_bounded_once():
    asked = [product(m) for m in random_matrices(12)]

    def run(times):
        return lambda: [bound for bound, _ in largest(asked * times, 4)]

    once, thrice = (jax.make_jaxpr(run(times))().jaxpr for times in (1, 3))
    assert sum(e.primitive.name in ("while", "scan") for e in once.eqns) == 1
    assert equations(once, "dot_general") == equations(thrice, "dot_general") == 24
    # Few steps are written out.
    unrolled = jax.make_jaxpr(lambda: [bound for bound, _ in largest(asked, 2)])().jaxpr
    assert equations(unrolled, "dot_general") == 48
    assert not any(e.primitive.name in ("while", "scan") for e in unrolled.eqns)


@pytest.mark.usefixtures("as_on_a_cpu")
def test_many_equal_products_are_one_in_a_loop():
    """Sixteen or more take turns, so that the program does not grow; fewer are written out."""

    def products(count):
        asked = [product(m) for m in random_matrices(count)]
        jaxpr = jax.make_jaxpr(lambda: [bound for bound, _ in largest(asked, 4)])().jaxpr
        return equations(jaxpr, "dot_general")

    assert products(15) == 30
    assert products(16) == products(40) == 2


def test_equal_products_are_one_where_kernels_are_launched(monkeypatch):
    monkeypatch.setattr(device, "launches_kernels", lambda: True)
    vectors = [None, *[jax.random.normal(jax.random.key(i), (1, 12)) for i in range(19)]]
    asked = [product(m, v) for m, v in zip(random_matrices(20), vectors, strict=True)]
    asked += [product(m) for m in random_matrices(2, (12, 5))]
    jaxpr = jax.make_jaxpr(lambda: [bound for bound, _ in largest(asked, 4)])().jaxpr
    assert equations(jaxpr, "dot_general") == 2 * 2
    # Large matrices are not copied.
    monkeypatch.setattr(gains, "_STACKED_NUMBERS", 12)
    jaxpr = jax.make_jaxpr(lambda: [bound for bound, _ in largest(asked, 4)])().jaxpr
    assert equations(jaxpr, "dot_general") == 2 * 22


def test_entries_are_those_of_the_vector():
    """Also where others are not finite, and where there are more than are added up at once."""
    values = jnp.array([3.0, jnp.inf, -0.5, jnp.nan, 1e-37, *range(80)])
    assert len(values) > 2 * gains._ONE_SUM
    np.testing.assert_array_equal(jnp.stack(gains._entries(values)), values)


@pytest.mark.parametrize("known", [0, 10**6])
def test_the_first_direction_is_known_or_computed(known, monkeypatch):
    monkeypatch.setattr(gains, "_KNOWN_NUMBERS", known)
    start = first_direction((3, 40, 5), (1, 2), jnp.float32)
    entries = 1 + 0.5 * np.cos(2.4 * np.arange(200))
    entries = (entries / np.linalg.norm(entries)).reshape(40, 5)
    np.testing.assert_allclose(start, np.broadcast_to(entries, (3, 40, 5)), rtol=1e-4)
