"""Which losses a function ends in, whoever wrote them, and their proximal operators."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import pjax
from pjax.graph import build_graph
from pjax.patterns import RowLoss
from pjax.projections import losses
from pjax.trace import trace
from tests.selection import mostly_slow

X = jax.random.normal(jax.random.key(0), (8, 5))
CLASSES = jnp.array([0, 2, 1, 3, 0, 0, 3, 1])
ONE_HOT = jax.nn.one_hot(CLASSES, 4)
TARGETS = jax.random.normal(jax.random.key(1), (8, 4))
MASK = jnp.array([1.0, 1, 0, 1, 0, 1, 1, 0])
PARAMS = {
    "w": jax.random.normal(jax.random.key(2), (5, 6)),
    "v": 0.5 * jax.random.normal(jax.random.key(3), (6, 4)),
}


def net(p):
    return jax.nn.relu(X @ p["w"]) @ p["v"]


def penalties(p):
    return 0.03 * jnp.sum(p["w"] ** 2) + 0.02 * jnp.abs(p["v"]).sum()


def by_index(p):
    return -jnp.mean(jax.nn.log_softmax(net(p))[jnp.arange(8), CLASSES])


def masked(p):
    rows = optax.softmax_cross_entropy_with_integer_labels(net(p), CLASSES)
    return jnp.sum(MASK * rows) / jnp.sum(MASK)


def per_example(p):
    def loss(x, y):
        return optax.softmax_cross_entropy(jax.nn.relu(x @ p["w"]) @ p["v"], y)

    return jax.vmap(loss)(X, ONE_HOT).mean()


def pooled(p):
    """Rows that are not side by side: classes in the middle."""
    logits = jnp.transpose(net(p).reshape(8, 2, 2), (0, 2, 1))
    terms = jax.nn.log_softmax(logits, axis=1) * jax.nn.softmax(TARGETS[:, :2])[..., None]
    return -jnp.mean(jnp.sum(terms, axis=1))


CE, SQUARED, ENTRIES, ROWS = "cross_entropy", "squared_error", "entries", "rows"

#: The function, and for each loss what handles it, the shape of its prediction, and what the first
#: row counts.
FUNCTIONS = {
    "class numbers": (
        lambda p: optax.softmax_cross_entropy_with_integer_labels(net(p), CLASSES).mean(),
        [(CE, (8, 4), 1 / 8)],
    ),
    "one-hot": (
        lambda p: optax.softmax_cross_entropy(net(p), ONE_HOT).sum(),
        [(CE, (8, 4), 1.0)],
    ),
    "smoothed labels": (
        lambda p: optax.softmax_cross_entropy(net(p), optax.smooth_labels(ONE_HOT, 0.1)).mean(),
        [(CE, (8, 4), 1 / 8)],
    ),
    "log-softmax by index": (by_index, [(CE, (8, 4), 1 / 8)]),
    "log of softmax by index": (
        lambda p: -jnp.mean(jnp.log(jax.nn.softmax(net(p)))[jnp.arange(8), CLASSES]),
        [(CE, (8, 4), 1 / 8)],
    ),
    "log of softmax times one-hot": (
        lambda p: -jnp.mean(jnp.sum(ONE_HOT * jnp.log(jax.nn.softmax(net(p))), -1)),
        [(CE, (8, 4), 1 / 8)],
    ),
    "per example": (per_example, [(CE, (8, 4), 1 / 8)]),
    "weights of rows": (masked, [(CE, (8, 4), 1 / 5)]),
    "other axes": (pooled, [(CE, (8, 2, 2), 1 / 16)]),
    "distillation": (
        lambda p: optax.kl_divergence(
            jax.nn.log_softmax(net(p)), jax.nn.softmax(TARGETS)
        ).mean(),
        [(CE, (8, 4), 1 / 8)],
    ),
    "mean of squares": (
        lambda p: jnp.mean((net(p) - TARGETS) ** 2),
        [(SQUARED, (8, 4), 2 / 32)],
    ),
    "l2": (
        lambda p: jnp.mean(jnp.sum(optax.l2_loss(net(p), TARGETS), -1)),
        [(SQUARED, (8, 4), 1 / 8)],
    ),
    "squares behind a function": (
        lambda p: jnp.mean(jnp.square(ONE_HOT - jax.nn.sigmoid(net(p)))),
        [(SQUARED, (8, 4), 2 / 32)],
    ),
    "binary": (
        lambda p: optax.sigmoid_binary_cross_entropy(net(p), ONE_HOT).mean(),
        [(ENTRIES, (8, 4), 1 / 32)],
    ),
    "huber": (
        lambda p: optax.huber_loss(net(p), TARGETS, delta=0.7).mean(),
        [(ENTRIES, (8, 4), 1 / 32)],
    ),
    "hinge": (
        lambda p: optax.hinge_loss(net(p), 2 * ONE_HOT - 1).mean(),
        [(ENTRIES, (8, 4), 1 / 32)],
    ),
    "absolute": (lambda p: jnp.abs(net(p) - TARGETS).mean(), [(ENTRIES, (8, 4), 1 / 32)]),
    "focal": (
        lambda p: optax.sigmoid_focal_loss(net(p), ONE_HOT).mean(),
        [(ENTRIES, (8, 4), 1 / 32)],
    ),
    "cosine": (
        lambda p: optax.cosine_distance(net(p), TARGETS).sum(),
        [(ROWS, (8, 4), None)],
    ),
    "root of a mean": (
        lambda p: jnp.sqrt(jnp.mean((net(p) - TARGETS) ** 2)),
        [(ROWS, (32,), 1.0)],
    ),
    "exponential of a loss": (
        lambda p: jnp.exp(pjax.cross_entropy(net(p), ONE_HOT).mean()),
        [(ROWS, (32,), 1.0)],
    ),
    "penalties": (
        lambda p: pjax.cross_entropy(net(p), ONE_HOT).mean() + penalties(p),
        [(CE, (8, 4), 1 / 8), (SQUARED, (5, 6), 0.06), (ENTRIES, (6, 4), 0.02)],
    ),
    "two heads": (
        lambda p: (
            0.5 * optax.softmax_cross_entropy(net(p), ONE_HOT).mean()
            + jnp.mean((X @ p["w"] - 1) ** 2)
        ),
        [(CE, (8, 4), 1 / 16), (SQUARED, (8, 6), 2 / 48)],
    ),
}  # fmt: skip


def handler(equation):
    if isinstance(equation.primitive, RowLoss):
        return ROWS if equation.primitive.entries is None else ENTRIES
    return equation.name


#: One of each kind, and what changes the rows.
OFTEN = (
    "class numbers", "weights of rows", "other axes", "mean of squares",
    "squares behind a function",
    "binary", "huber", "cosine", "penalties", "two heads",
)  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(FUNCTIONS, OFTEN))
def test_losses_are_found_and_give_the_gradient_in_the_limit(name):
    fn, expected = FUNCTIONS[name]
    program, leaves, consts, _ = trace(fn, PARAMS)
    graph = build_graph(program, "layer")
    values = graph.program.evaluate(leaves, consts)
    found = [(handler(t.equation), graph.program.shape(t.equation.inputs[0])) for t in graph.terms]
    assert found == [(kind, shape) for kind, shape, _ in expected]
    for term, (_, _, count) in zip(graph.terms, expected, strict=True):
        if count is not None:
            counts = np.ravel(np.asarray(term.counts(values)))
            np.testing.assert_allclose(counts[0], count, rtol=1e-5)
    # Its proximal operators are near gradient steps for a small prox step.
    metric = pjax.metrics.Spectral(activations=1e4, prox_step=1e-4)
    value, displacement = pjax.value_and_displacement(fn, metric=metric)(PARAMS)
    wanted, gradient = jax.jit(jax.value_and_grad(fn))(PARAMS)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(displacement), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.linalg.norm(b)))


STIFF = pjax.metrics.Spectral(activations=1e4, prox_step=1e-4)


def assert_gradient(fn, params=None, *, metric=STIFF, cosine=0.9999, length=0.99):
    """That displacements are near the gradient, leaf by leaf; 0 where it is."""
    params = PARAMS if params is None else params
    gradient = jax.jit(jax.grad(fn))(params)
    moved = pjax.displacement(fn, metric=metric)(params)
    for (path, d), g in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(gradient), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert jnp.all(jnp.isfinite(d)), name
        sizes = float(jnp.linalg.norm(d)), float(jnp.linalg.norm(g))
        if sizes[1] == 0:
            assert sizes[0] == 0, name
            continue
        assert float(jnp.vdot(d, g)) > cosine * sizes[0] * sizes[1], name
        assert sizes[0] > length * sizes[1], name


def side(p):
    return jnp.mean((jax.nn.relu(X @ p["w"]) @ p["u"] - X[:, :1]) ** 2)


HEADS = {**PARAMS, "u": jax.random.normal(jax.random.key(4), (6, 1))}
SIDES = {
    "squares": side,
    "absolute": lambda p: jnp.mean(jnp.abs(jnp.tanh(X @ p["w"]) @ p["u"])),
    "no sum over entries": lambda p: optax.cosine_distance(jnp.tanh(X @ p["w"]), X[:, :1]).mean(),
    "penalty": lambda p: jnp.sum(p["u"] ** 2),
    "named": lambda p: pjax.squared_error(X @ p["w"] @ p["u"], X[:, :1]).mean(),
}


@pytest.mark.parametrize("traced", [False, True], ids=["number", "traced"])
@pytest.mark.parametrize("name", mostly_slow(SIDES, ("squares", "penalty", "named")))
def test_a_term_of_weight_0_moves_nothing_and_harms_nothing(name, traced):
    fn = SIDES[name]

    def of(weights):
        return lambda p: weights[0] * by_index(p) + weights[1] * fn(p)

    for weights in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1e-12)):
        given = jnp.array(weights) if traced else weights
        assert_gradient(of(given), HEADS, cosine=0.99, length=0.9)
    moved, _ = pjax.optim.CyclicProjections(splitting="layer").update(of((1.0, 0.0)), HEADS)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(moved))


SIGNED = jax.random.normal(jax.random.key(5), (8,))
#: Losses of the rows of predictions, in all forms that a proximal operator has.
OF_PREDICTIONS = {
    "cross-entropy": lambda z: optax.softmax_cross_entropy_with_integer_labels(z, CLASSES),
    "named": lambda z: pjax.cross_entropy(z, ONE_HOT),
    "margin": lambda z: pjax.margin_loss(z, ONE_HOT),
    "squares": lambda z: jnp.sum((z - TARGETS) ** 2, -1),
    "entries": lambda z: jnp.sum(optax.huber_loss(z, TARGETS), -1),
    "rows": lambda z: optax.cosine_distance(z, TARGETS),
    "linear": lambda z: z @ jnp.arange(4.0) + jnp.sum(z**2, -1),
    "clipped ratio": lambda z: jnp.minimum(
        jnp.exp(z[:, 0] - 1), jnp.clip(jnp.exp(z[:, 0] - 1), 0.8, 1.2)
    ),
}


@pytest.mark.parametrize("traced", [False, True], ids=["number", "traced"])
@pytest.mark.parametrize("first", [0.0, np.array([0.0, 1.0] * 4)], ids=["all", "some"])
def test_of_two_losses_of_one_value_the_first_may_weigh_nothing(first, traced):
    """They are one node, whose rows then count as the second has it."""

    def of(first):
        def fn(p):
            out = net(p)
            rows = jnp.log(1 + out * out), jnp.log(1 + jnp.square(out - 1))
            return jnp.mean(first * rows[0].sum(1)) + 0.3 * jnp.mean(rows[1].sum(1))

        return fn

    assert_gradient(of(jnp.asarray(first) if traced else first))


@pytest.mark.parametrize("weights", [SIGNED, -jnp.ones(8), -1.0], ids=["mixed", "all", "number"])
@pytest.mark.parametrize(
    "name", mostly_slow(OF_PREDICTIONS, ("cross-entropy", "named", "squares", "entries"))
)
def test_rows_of_any_sign_give_forces(name, weights):
    def fn(p):
        return jnp.mean(weights * OF_PREDICTIONS[name](net(p)))

    assert_gradient(fn)
    # At a usual prox step only the length differs.
    assert_gradient(fn, metric=None, cosine=0.9, length=0.5)


def test_pure_projection_takes_rows_of_any_sign():
    def fn(p):
        return jnp.mean(SIGNED * OF_PREDICTIONS["cross-entropy"](net(p)))

    optimizer = pjax.optim.Projection()
    params, state = PARAMS, optimizer.init(fn, PARAMS)
    for _ in range(5):
        params, state, info = optimizer.update(fn, params, state)
    assert float(info.loss) < float(fn(PARAMS)) - 0.5


BOUNDED = {
    "learned noise": lambda p: jnp.mean(jnp.exp(-p["s"]) * (net(p) - TARGETS) ** 2 + p["s"]),
    "density": lambda p: -jnp.mean(
        jax.scipy.stats.norm.logpdf(TARGETS, net(p), jnp.exp(p["s"]))
    ),
    "weights of tasks": lambda p: (
        jnp.exp(-p["s"]) * by_index(p) + jnp.exp(-p["t"]) * masked(p) + p["s"] + p["t"]
    ),
    "divergence": lambda p: -0.5 * jnp.mean(
        1 + 0.3 * net(p) - net(p) ** 2 - jnp.exp(0.3 * net(p))
    ),
    "entropy bonus": lambda p: by_index(p) + 0.1 * jnp.mean(
        jnp.sum(jax.nn.softmax(net(p)) * jax.nn.log_softmax(net(p)), -1)
    ),
    "critic with a penalty": lambda p: (
        jnp.mean(net(p)[:4] - net(p)[4:]) + jnp.mean((jnp.linalg.norm(p["v"], axis=0) - 1) ** 2)
    ),
    "preferences": lambda p: -jnp.mean(
        jax.nn.log_sigmoid(0.1 * (net(p)[:4, 0] - net(p)[4:, 0]))
    ),
    "product of losses": lambda p: by_index(p) * jnp.mean((X @ p["w"]) ** 2),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(BOUNDED, ("learned noise", "divergence")))
def test_losses_are_judged_by_their_sum(name):
    params = {**PARAMS, "s": jnp.asarray(0.3), "t": jnp.asarray(-0.2)}
    used = {"learned noise": "s", "density": "s", "weights of tasks": "st"}.get(name, "")
    params = {k: v for k, v in params.items() if k in "wv" or k in used}
    assert_gradient(BOUNDED[name], params)
    assert_gradient(BOUNDED[name], params, metric=None, cosine=0.9, length=0.5)


def test_the_same_loss_written_twice_is_the_same_problem():
    def by_optax(p):
        return optax.softmax_cross_entropy_with_integer_labels(net(p), CLASSES).mean()

    def by_name(p):
        return pjax.cross_entropy(net(p), ONE_HOT).mean()

    for options in ({}, {"splitting": "neuron"}):
        (_, a), (_, b) = (
            pjax.value_and_displacement(fn, **options)(PARAMS) for fn in (by_optax, by_name)
        )
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-6)


def test_losses_are_found_inside_of_compiled_code():
    """The first trace of a training script is often the one inside of its own `jit` and `scan`."""

    def fn(p, x, y):
        logits = jax.nn.relu(x @ p["w"]) @ p["v"]
        rows = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return rows.mean() + optax.huber_loss(p["w"]).sum()

    step = pjax.value_and_displacement(fn)

    @jax.jit
    def train(params):
        def body(params, _):
            value, moved = step(params, X, CLASSES)
            return jax.tree.map(lambda p, d: p - 0.01 * d, params, moved), value

        return jax.lax.scan(body, params, None, length=2)

    params, values = train(PARAMS)
    moved = PARAMS
    for value in values:
        expected, displacement = step(moved, X, CLASSES)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        moved = jax.tree.map(lambda p, d: p - 0.01 * d, moved, displacement)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_penalties_do_not_count_and_pull_on_parameters_at_rest():
    def fn(p):
        return pjax.cross_entropy(net(p), ONE_HOT).mean() + 10 * penalties(p)

    def plain(p):
        return pjax.cross_entropy(net(p), ONE_HOT).mean()

    problems = [pjax.feasibility_problem(f, PARAMS, splitting="layer") for f in (fn, plain)]
    assert float(problems[0].largest_coefficient) == float(problems[1].largest_coefficient) == 1 / 8
    step = pjax.displacement(fn)(PARAMS)
    without = pjax.displacement(plain)(PARAMS)
    gradient = jax.jit(jax.grad(lambda p: 10 * penalties(p)))(PARAMS)
    for name in PARAMS:
        np.testing.assert_allclose(step[name] - without[name], gradient[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "optimizer",
    [
        pjax.optim.Projection(),
        pjax.optim.DouglasRachford(),
        pjax.optim.AlternatingProjections(),
    ],
    ids=["pure", "dr", "ap"],
)
@pytest.mark.parametrize(
    "name", mostly_slow(["binary", "cosine", "penalties", "huber"], ["cosine", "penalties"])
)
def test_every_way_of_training_lowers_the_loss(optimizer, name):
    fn, _ = FUNCTIONS[name]
    params, before = PARAMS, float(fn(PARAMS))
    pure = isinstance(optimizer, pjax.optim.Projection)
    state: Any = optimizer.init(fn, params) if pure else None
    for _ in range(8):
        if isinstance(optimizer, pjax.optim.Projection):
            params, state, _ = optimizer.update(fn, params, state)
        else:
            params, _ = optimizer.update(fn, params)
    assert float(fn(params)) < 0.85 * before


# --- Proximal operators --------------------------------------------------------------------------

SCALARS = {
    "absolute": lambda x: jnp.abs(x - 0.3),
    "hinge": lambda x: jnp.maximum(1 - 1.5 * x, 0),
    "huber": lambda x: optax.huber_loss(x, 0.2 * jnp.ones_like(x), delta=0.5),
    "binary": lambda x: jax.nn.softplus(x) - 0.8 * x,
    "fourth power": lambda x: (x - 1) ** 4,
    "poisson": lambda x: jnp.exp(x) - 2 * x,
    "insensitive": lambda x: jnp.maximum(jnp.abs(x) - 0.25, 0),
}


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.usefixtures("x64")
def test_separable_losses_against_a_search(name):
    entry = SCALARS[name]
    rng = np.random.default_rng(0)
    reference, deviation = rng.normal(size=(2, 6, 5))
    step = rng.choice([0, 1e-6, 0.1, 1.0, 30.0], size=6)
    arrays = jnp.asarray(reference), jnp.asarray(deviation)
    found = np.asarray(losses.separable(entry, *arrays, step))
    for place in np.ndindex(6, 5):
        start, length = reference[place] + deviation[place], step[place[0]]

        def cost(x, start=start, length=length):
            return 0.5 * (x - start) ** 2 + length * float(entry(jnp.asarray(x)))

        bound = 3 + abs(start) + 3 * min(length, 3)
        result: Any = optimize.minimize_scalar(
            cost, bounds=(start - bound, start + bound), method="bounded", options={"xatol": 1e-12}
        )
        best = result.x
        at = reference[place] + found[place]
        assert cost(at) <= cost(best) + 1e-12
        np.testing.assert_allclose(at, best, atol=2e-6)


def test_separable_moves_far_below_the_rounding_of_the_point():
    reference, step = jnp.full((1, 3), 3.0), jnp.array([1e-20])
    moved = losses.separable(lambda x: jax.nn.softplus(x), reference, jnp.zeros((1, 3)), step)
    np.testing.assert_allclose(moved, -1e-20 * jax.nn.sigmoid(3.0), rtol=1e-5)


ROW_LOSSES = {
    "cosine": lambda x: -x @ jnp.arange(1.0, 5) / jnp.sqrt(jnp.sum(jnp.square(x), -1) + 0.1),
    "log-sum-exp": lambda x: jax.nn.logsumexp(x, axis=-1) - x[..., 0],
    "length": lambda x: jnp.sqrt(jnp.sum(jnp.square(x), -1) + 0.1),
    "smooth maximum": lambda x: jnp.sum(jax.nn.softmax(3 * x) * x, -1),
    "quartic": lambda x: jnp.square(jnp.sum(jnp.square(x), -1) - 2),
}


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.usefixtures("x64")
def test_row_losses_are_stationary_and_lower(name):
    value = ROW_LOSSES[name]
    rng = np.random.default_rng(1)
    reference, deviation = rng.normal(size=(2, 12, 4))
    step = rng.choice([0, 1e-6, 0.1, 1.0], size=12)
    found = losses.rows(value, jnp.asarray(reference), jnp.asarray(deviation), step)

    def cost(move):
        return 0.5 * jnp.sum(jnp.square(move - deviation), -1) + step * value(reference + move)

    assert np.all(cost(found) <= cost(deviation) + 1e-12)
    gradient = jax.jit(jax.grad(lambda move: jnp.sum(cost(move))))(found)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(found)[step == 0], deviation[step == 0])


@pytest.mark.usefixtures("x64")
def test_row_losses_agree_with_the_exact_operator():
    rng = np.random.default_rng(2)
    reference, deviation = (jnp.asarray(a) for a in rng.normal(size=(2, 9, 4)))
    labels = jax.nn.softmax(jnp.asarray(rng.normal(size=(9, 4))))
    step = jnp.asarray(rng.uniform(0, 8, 9))
    exact = losses.cross_entropy(reference, deviation, labels, step)
    found = losses.rows(lambda x: losses.cross_entropy_value(x, labels), reference, deviation, step)
    np.testing.assert_allclose(found, exact, atol=1e-8)


@pytest.mark.parametrize("step", [1e-7, 1e-9, 1e-11])
def test_moves_that_gain_less_than_the_rounding_of_values_are_taken(x64, step):
    x = jnp.asarray([[0.17, 0.38, 0.66, 1.67]])

    def entry(x):
        return jnp.log(1 + x**8)

    slope = jax.vmap(jax.vmap(jax.grad(entry)))(x)
    zero = jnp.zeros_like(x)
    for found in (
        losses.separable(entry, x, zero, step),
        losses.rows(lambda x: jnp.sum(entry(x), axis=-1), x, zero, step),
        losses.rows(lambda x: jnp.sum(entry(x), axis=-1), x[:, :1], zero[:, :1], step),
    ):
        # To first order the move is that along the slope.
        np.testing.assert_allclose(found / -step, slope[:, : found.shape[1]], rtol=50 * step)
