"""A method is traced once for equal owners and arguments that are alike, and only for them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.backend import device
from pjax.compile import traced_once


@dataclass(frozen=True)
class Owner:
    factor: float

    def method(self, x, pair, known):
        TRACES.append((x, pair, known))
        same = pair[0] is x
        return {"a": self.factor * x + sum(pair), "b": known, "c": None, "same": same}


TRACES: list = []


@pytest.fixture(autouse=True)
def _fresh():
    TRACES.clear()
    jax.clear_caches()


def run(calls, *arrays):
    return jax.jit(lambda *arrays: [traced_once(*call(*arrays)) for call in calls])(*arrays)


X, Y = jnp.arange(3.0), jnp.ones(3)


def test_equal_owners_share_a_trace_and_have_values_of_their_own():
    one, two = run(
        [
            lambda x, y: (Owner(2.0), "method", x, (y, y), 1.5),
            lambda x, y: (Owner(2.0), "method", y, (x, x), 1.5),
        ],
        X,
        Y,
    )
    assert len(TRACES) == 1
    np.testing.assert_allclose(one["a"], 2 * X + 2)
    np.testing.assert_allclose(two["a"], 2 + 2 * X)
    assert one["c"] is None
    assert two["b"] == 1.5


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (Owner(3.0), "method", x, (y, y), 1),
        lambda x, y: (Owner(2.0), "method", x, (y, y), 2),
        lambda x, y: (Owner(2.0), "method", x, (y, y), 1.0),  # a float is not an integer
        lambda x, y: (Owner(2.0), "method", x, (y, y), True),
        lambda x, y: (Owner(2.0), "method", x, (x, y), 1),  # one array at two places
        lambda x, y: (Owner(2.0), "method", x[:2], (y[:2], y[:2]), 1),
        lambda x, y: (Owner(2.0), "method", x, (y.astype(jnp.bfloat16), y), 1),
    ],
)
def test_what_differs_has_a_trace_of_its_own(other):
    run([lambda x, y: (Owner(2.0), "method", x, (y, y), 1), other], X, Y)
    assert len(TRACES) == 2


def test_an_array_at_two_places_is_one():
    (found,) = run([lambda x, y: (Owner(2.0), "method", x, (x, y), 1)], X, Y)
    assert found["same"]


def test_known_arrays_are_seen_as_they_are():
    run([lambda x, y: (Owner(2.0), "method", x, (np.ones(3), y), 1)], X, Y)
    (_, (known, _), _), *_ = TRACES
    assert isinstance(known, np.ndarray)


def test_another_device_has_traces_of_its_own(monkeypatch):
    call = lambda x, y: (Owner(2.0), "method", x, (y, y), 1)  # noqa: E731
    run([call], X, Y)
    monkeypatch.setattr(device, "launches_kernels", lambda: True)
    jax.jit(lambda x, y: traced_once(*call(x, y)))(X, Y)
    assert len(TRACES) == 2
