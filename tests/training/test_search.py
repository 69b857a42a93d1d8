"""Exact networks from many starts."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax


def network(params, x, norm=5.0):
    for w in params:
        x = jnp.concatenate([-jnp.ones((len(x), 1)), x], axis=1)
        x = pjax.threshold(x @ w, margin=(w.shape[0] / norm) ** 0.5)
    return x


def loss(params, x, y):
    return jnp.mean(pjax.squared_error(network(params, x), y))


def make(widths, x, y):
    params = [jnp.zeros((a + 1, b)) for a, b in itertools.pairwise(widths)]
    return params, jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


SQUARE = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
XOR = make((2, 2, 1), SQUARE, -SQUARE.prod(axis=1, keepdims=True))
CODE = make((4, 2, 4), 2 * np.eye(4) - 1, 2 * np.eye(4) - 1)


def spheres(task):
    """Columns of length `√m`, `m` their number of entries."""
    return [pjax.sets.Sphere(len(w) ** 0.5, axis=0) for w in task[0]]


def search(task=XOR, **options):
    options = {"sets": spheres(task), "starts": 6, "steps": 400, "every": 20, **options}
    return pjax.solve(loss, *task, **options)


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def outputs_of(weights, x):
    """The network, in NumPy."""
    x = np.asarray(x)
    for w in weights:
        x = np.where(np.hstack([-np.ones((len(x), 1)), x]) @ np.asarray(w) > 0, 1, -1)
    return x


@pytest.mark.parametrize(("task", "steps"), [(XOR, 1500), (CODE, 3000)], ids=["xor", "4-2-4"])
def test_networks_are_exact(task, steps):
    found = search(task, starts=8, steps=steps, enough=8, every=50)
    assert int(found.exact.sum()) >= 6
    _, x, y = task
    for place in range(8):
        weights = [w[place] for w in found.params]
        right = np.array_equal(outputs_of(weights, x), y)
        assert right == bool(found.exact[place]) == (float(found.loss[place]) == 0)
        for w in weights:
            np.testing.assert_allclose(np.sum(np.square(w), axis=0), len(w), rtol=1e-4)
    exact = int(found.exact.sum())
    # Exact ones first, those found first before others; the rest by their loss.
    assert np.all(np.asarray(found.exact)[:exact])
    assert np.all(np.diff(np.asarray(found.steps)[:exact]) >= 0)
    assert np.all(np.diff(np.asarray(found.loss)[exact:]) >= 0)
    assert equal(found.best, [w[0] for w in found.params])
    assert sorted(np.asarray(found.start)) == list(range(8))


def test_stops_with_enough():
    found = search(enough=1, steps=5000)
    assert bool(found.exact[0])
    assert int(found.steps.max()) < 5000
    one = search(enough=1, steps=5000, stop=lambda params: jnp.sum(params[1]) > -1e9)
    assert int(one.steps[0]) == 20  # the first test


def test_starts_do_not_depend_on_each_other():
    """A search of one setting is what it is within a search of several."""
    settings = np.array([0.2, 0.4, 0.6, 0.2, 0.4, 0.6])
    mixed = search(relaxation=settings, enough=6, steps=100)
    plain = search(relaxation=0.4, enough=6, steps=100)
    order_mixed, order_plain = np.argsort(mixed.start), np.argsort(plain.start)
    for a, b in zip(mixed.params, plain.params, strict=True):
        np.testing.assert_array_equal(a[order_mixed][1], b[order_plain][1])
        assert not np.array_equal(a[order_mixed][0], b[order_plain][0])


def test_key_decides():
    assert equal(search(steps=60), search(steps=60, key=jax.random.key(0)))
    assert not equal(search(steps=60).params, search(steps=60, key=jax.random.key(1)).params)


def test_resumes_after_an_interrupt(tmp_path):
    path = tmp_path / "search"

    def interrupt(progress):
        if progress.step == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(enough=6, progress=interrupt, checkpoint=path)
    seen = []
    resumed = search(enough=6, progress=lambda p: seen.append(p.step), checkpoint=path)
    assert seen[0] == 120
    assert equal(resumed, search(enough=6))
    # A search that is done is read, and can go on.
    assert equal(search(enough=6, checkpoint=path), resumed)
    assert equal(search(enough=6, steps=500, checkpoint=path), search(enough=6, steps=500))
    assert os.listdir(tmp_path) == ["search"]


_KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pjax.training import search
search._SECONDS = 0.0
from training.test_search import search as run
run(enough=6, checkpoint={path!r}, progress=lambda p: p.step < 100 or os.kill(os.getpid(),
signal.SIGKILL))
"""


