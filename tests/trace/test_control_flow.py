"""Loops, branches and choices: the same graph as plain equations, and the same displacement."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics
from pjax.graph import build_graph
from pjax.problem import State, feasibility_problem
from pjax.program import TraceError
from pjax.trace import trace
from tests.selection import mostly_slow

#: So stiff and with so short a prox step that only rounding is left between the two.
LIMIT = metrics.Spectral(activations=1e8, prox_step=1e-7)
STEPS, ROWS, WIDTH, CLASSES, SYMBOLS = 5, 6, 4, 3, 7


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "u": (WIDTH, WIDTH),
        "w": (WIDTH, WIDTH),
        "gate": (2 * WIDTH, WIDTH),
        "table": (SYMBOLS, WIDTH),
        "head": (WIDTH, CLASSES),
        "bias": (WIDTH,),
    }
    return {name: jnp.asarray(rng.normal(size=s) / 1.5) for name, s in shapes.items()}


def data(seed=1):
    rng = np.random.default_rng(seed)
    xs = jnp.asarray(rng.normal(size=(STEPS, ROWS, WIDTH)))
    tokens = jnp.asarray(rng.integers(0, 3, (STEPS, ROWS)))  # few symbols: all of them repeat
    labels = jax.nn.one_hot(rng.integers(0, CLASSES, ROWS), CLASSES, dtype=xs.dtype)
    return xs, tokens, labels


def used(params, *names):
    return {name: params[name] for name in names}


def close(found, expected, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.max(jnp.abs(b))))


def cell(p, h, x):
    h = jax.nn.relu(h @ p["u"] + x @ p["w"] + p["bias"])
    return h, {"h": h, "pair": (h, 2 * x)}


def end(p, h, ys, labels):
    read = h + ys["h"][0] + ys["pair"][0].sum(0) + ys["pair"][1][1]
    return jnp.mean(pjax.cross_entropy(read @ p["head"], labels))


def scanned(p, reverse=False, body=cell):
    xs, _, labels = data()
    h, ys = jax.lax.scan(
        lambda h, x: body(p, h, x), jnp.zeros((ROWS, WIDTH), xs.dtype), xs, reverse=reverse
    )
    return end(p, h, ys, labels)


def by_hand(p, reverse=False):
    xs, _, labels = data()
    found: list[Any] = [None] * STEPS
    h = jnp.zeros((ROWS, WIDTH), xs.dtype)
    entries = [jax.lax.squeeze(e, (0,)) for e in jax.lax.split(xs, (1,) * STEPS)]
    for step in reversed(range(STEPS)) if reverse else range(STEPS):
        h, found[step] = cell(p, h, entries[step])
    return end(p, h, jax.tree.map(lambda *a: jnp.stack(a), *found), labels)


def names(fn, params, splitting="layer"):
    return [node.name for node in build_graph(trace(fn, params)[0], splitting).nodes]


RNN = ("u", "w", "bias", "head")


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_the_program_that_is_written_by_hand(x64, reverse):
    """The same key: everything that is compiled for one serves the other."""
    params = used(make_params(), *RNN)
    first = trace(lambda p: scanned(p, reverse), params)[0]
    second = trace(lambda p: by_hand(p, reverse), params)[0]
    assert [e.name for e in first.equations] == [e.name for e in second.equations]
    assert first.key == second.key


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_scan_within_other_calls(x64, wrap):
    params = used(make_params(), *RNN)
    assert names(lambda p: wrap(scanned)(p), params) == names(by_hand, params)
    assert names(lambda p: scanned(p, body=wrap(cell)), params) == names(by_hand, params)


@pytest.mark.parametrize("reverse", mostly_slow([False, True], [True]))
def test_the_stiff_limit_through_a_scan(x64, reverse):
    params = used(make_params(), *RNN)
    found = pjax.displacement(lambda p: scanned(p, reverse), metric=LIMIT)(params)
    close(found, jax.jit(jax.grad(lambda p: scanned(p, reverse)))(params))


def nested(p):
    """A scan within a scan, two carries, and no `xs` in the inner one."""
    xs, _, labels = data()

    def outer(carry, x):
        h, total = carry

        def inner(h, _):
            return jax.nn.relu(h @ p["u"] + x), None

        h, _ = jax.lax.scan(inner, h, None, length=2)
        return (h, total + h), None

    zero = jnp.zeros((ROWS, WIDTH), xs.dtype)
    (_, total), _ = jax.lax.scan(outer, (zero, zero), xs)
    return jnp.mean(pjax.cross_entropy(total @ p["head"], labels))


def gated(p):
    """The gating of a GRU, with a relu that saturates at 1 in the place of a sigmoid."""
    xs, _, labels = data()

    def body(h, x):
        gate = jnp.minimum(jax.nn.relu(jnp.concatenate([h, x], -1) @ p["gate"] + 0.5), 1.0)
        new = jax.nn.relu(x @ p["w"] + (gate * h) @ p["u"])
        return gate * h + (1 - gate) * new, None

    h, _ = jax.lax.scan(body, jnp.ones((ROWS, WIDTH), xs.dtype), xs)
    return jnp.mean(pjax.cross_entropy(h @ p["head"], labels))


def looped(p):
    """`fori_loop` with fixed bounds, the step's number, and `cond` and `switch` on it."""
    xs, _, labels = data()

    def body(i, h):
        h = jax.lax.cond(i == 0, lambda: h @ p["u"], lambda: jax.nn.relu(h @ p["w"]))
        return jax.lax.switch(i % 3, [lambda: h, lambda: 2 * h, lambda: h + xs[i]])

    h = jax.lax.fori_loop(0, 4, body, xs[0])
    return jnp.mean(pjax.cross_entropy(h @ p["head"], labels))


