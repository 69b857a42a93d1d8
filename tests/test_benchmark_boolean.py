"""The tasks and the baseline of `benchmarks.boolean`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import boolean


def number(bits):
    return int("".join("1" if bit > 0 else "0" for bit in bits), 2)


def test_multiplier_multiplies():
    (x, y), others = boolean.multiplier(3)
    assert others is None
    assert x.shape == (64, 6)
    for row, product in zip(x, y, strict=True):
        assert number(row[:3]) * number(row[3:]) == number(product)


def test_rule_30():
    """Left xor (own or right), on a ring; rows to learn and others are apart."""
    (x, y), (others, _) = boolean.automaton(8, 64)
    for row, new in zip(x > 0, y > 0, strict=True):
        for cell in range(8):
            wanted = row[cell - 1] ^ (row[cell] | row[(cell + 1) % 8])
            assert new[cell] == wanted
    assert len(np.unique(np.vstack([x, others]), axis=0)) == 256


def test_circuits_are_the_same_for_any_number_of_rows():
    (x, y), _ = boolean.circuit(8, 2, 64)
    (more, values), _ = boolean.circuit(8, 2, 200)
    seen = {tuple(row): tuple(out) for row, out in zip(more, values, strict=True)}
    shared = [(row, out) for row, out in zip(x, y, strict=True) if tuple(row) in seen]
    assert shared
    assert all(seen[tuple(row)] == tuple(out) for row, out in shared)


def test_codes_differ():
    (x, y), _ = boolean.codes(16)
    assert len(np.unique(x, axis=0)) == 16
    assert np.array_equal(x, y)


def test_networks_agree():
    """The network that is searched, that in NumPy, and that of the baseline."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=shape) for shape in ((5, 6), (7, 3))]
    x = rng.choice([-1.0, 1.0], (20, 4))
    of_type = [jnp.asarray(w, jnp.float32) for w in params]
    outputs = boolean.forward(params, x)[-1] > 0
    assert np.array_equal(boolean.network(of_type, jnp.asarray(x, jnp.float32), 5.0) > 0, outputs)
    sums = boolean.outputs_through(of_type, jnp.asarray(x, jnp.float32), 1.0)
    assert np.array_equal(sums > 0, outputs)


def test_margin_of_a_majority():
    """Three weights of √(4/3), the bias has none: the least sum is one of them, over √4."""
    weights = [np.array([[0.0], [1], [1], [1]]) * (4 / 3) ** 0.5]
    x = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    assert boolean.least_margin(weights, x) == pytest.approx(3**-0.5)


def test_slope_of_the_sign():
    value, slope = jax.value_and_grad(boolean.sign_with_slope)(0.3, 2.0)
    assert value == 1
    assert slope == pytest.approx(2 * (1 - np.tanh(0.6) ** 2), rel=1e-5)


def test_baseline_finds_a_network():
    """Exact steps are those after which the kept weights are exact."""
    (x, y), _ = boolean.one_hot(4)
    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    params, steps = boolean.train_through(
        (4, 2, 4), 600, 1.0, jnp.full(4, 0.3), jnp.asarray(600.0), jax.random.key(0), *data
    )
    assert int(jnp.sum(steps > 0)) >= 2
    for start in np.flatnonzero(steps > 0):
        outputs = boolean.forward([np.asarray(w[start], np.float64) for w in params], x)[-1]
        assert np.array_equal(outputs > 0, y > 0)


def test_cells_are_kept(tmp_path, monkeypatch):
    made = []

    def method(task, starts, seed):
        made.append(starts)
        return boolean.Found([5, 0], [], [0.25], 1.0, {})

    monkeypatch.setitem(boolean.METHODS, "projection", method)
    asked = (tmp_path, "multiplier 2x2", "projection", 2)
    assert boolean.cell(*asked, True) is None
    found = [boolean.cell(*asked, False) for _ in range(2)]
    assert found[0] == found[1]
    assert made == [2]
    line = boolean.cells("multiplier 2x2", "projection", found[0])
    assert line[2:4] == ["1 of 2", "5"]
    assert boolean.main(["--cached", "--cache", str(tmp_path), "--starts", "2"]) == 0