def test_resumes_after_a_kill(tmp_path):
    path = str(tmp_path / "search")
    tests = str(Path(__file__).parents[1])
    code = _KILLED.format(tests=tests, path=path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(tests).parent), tests])}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    seen = []
    resumed = search(enough=6, progress=lambda p: seen.append(p.step), checkpoint=path)
    assert seen[0] == 120
    assert equal(resumed, search(enough=6))


SETS = {
    "signs": (pjax.sets.Signs(), np.where(np.arange(12).reshape(6, 2) % 5 < 2, 1.0, -1.0)),
    "box": (pjax.sets.Box(-0.5, 1.0), np.linspace(-0.5, 1.0, 12).reshape(6, 2)),
    "sparse": (pjax.sets.Sparse(2, axis=0), np.eye(6)[:, :2] - 2 * np.eye(6)[:, 3:5]),
    "simplex": (pjax.sets.Simplex(axis=0), np.array([[0.5, 0], [0.2, 0], [0.3, 0.1], [0, 0.9],
                                                    [0, 0], [0, 0]])),
    "sphere": (pjax.sets.Sphere(2.0, axis=0), 2 * np.linalg.qr(np.vander(np.arange(6.0), 2))[0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", SETS)
def test_parameters_are_in_their_sets(kind, tmp_path):
    """Of every start, at each test; and as they would be without an interrupt. Five equations for
    six numbers of each column: the set is what tells which.
    """
    one, wanted = SETS[kind]
    assert float(one.distance(jnp.asarray(wanted, jnp.float32))) < 1e-6
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    y = x @ jnp.asarray(wanted, jnp.float32)

    def fn(params):
        return jnp.mean(pjax.squared_error(x @ params["w"], y))

    def inside(params):
        distances = jax.vmap(lambda w: one.distance(w))(params["w"])
        assert float(jnp.max(distances)) <= 1e-6

    def solved(steps, **options):
        return pjax.solve(
            fn, {"w": jnp.full((6, 2), 0.3)}, sets={"w": one}, starts=6, steps=steps, enough=6,
            relaxation=0.5, adaptation=0.0, every=250, stop=lambda p: fn(p) < 1e-6, **options,
        )  # fmt: skip

    found = solved(4000)
    inside(found.params)
    assert bool(found.exact[0])
    np.testing.assert_allclose(x @ found.best["w"], y, atol=5e-3)

    def interrupt(progress):
        raise KeyboardInterrupt

    path = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        solved(4000, checkpoint=path, progress=interrupt)
    inside(solved(250, checkpoint=path).params)
    assert equal(solved(4000, checkpoint=path), found)


def test_progress():
    seen = []
    found = search(enough=6, steps=100, every=40, progress=seen.append)
    assert [p.step for p in seen] == [40, 80, 100]
    assert seen[-1].exact == int(found.exact.sum())
    np.testing.assert_array_equal(np.sort(seen[-1].gap), np.sort(found.gap))


def test_other_networks():
    """A relu network with a linear output, to a tolerance."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 3)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
    y = jax.nn.relu(x @ w) + 0.5

    def fn(params, x, y):
        hidden = jax.nn.relu(x @ params["w"])
        return jnp.mean(pjax.squared_error(hidden + params["b"], y))

    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    found = pjax.solve(
        fn, params, x, y, starts=4, steps=3000, relaxation=0.5, adaptation=0.0, enough=1,
        stop=lambda p: fn(p, x, y) < 1e-6,
    )  # fmt: skip
    assert bool(found.exact[0])
    np.testing.assert_allclose(found.best["w"], w, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": 2.0}, "relaxation"),
        ({"relaxation": np.ones(5)}, "6 starts"),
        ({"adaptation": -0.1}, "adaptation"),
        ({"starts": 0}, "starts"),
        ({"steps": 1.5}, "steps"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        search(**options)


def test_wrong_checkpoints(tmp_path):
    path = tmp_path / "search"
    search(steps=20, checkpoint=path)
    with pytest.raises(ValueError, match="another function, data, key or settings"):
        search(steps=20, checkpoint=path, relaxation=0.5)
    with pytest.raises(ValueError, match="another function, data, key or settings"):
        search(CODE, steps=20, checkpoint=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        search(steps=20, checkpoint=path)


def test_values_that_are_not_finite():
    params, x, y = XOR
    with pytest.raises(pjax.optim.NonFiniteError, match="start 0"):
        search((params, x.at[0, 0].set(jnp.inf), y), steps=20)