def embedded(p):
    """Repeated tokens, one table read at every step of a scan."""
    _, tokens, labels = data()

    def body(h, entry):
        return jax.nn.relu(h @ p["u"] + entry + p["bias"]), None

    h = jnp.ones((ROWS, WIDTH), p["table"].dtype)
    h, _ = jax.lax.scan(body, h, p["table"][tokens])
    return jnp.mean(pjax.cross_entropy(h @ p["head"], labels))


def looked_up_in_the_body(p):
    _, tokens, labels = data()

    def body(h, t):
        return jax.nn.relu(h @ p["u"] + jnp.take(p["table"], t, axis=0)), None

    h, _ = jax.lax.scan(body, jnp.ones((ROWS, WIDTH), p["table"].dtype), tokens)
    return jnp.mean(pjax.cross_entropy(h @ p["head"], labels))


def concatenated(p):
    """State and entry in one operand; in the first step it depends on parameters only, later it
    does not. Each step reads symbols that those before do not.
    """
    _, tokens, labels = data()

    def body(h, entry):
        return jax.nn.relu(jnp.concatenate([h, entry], -1) @ p["gate"] + 0.5), None

    entries = p["table"][tokens + jnp.arange(STEPS)[:, None]]
    h, _ = jax.lax.scan(body, jnp.zeros((ROWS, WIDTH), entries.dtype), entries)
    return jnp.mean(pjax.cross_entropy(h @ p["head"], labels))


def tied(p):
    """Embedding and output weights are one table."""
    _, tokens, _ = data()
    h = p["table"][tokens[:-1]] @ p["u"]
    labels = jax.nn.one_hot(tokens[1:], SYMBOLS, dtype=h.dtype)
    return jnp.mean(pjax.cross_entropy(jax.nn.relu(h) @ p["table"].T, labels))


