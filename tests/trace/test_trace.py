"""Programs against the functions that they were traced from; their keys; errors."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.extend.core.primitives import closed_call_p

import pjax
from pjax import optim
from pjax.graph import bipartite, build_graph
from pjax.program import LOSSES, TraceError, keys, program
from pjax.trace import flatten, trace
from pjax.training import optimizer as solves

BATCH, INPUTS, CLASSES = 5, 6, 3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, INPUTS)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, BATCH)
Y = np.eye(CLASSES, dtype=np.float32)[LABELS]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def mlp_params() -> dict[str, Any]:
    return {
        "w": [normal(INPUTS, 4), normal(4, CLASSES)],
        "b": [normal(4), normal(CLASSES)],
    }


def mlp(params, x):
    x = jax.nn.relu(x @ params["w"][0] + params["b"][0])
    return x @ params["w"][1] + params["b"][1]


def loss(logits):
    return jnp.mean(pjax.cross_entropy(logits, jnp.asarray(Y)))


# --- Models: each returns a function and its parameters ------------------------------------------

MODELS: dict[str, Any] = {}


def model(function):
    MODELS[function.__name__] = function
    return function


@model
def plain():
    return lambda p: loss(mlp(p, X)), mlp_params()


@model
def flax_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(INPUTS, 4, rngs=rngs)
            self.norm_count = nnx.Variable(jnp.array(3, jnp.int32))
            self.last = nnx.Linear(4, CLASSES, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    return lambda p: loss(nnx.merge(graphdef, p, rest)(X)), params


@model
def flax_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.leaky_relu(linen.Dense(4)(x))
            return linen.Dense(CLASSES, use_bias=False)(x)

    net = Net()
    params = net.init(jax.random.key(0), X)
    return lambda p: loss(net.apply(p, X)), params  # pyright: ignore


@model
def equinox_under_vmap():
    net = eqx.nn.MLP(INPUTS, CLASSES, 4, 2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    return lambda p: loss(jax.vmap(eqx.combine(p, static))(X)), params


@model
def nested_calls():
    """jit in vmap in jit, remat, custom derivatives and batching, all closing over data."""
    scale = normal(4)

    @jax.custom_jvp
    def doubled(x):
        return x + x * scale

    doubled.defjvp(lambda primals, tangents: (doubled(*primals), tangents[0]))

    @jax.custom_vjp
    def shifted(x):
        return x - scale

    shifted.defvjp(lambda x: (shifted(x), None), lambda _, g: (g,))

    @custom_vmap
    def clipped(x):
        return jnp.clip(x, -1.0, 1.0)

    clipped.def_vmap(lambda size, batched, x: (jnp.clip(x, -1.0, 1.0), True))

    @jax.jit
    def row(p, x):
        hidden = jax.jit(lambda v: v @ p["w"][0])(x)
        hidden = clipped(shifted(doubled(hidden)))
        return jax.checkpoint(lambda h: jax.nn.relu(h) @ p["w"][1])(hidden)

    return lambda p: jax.jit(lambda q: loss(jax.vmap(functools.partial(row, q))(X)))(
        p
    ), mlp_params()


@model
def custom_vmap_not_batched():
    @custom_vmap
    def clipped(x):
        return jnp.clip(x, -1.0, 1.0)

    clipped.def_vmap(lambda size, batched, x: (jnp.clip(x, -1.0, 1.0), True))
    return lambda p: loss(clipped(mlp(p, X))), mlp_params()


@model
def one_function_twice():
    @jax.jit
    def layer(w, x):
        return jax.nn.relu(x @ w)

    params = {"u": normal(INPUTS, INPUTS), "v": normal(INPUTS, CLASSES)}
    return lambda p: loss(layer(p["v"], layer(p["u"], layer(p["u"], X)))), params


@model
def control_flow_on_data():
    def fn(p):
        def body(carry, row):
            return carry * 0.5 + row, carry

        _, running = jax.lax.scan(body, jnp.zeros(INPUTS), X)
        steps, _ = jax.lax.while_loop(
            lambda c: c[1] < 5.0, lambda c: (c[0] + 1, c[1] * 2), (0, 1 + 0 * X[0, 0])
        )
        x = jax.lax.cond(steps > 2, lambda a: a + running, lambda a: a, X)
        x = jax.lax.fori_loop(0, 3, lambda i, a: a + i, x)
        return loss(mlp(p, x))

    return fn, mlp_params()


@model
def dropout_with_a_key():
    key = jax.random.key(7)

    def fn(p):
        keep = jax.random.bernoulli(key, 0.6, (BATCH, 4))
        h = jax.nn.relu(X @ p["w"][0])
        return loss(jnp.where(keep, h / 0.6, 0) @ p["w"][1])

    return fn, mlp_params()


@model
def keys_as_leaves():
    def fn(p):
        h = jax.nn.relu(X @ p["w"][0])
        keep = jax.random.bernoulli(p["key"], 0.5, h.shape)
        keep &= jax.random.bernoulli(p["old_key"], 0.5, h.shape)
        return loss(jnp.where(keep, h, 0) @ p["w"][1])

    old = jax.random.key_data(jax.random.key(5))
    return fn, {**mlp_params(), "key": jax.random.key(3), "old_key": old}


@model
def linen_dropout():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dropout(0.5, deterministic=False)(linen.Dense(4)(x))
            return linen.Dense(CLASSES)(x)

    net = Net()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = net.init(rngs, X)

    def fn(p):
        return loss(net.apply(p, X, rngs={"dropout": jax.random.key(2)}))  # pyright: ignore

    return fn, params


@model
def stop_gradient():
    def fn(p):
        out = mlp(p, X)
        rest = jax.lax.stop_gradient(jnp.exp(out).sum(-1, keepdims=True))
        return loss(out / rest + jax.lax.stop_gradient(jnp.tanh(p["b"][1])))

    return fn, mlp_params()


@model
def frozen_leaves():
    params = {
        **mlp_params(),
        "indices": jnp.array([2, 0, 0, -1]),
        "mask": jnp.array([True, False, True, True]),
        "steps": jnp.array(4),
    }

    def fn(p):
        h = jax.nn.relu(X @ p["w"][0])[:, p["indices"]]
        h = jnp.where(p["mask"], h, 0.0) * jnp.where(p["steps"] > 3, 0.5, 1.0)
        return loss(h @ p["w"][1])

    return fn, params


@model
def numbers_and_weak_types():
    params = {
        **mlp_params(),
        "python": 0.5,
        "numpy": np.float32(0.25),
        "weak": jnp.asarray(2.0),
        "wide": np.ones(CLASSES),
        "count": 3,
    }

    def fn(p):
        out = mlp(p, X) * p["weak"] + p["python"] - p["numpy"] + p["wide"]
        return loss(out * jnp.where(p["count"] > 2, 0.5, 1.0))

    return fn, params


@model
def bfloat16_parts():
    def fn(p):
        h = X.astype(jnp.bfloat16) @ p["w"][0].astype(jnp.bfloat16)
        h = jax.nn.relu(h + p["half"])
        return loss(h.astype(jnp.float32) @ p["w"][1])

    return fn, {**mlp_params(), "half": normal(4).astype(jnp.bfloat16)}


@model
def wiring():
    start = jnp.array(1)

    def fn(p):
        h = X @ p["w"][0]
        parts = [h[:, jnp.array([0, 3, 3, -1])], jnp.pad(h, ((0, 0), (1, 2)))[:, :4], h[:, ::-1]]
        parts += [jnp.where(X[:, :4] > 0, h, -1.0), jnp.roll(h, start, axis=1)]
        parts += [jax.lax.dynamic_slice(h, (0, start), (BATCH, 2)).repeat(2, axis=1)]
        parts += [jnp.concatenate(jnp.split(h, 2, axis=1)[::-1], axis=1)]
        parts += [h.at[:, 1].set(p["b"][0][0]), jnp.tile(h[:, :2], (1, 2)), jnp.flip(h)]
        h = jnp.stack(parts, axis=0).sum(0)
        return loss(h @ p["w"][1])

    return fn, mlp_params()


@model
def einsum():
    def fn(p):
        return loss(jnp.einsum("bi,iho,hg->bo", X, p["a"], p["g"]))

    return fn, {"a": normal(INPUTS, 2, CLASSES), "g": normal(2, 2)}


@model
def piecewise_functions():
    def fn(p):
        h = X @ p["w"][0]
        for f in (jax.nn.relu6, jax.nn.hard_tanh, jax.nn.hard_sigmoid, jax.nn.leaky_relu, jnp.abs):
            h = h + f(h - 0.5)
        h = h + jnp.sign(h) + pjax.step(h) + jnp.round(h, 1) + pjax.quantize(h, 4, -1.0, 1.0)
        return loss(jnp.maximum(h, X[:, :4]) @ p["w"][1])

    return fn, mlp_params()


@model
def several_losses():
    weights = jnp.arange(BATCH, dtype=jnp.float32)

    def fn(p):
        out = mlp(p, X)
        rows = pjax.cross_entropy(out, Y) + 0.5 * pjax.margin_loss(out, Y, 2.0)
        squared = pjax.squared_error(X @ p["w"][0], X[:, :4])
        return jnp.dot(weights, rows) + jnp.mean(squared, where=X[:, 0] > 0)

    return fn, mlp_params()


@model
def loss_under_vmap():
    def fn(p):
        def one(x, y):
            return pjax.cross_entropy(mlp(p, x), y)

        return jax.vmap(one, in_axes=(1, 1))(X.T, Y.T).sum()

    return fn, mlp_params()


@model
def embedding():
    tokens = jnp.array([[0, 2], [2, 2], [-1, 1], [3, 0], [1, 1]])
    params = {"table": normal(4, 3), "w": normal(6, CLASSES)}
    return lambda p: loss(p["table"][tokens].reshape(BATCH, -1) @ p["w"]), params


@model
def arrays_from_numpy_and_literals():
    def fn(p):
        out = mlp(p, X) * np.linspace(0, 1, CLASSES) + np.arange(CLASSES)
        return loss(jnp.maximum(out, np.float32(-0.0)) + 1e-3)

    return fn, mlp_params()


@model
def checkpoint_names_and_barriers():
    from jax.ad_checkpoint import checkpoint_name

    def fn(p):
        out = checkpoint_name(mlp(p, X), "out")
        return loss(jax.device_put(jax.lax.optimization_barrier(jnp.array(out, copy=True))))

    return fn, mlp_params()


@pytest.mark.parametrize("name", MODELS)
def test_evaluate_equals_the_function(name):
    fn, params = MODELS[name]()
    program, leaves, consts, _ = trace(fn, params)
    # Both in one compilation, and that without optimisations: most of the time goes into XLA.
    both = jax.jit(
        lambda leaves, consts, params: (program.evaluate(leaves, consts), fn(params)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    values, expected = both(leaves, consts, params)
    (output,) = program.outputs
    np.testing.assert_allclose(values[output], expected, rtol=2e-6)
    # Every value has the type that the program says, and is defined once.
    assert sorted(values) == list(range(len(program.avals)))
    for var, value in values.items():
        assert (value.shape, value.dtype) == (program.shape(var), program.dtype(var))
    for var, number in program.uniform.items():
        np.testing.assert_array_equal(values[var], number)
        assert var not in program.variable
    # Every operation has a rule.
    graph = bipartite(build_graph(program))
    assert len(graph.losses) == sum(e.primitive in LOSSES for e in program.equations)
    # What is known does not change with the parameters, except through `stop_gradient`.
    if name not in ("stop_gradient", "nested_calls"):  # the second has a derivative of its own
        shifted = [
            leaf + 0.25 if info.trainable else leaf
            for leaf, info in zip(leaves, program.leaves, strict=True)
        ]
        moved, _ = both(shifted, consts, params)
        changed = {v for v in values if not _same(values[v], moved[v])}
        assert changed
        assert changed <= program.variable


def _same(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.array_equal(a, b, equal_nan=jnp.issubdtype(a.dtype, jnp.floating))


def test_closed_calls_are_inlined():
    """`closed_call` has no public front end: exchange the primitive of a `jit` equation."""
    params = mlp_params()
    closed = jax.make_jaxpr(lambda *ls: jax.jit(lambda w: loss(jax.nn.relu(X @ w)))(*ls))(
        params["w"][0][:, :CLASSES]
    )
    (eqn,) = closed.jaxpr.eqns
    eqn = eqn.replace(primitive=closed_call_p, params={"call_jaxpr": eqn.params["jaxpr"]})
    closed = closed.replace(jaxpr=closed.jaxpr.replace(eqns=[eqn]))
    program, consts = flatten.Flattener().flatten(closed, ["w"])
    assert "closed_call" not in [e.name for e in program.equations]
    values = program.evaluate([params["w"][0][:, :CLASSES]], consts)
    expected = loss(jax.nn.relu(X @ params["w"][0][:, :CLASSES]))
    np.testing.assert_allclose(values[program.outputs[0]], expected, rtol=1e-6)  # pyright: ignore


def test_evaluate_inside_an_outer_jit_that_closes_over_the_batch():
    params = mlp_params()

    @jax.jit
    def outer(x, y):
        def fn(p):
            inner = jax.jit(lambda q: mlp(q, x))  # closes over a tracer of `outer`
            return jnp.mean(pjax.cross_entropy(inner(p) + jnp.maximum(x[:, :3], 0.0), y))

        program, leaves, consts, _ = trace(fn, params)
        assert any(isinstance(const, Tracer) for const in consts)
        return program.evaluate(leaves, consts)[program.outputs[0]], fn(params)  # pyright: ignore

    value, expected = outer(X, Y)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_an_update_inside_an_outer_jit_equals_one_outside():
    params = normal(INPUTS, CLASSES)
    optimizer = optim.AlternatingProjections(steps_per_update=2)

    def update(params, x, y):
        return optimizer.update(lambda p: pjax.cross_entropy(x @ p, y), params)[0]

    inside, outside = jax.jit(update)(params, X, Y), update(params, X, Y)
    np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(inside, params)


# --- Keys ----------------------------------------------------------------------------------------


def key_of(fn, params=None):
    return trace(fn, mlp_params() if params is None else params)[0].key


def fresh(number):
    """A new closure over new data; nothing about the program depends on `number`."""
    x, y = X + number, jnp.asarray(Y)
    scale = jnp.float32(number)

    @jax.jit
    def inner(p):
        return mlp(p, x) * scale

    @jax.custom_jvp
    def outer(h):
        return h + x[:, :CLASSES]

    outer.defjvp(lambda primals, tangents: (outer(*primals), tangents[0]))

    def fn(p):
        _, sums = jax.lax.scan(lambda c, r: (c + r * scale, c), jnp.zeros(INPUTS), x)
        flag = jax.lax.cond(sums[0, 0] > scale, lambda: 1.0, lambda: 2.0)
        return jnp.mean(pjax.cross_entropy(outer(inner(p)) * flag, y))

    return fn


def test_fresh_closures_have_one_key():
    keys = [key_of(fresh(number)) for number in (1, 2)]
    assert keys[0] == keys[1]
    assert hash(keys[0]) == hash(keys[1])
    programs = [trace(fresh(number), mlp_params()) for number in (1, 2)]
    # The data are inputs, wherever they were captured.
    for (_, _, consts, _), number in zip(programs, (1, 2), strict=True):
        assert any(np.array_equal(const, X + number) for const in consts)


def test_a_hundred_fresh_closures_compile_once():
    optimizer = optim.AlternatingProjections(steps_per_update=2)
    params, losses = normal(INPUTS, CLASSES), []

    def update(number):
        x, y = jnp.asarray(X * (1 + number)), jnp.asarray(Y)
        model = jax.jit(lambda p: x @ p)
        return optimizer.update(lambda p: pjax.cross_entropy(model(p), y), params)

    update(0)
    size = solves._solve._cache_size()  # pyright: ignore
    for number in range(1, 100):
        _, history = update(number)
        losses.append(float(jnp.sum(history.loss)))
    assert solves._solve._cache_size() == size  # pyright: ignore
    assert len(set(losses)) == 99  # each solve saw its own data


def tail(change):
    """A program around one difference."""
    return lambda p: jnp.mean(pjax.squared_error(change(mlp(p, jnp.asarray(X))), jnp.zeros((5, 3))))


def known(change):
    """A program in which data is changed, inside known control flow."""

    def fn(p):
        x = jax.lax.fori_loop(0, 2, lambda i, a: change(a), jnp.asarray(X))
        return jnp.mean(pjax.squared_error(mlp(p, x), jnp.zeros((5, 3))))

    return fn


DIFFERENT = {
    "literal": (tail(lambda h: h * 2.0), tail(lambda h: h * 3.0)),
    "sign of zero": (tail(lambda h: jnp.maximum(h, 0.0)), tail(lambda h: jnp.maximum(h, -0.0))),
    "operation": (tail(lambda h: jnp.maximum(h, 0.5)), tail(lambda h: jnp.minimum(h, 0.5))),
    "order": (tail(lambda h: 1.0 - h), tail(lambda h: h - 1.0)),
    "parameter of a primitive": (
        tail(lambda h: pjax.quantize(h, 4)),
        tail(lambda h: pjax.quantize(h, 5)),
    ),
    "float parameter": (
        tail(lambda h: pjax.quantize(h, 4, -0.0)),
        tail(lambda h: pjax.quantize(h, 4, 0.0)),
    ),
    "permutation": (tail(lambda h: h[::-1]), tail(lambda h: h[:, ::-1])),
    "shape of data": (
        tail(lambda h: h + jnp.asarray(X[:, :1])),
        tail(lambda h: h + jnp.asarray(X[:, :3])),
    ),
    "dtype of data": (
        tail(lambda h: jnp.where(jnp.asarray(X[:, :3] > 0), h, 0)),
        tail(lambda h: jnp.where(jnp.asarray(LABELS[:, None] * [1, 1, 1]) > 0, h, 0)),
    ),
    "literal in known control flow": (known(lambda a: a * 2.0), known(lambda a: a * 3.0)),
    "sign of zero in known control flow": (
        known(lambda a: jnp.maximum(a, 0.0)),
        known(lambda a: jnp.maximum(a, -0.0)),
    ),
    "operation in known control flow": (known(jnp.sin), known(jnp.cos)),
    "order in known control flow": (known(lambda a: a - 1.0), known(lambda a: 1.0 - a)),
    "parameter in nested known control flow": (
        known(lambda a: jax.lax.cond(a[0, 0] > 0, lambda b: jnp.cumsum(b, 0), lambda b: b, a)),
        known(lambda a: jax.lax.cond(a[0, 0] > 0, lambda b: jnp.cumsum(b, 1), lambda b: b, a)),
    ),
    "wiring of losses": (
        lambda p: jnp.mean(pjax.cross_entropy(mlp(p, X), Y)),
        lambda p: jnp.mean(pjax.margin_loss(mlp(p, X), Y)),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_programs_that_differ_have_different_keys(name):
    first, second = DIFFERENT[name]
    assert key_of(first) == key_of(first)
    assert key_of(first) != key_of(second)


def test_true_and_one_differ():
    canonical = keys.canonical
    assert canonical({"a": True}) != canonical({"a": 1}) != canonical({"a": 1.0})
    assert canonical(0.0) != canonical(-0.0)
    assert canonical(float("nan")) == canonical(float("nan"))
    scalar = program.Scalar
    assert canonical(scalar(True, np.dtype(bool))) != canonical(scalar(1, np.dtype(np.int32)))
    assert canonical((1, 2)) != canonical([1, 2])
    assert canonical(np.ones(2)) != canonical(np.ones(2))  # unhashable: itself only


def test_dtypes_shapes_and_names_of_leaves_are_in_the_key():
    def fn(p):
        return jnp.mean(pjax.squared_error(p[next(iter(p))] * 1.0, jnp.zeros((2, 2), jnp.float32)))

    base = key_of(fn, {"a": jnp.ones((2, 2))})
    assert base == key_of(fn, {"a": np.full((2, 2), 7, np.float32)})
    assert base != key_of(fn, {"a": jnp.ones((2, 2), jnp.bfloat16)})
    assert base != key_of(fn, {"b": jnp.ones((2, 2))})  # nodes are named after leaves
    assert base != key_of(fn, {"a": jnp.ones((2, 2)), "b": jnp.ones(3)})


def test_two_equal_constants_stay_two():
    first, second = jnp.full((BATCH, CLASSES), 0.5), jnp.full((BATCH, CLASSES), 0.5)
    params = mlp_params()

    def fn(a, b):
        return lambda p: jnp.mean(pjax.squared_error(jnp.maximum(mlp(p, X) + a, b), Y))

    program, _, consts, _ = trace(fn(first, second), params)
    halves = [const for const in consts if np.all(np.asarray(const) == 0.5)]
    assert len(halves) == 2
    # The program for one pair of equal constants serves a pair of unequal ones.
    other, leaves, consts, _ = trace(fn(first, second + 1), params)
    assert other.key == program.key
    value = program.evaluate(leaves, consts)[program.outputs[0]]  # pyright: ignore
    np.testing.assert_allclose(value, fn(first, second + 1)(params), rtol=1e-6)


def test_dead_code_and_unread_data_are_dropped():
    def fn(p):
        jnp.tanh(mlp(p, X)).sum()
        jnp.exp(jnp.asarray(X))
        return loss(mlp(p, X[:, ::-1]))

    def same(p):
        return loss(mlp(p, X[:, ::-1]))

    assert "tanh" not in [e.name for e in trace(fn, mlp_params())[0].equations]
    assert key_of(fn) == key_of(same)


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", [jnp.tanh, "text", np.array(["a"]), object()])
def test_a_leaf_that_is_no_array_is_named(leaf):
    with pytest.raises(TypeError, match=r"`params\['a'\]\[0\]` is a .*eqx.partition.*nnx.split"):
        trace(lambda p: loss(mlp(p, X)), {"a": [leaf], **mlp_params()})


def test_of_an_equinox_model_the_floating_point_arrays_are_leaves():
    net = eqx.nn.MLP(INPUTS, CLASSES, 4, 1, key=jax.random.key(0))
    program, leaves, *_ = trace(lambda m: loss(jax.vmap(m)(X)), net)
    arrays = jax.tree_util.tree_flatten_with_path(eqx.filter(net, eqx.is_inexact_array))[0]
    assert [leaf.path for leaf in program.leaves] == [jax.tree_util.keystr(p) for p, _ in arrays]
    assert all(a is b for a, (_, b) in zip(leaves, arrays, strict=True))


def test_a_single_array_of_parameters_is_called_params():
    with pytest.raises(TypeError, match=r"`params` is a str"):
        trace(lambda p: loss(p), "text")
    program = trace(lambda p: loss(X @ p), normal(INPUTS, CLASSES))[0]
    assert build_graph(program).parameters[0].name == "params"


@pytest.mark.parametrize(
    "use",
    [
        lambda p: X @ p["n"],
        lambda p: X @ p["n"].T.reshape(INPUTS, CLASSES),
        lambda p: mlp(p, X) + (2 * p["n"][0] + 1),
        lambda p: mlp(p, X) * p["n"].sum(),
        lambda p: jax.jit(lambda q: X @ q["n"])(p),
    ],
)
def test_an_integer_parameter_used_as_a_number(use):
    params = {**mlp_params(), "n": jnp.ones((INPUTS, CLASSES), jnp.int32)}
    with pytest.raises(
        TypeError, match=r"`params\['n'\]` is an integer array \(int32\).*test_trace"
    ):
        trace(lambda p: loss(use(p)), params)


def test_integer_parameters_alone():
    params = {"w": jnp.ones((4, 3), jnp.int32)}
    program = trace(lambda p: loss(jax.nn.one_hot(p["w"][:, 0].sum() + LABELS, 3)), params)[0]
    with pytest.raises(TraceError, match="does not depend on any parameter that can move"):
        build_graph(program)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.float16, jnp.float8_e4m3fn])
def test_types_that_cannot_be_projected(dtype):
    params = {"w": jnp.ones((INPUTS, CLASSES), dtype)}
    with pytest.raises(TypeError, match=r"`params\['w'\]` is (complex|float16|float8)"):
        trace(lambda p: loss(X @ p["w"].astype(jnp.float32)), params)


def test_a_narrow_value_inside_the_function_is_named():
    def fn(p):
        return loss(mlp(p, X).astype(jnp.float16).astype(jnp.float32))

    with pytest.raises(TypeError, match=r"`convert_element_type` \(.*test_trace.*float16"):
        trace(fn, mlp_params())
    # A narrow value of the data is none of our business.
    trace(lambda p: loss(mlp(p, X.astype(jnp.float16).astype(jnp.float32))), mlp_params())