@pytest.mark.parametrize(
    ("fn", "read"),
    [
        pytest.param(nested, ("u", "head"), marks=pytest.mark.slow),
        pytest.param(gated, ("gate", "w", "u", "head"), marks=pytest.mark.slow),
        (looped, ("u", "w", "head")),
        (embedded, ("u", "table", "bias", "head")),
        (looked_up_in_the_body, ("u", "table", "head")),
        (concatenated, ("gate", "table", "head")),
        pytest.param(tied, ("u", "table"), marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_stiff_limit_is_the_gradient(x64, fn, read):
    params = used(make_params(2), *read)
    value, found = pjax.value_and_displacement(fn, metric=LIMIT)(params)
    expected_value, expected = jax.jit(jax.value_and_grad(fn))(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    close(found, expected)


def test_pure_projection_moves_parameters_beside_activations():
    xs, tokens, labels = data()

    def fn(p):
        entries = jnp.concatenate([jax.nn.relu(xs[0] @ p["w"]), p["table"][tokens[0]]], -1)
        return jnp.mean(pjax.cross_entropy(entries @ p["gate"] @ p["head"], labels))

    params = used(make_params(2), "w", "gate", "table", "head")
    optimizer = pjax.optim.CyclicProjections(splitting="layer")
    moved, _ = optimizer.update(fn, params)
    assert fn(moved) < fn(params)
    rows = jnp.any(moved["table"] != params["table"], axis=1)
    np.testing.assert_array_equal(rows, np.isin(np.arange(SYMBOLS), tokens[0]))


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_tokens_out_of_bounds(x64, mode):
    """`clip` reads the last row, `fill` a constant that rests."""
    tokens = jnp.asarray([0, 2, 2, 99, 99, 1])

    def fn(p):
        kwargs = {"fill_value": 1.5} if mode == "fill" else {}
        read = jnp.take(p["table"], tokens, axis=0, mode=mode, **kwargs)
        return jnp.mean(pjax.cross_entropy(read @ p["head"], data()[2]))

    params = used(make_params(), "table", "head")
    close(pjax.displacement(fn, metric=LIMIT)(params), jax.jit(jax.grad(fn))(params))


def test_a_table_and_one_hot_rows_displace_alike(x64):
    tokens = data()[1][0]

    def by_gather(p):
        return jnp.mean(pjax.cross_entropy(p["table"][tokens] @ p["head"], data()[2]))

    def by_product(p):
        rows = jax.nn.one_hot(tokens, SYMBOLS, dtype=p["table"].dtype) @ p["table"]
        return jnp.mean(pjax.cross_entropy(rows @ p["head"], data()[2]))

    params = used(make_params(), "table", "head")
    first, second = (pjax.displacement(fn, metric=LIMIT)(params) for fn in (by_gather, by_product))
    close(first, second)


def test_the_consensus_of_repeated_tokens(x64):
    """The table's projection is the weighted mean of all that read a row, by brute force; rows
    that nothing reads stay.
    """
    xs, tokens, labels = data()

    def fn(p):
        entries = p["table"][tokens]
        _, ys = jax.lax.scan(lambda h, e: (h, jax.nn.relu(e + xs[0])), xs[0], entries)
        return jnp.mean(pjax.cross_entropy(ys.sum(0) @ p["head"], labels))

    params = used(make_params(), "table", "head")
    problem = feasibility_problem(fn, params, grouping="levels")
    table = next(n for n in problem.graph.parameters if n.name == "['table']")
    assert table.output is not None
    readers = [s for s in problem.graph.slots if table.index in s.producers]
    assert len(readers) == STEPS  # one wire per step, of one lookup
    rng = np.random.default_rng(3)
    slots = list(problem.initial().slots)
    for slot in readers:
        slots[slot.index] = jnp.asarray(rng.normal(size=slot.shape))
    found = problem.parameter_deviations(State(tuple(slots)))[table.output]
    total = np.zeros((SYMBOLS, WIDTH))
    weights = np.zeros((SYMBOLS, 1))
    for slot, row in zip(readers, np.asarray(tokens), strict=True):
        rho = float(problem.weights[slot.index].mantissa)
        for place, token in enumerate(row):
            total[token] += rho * np.asarray(slots[slot.index])[place]
            weights[token] += rho
    expected = np.where(weights > 0, total / np.where(weights > 0, weights, 1), 0)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-12)


def test_a_scan_of_known_values_stays_one_equation(x64):
    xs, _, labels = data()

    def fn(p):
        total, _ = jax.lax.scan(lambda c, x: (jnp.tanh(c + x), None), xs[0], xs)
        return jnp.mean(pjax.cross_entropy((total @ p["w"]) @ p["head"], labels))

    program = trace(fn, used(make_params(), "w", "head"))[0]
    assert [e.name for e in program.equations].count("scan") == 1


def test_no_steps_at_all(x64):
    xs, _, labels = data()

    def fn(p):
        h, ys = jax.lax.scan(
            lambda h, x: cell({**make_params(), **p}, h, x), xs[0] @ p["w"], xs[:0]
        )
        return jnp.mean(pjax.cross_entropy((h + ys["h"].sum(0)) @ p["head"], labels))

    params = used(make_params(), "w", "head")
    close(pjax.displacement(fn, metric=LIMIT)(params), jax.jit(jax.grad(fn))(params))


def sorts(p, x):
    return jnp.sort(x @ p["w"], axis=0)[1:]


def picks(p, x):
    return jax.lax.top_k(x @ p["w"], 2)[0] @ p["u"][:2]


def experts(p, x):
    """A row of a table that the largest entry of a computed value chooses."""
    return p["table"][jnp.argmax(x @ p["w"], -1)] + x @ p["w"]


def ordered(p, x):
    return jnp.take_along_axis(x @ p["u"], jnp.argsort(x @ p["w"], -1), -1)


@pytest.mark.parametrize(
    ("fn", "read"),
    [
        (sorts, ("w",)),
        (picks, ("w", "u")),
        (experts, ("w", "table")),
        (ordered, ("u",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_choices_rest_at_the_forward_pass(x64, fn, read):
    xs, _, labels = data()
    fixed = make_params()

    def loss(p):
        out = fn({**fixed, **p}, xs[0])
        return jnp.mean(pjax.cross_entropy(out @ p["head"], labels[: len(out)]))

    params = used(make_params(4), *read, "head")
    close(pjax.displacement(loss, metric=LIMIT)(params), jax.jit(jax.grad(loss))(params))


def test_a_branch_that_depends_on_data_is_a_choice(x64):
    xs, _, labels = data()

    def fn(p):
        h = jax.lax.cond(xs[0, 0, 0] > 0, lambda: xs[0] @ p["w"], lambda: xs[0] @ p["u"])
        return jnp.mean(pjax.cross_entropy(h @ p["head"], labels))

    params = used(make_params(), "w", "u", "head")
    assert {node.name for node in build_graph(trace(fn, params)[0], "layer").parameters} == {
        "['w']", "['u']", "['head']",
    }  # fmt: skip
    close(pjax.displacement(fn, metric=LIMIT)(params), jax.jit(jax.grad(fn))(params))


def test_a_while_loop_over_parameters_is_refused(x64):
    xs, _, labels = data()

    def fn(p):
        h = jax.lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h + 1, xs[0] @ p["w"])
        return jnp.mean(pjax.cross_entropy(h @ p["head"], labels))

    with pytest.raises(TraceError, match=r"(?s)`while` at .*test_control_flow.*fixed number"):
        pjax.displacement(fn)(used(make_params(), "w", "head"))


def test_the_program_grows_by_a_constant_per_step(x64):
    """Of a long loop as of a short one: no step's share depends on the number of steps."""

    def sizes(length):
        def fn(p):
            xs = jnp.tile(data()[0][:1], (length, 1, 1)) @ p["w"]
            h, ys = jax.lax.scan(lambda h, x: (jax.nn.relu(h @ p["u"] + x), h), xs[0], xs)
            return jnp.mean(pjax.cross_entropy((h + ys.sum(0)) @ p["head"], data()[2]))

        graph = build_graph(trace(fn, used(make_params(), "u", "w", "head"))[0], "layer")
        routes = sum(len(slot.route.equations) for slot in graph.slots)
        return np.asarray([len(graph.program.equations), len(graph.slots), routes])

    four, eight, sixteen = map(sizes, (4, 8, 16))
    np.testing.assert_array_equal(sixteen - eight, 2 * (eight - four))


@pytest.mark.slow
def test_forces_of_all_steps_reach_what_comes_before_the_loop():
    # The weights of the steps on the one array that all of them read differ by more than float32.
    x = jax.random.normal(jax.random.key(0), (3, 12, 4))
    p = {
        "embed": jax.random.normal(jax.random.key(1), (4, 4)) / 2,
        "w": jax.random.normal(jax.random.key(2), (4, 4)) / 2,
        "u": jax.random.normal(jax.random.key(3), (4, 4)) / 2,
    }

    def loss(p):
        def step(h, v):
            return jnp.tanh(v @ p["w"] + h @ p["u"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((3, 4)), jnp.swapaxes(x @ p["embed"], 0, 1))
        return pjax.squared_error(h, jnp.ones((3, 4))).sum()

    gradient = jax.jit(jax.grad(loss))(p)
    for metric in (
        pjax.metrics.Spectral(activations=1e6, prox_step=1e-6, power_iterations=1),
        pjax.metrics.Spectral(power_iterations=1),
    ):
        _, moved = pjax.value_and_displacement(loss, metric=metric)(p)
        a, b = moved["embed"].ravel(), gradient["embed"].ravel()
        assert a @ b > 0.98 * jnp.linalg.norm(a) * jnp.linalg.norm(b)
        if metric.activations == 1e6:
            np.testing.assert_allclose(a, b, atol=1e-3 * float(jnp.max(jnp.abs(b))))
