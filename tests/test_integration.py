"""Displacements in the place of gradients: with optax, Flax NNX, Flax Linen, Equinox, `jit` and
`scan`.

A network has the same numbers in every framework, `[(w, b), ...]` with `w` of shape (in, out).
"""

from __future__ import annotations

import itertools

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import pjax
from pjax import metrics
from pjax.lab.data import batch_rows, load
from tests.selection import mostly_slow

SIZES = (12, 16, 14, 5)

#: So stiff and with so short a prox step that a displacement is the gradient up to rounding.
LIMIT = metrics.Spectral(activations=1e8, prox_step=1e-7)


def make_numbers(dtype, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.normal(size=(n, m)) * np.sqrt(2 / n), dtype),
            jnp.asarray(0.1 * rng.normal(size=m), dtype),
        )
        for n, m in itertools.pairwise(sizes)
    ]


def make_batches(dtype, batches, rows=24, seed=1):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(batches, rows, SIZES[0])), dtype)
    y = jax.nn.one_hot(rng.integers(0, SIZES[-1], (batches, rows)), SIZES[-1], dtype=dtype)
    return x, y


def mean_loss(logits, y):
    return jnp.mean(pjax.cross_entropy(logits, y))


def hidden_layers(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x


def network(params, x):
    w, b = params[-1]
    return hidden_layers(params, x) @ w + b


def loss_fn(params, x, y):
    return mean_loss(network(params, x), y)


def assert_close(found, expected, tolerance):
    """Each leaf, relative to its largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(b))))


# --- The four frameworks --------------------------------------------------------------------------


class NnxNetwork(nnx.Module):
    """With a running mean of its last hidden layer, as batch normalisation keeps one."""

    def __init__(self, rngs: nnx.Rngs, dtype=jnp.float32):
        self.layers = nnx.List(
            nnx.Linear(
                n, m, rngs=rngs, param_dtype=dtype, kernel_init=nnx.initializers.zeros_init()
            )
            for n, m in itertools.pairwise(SIZES)
        )
        self.mean = nnx.BatchStat(jnp.zeros(SIZES[-2], dtype))

    def __call__(self, x):
        for layer in list(self.layers)[:-1]:
            x = nnx.relu(layer(x))
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        return self.layers[-1](x)


class LinenNetwork(linen.Module):
    """The same in Linen."""

    dtype: type = jnp.float32

    @linen.compact
    def __call__(self, x):
        for size in SIZES[1:-1]:
            x = linen.relu(linen.Dense(size, param_dtype=self.dtype)(x))
        mean = self.variable("batch_stats", "mean", jnp.zeros, SIZES[-2], self.dtype)
        if not self.is_initializing():
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return linen.Dense(SIZES[-1], param_dtype=self.dtype)(x)


def make_nnx(numbers):
    model = NnxNetwork(nnx.Rngs(0), numbers[0][0].dtype)
    for layer, (w, b) in zip(model.layers, numbers, strict=True):
        assert layer.bias is not None
        layer.kernel[...], layer.bias[...] = w, b
    return model


def read_nnx(layers):
    """The numbers of a model, or of a state of its layers."""
    return [(layers[i].kernel[...], layers[i].bias[...]) for i in range(len(SIZES) - 1)]


def make_linen(numbers):
    dtype = numbers[0][0].dtype
    variables = {
        "params": {f"Dense_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(numbers)},
        "batch_stats": {"mean": jnp.zeros(SIZES[-2], dtype)},
    }
    return LinenNetwork(dtype), variables


def read_linen(params):
    return [(params[f"Dense_{i}"]["kernel"], params[f"Dense_{i}"]["bias"]) for i in range(3)]


class EquinoxNetwork(eqx.Module):
    """`eqx.nn.MLP` has hidden layers of one size only."""

    layers: list[eqx.nn.Linear]

    def __init__(self, numbers):
        self.layers = [
            eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (w.T, b))
            for w, b in numbers
            for layer in [eqx.nn.Linear(*w.shape, key=jax.random.key(0))]
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def read_equinox(model):
    return [(layer.weight.T, layer.bias) for layer in model.layers]


def displace_nnx(numbers, x, y):
    definition, params, rest = nnx.split(make_nnx(numbers), nnx.Param, ...)
    value, moved = pjax.value_and_displacement(
        lambda p: mean_loss(nnx.merge(definition, p, rest, copy=True)(x), y)
    )(params)
    return value, read_nnx(moved["layers"])


def displace_linen(numbers, x, y):
    model, variables = make_linen(numbers)

    def loss(params):
        logits, _ = model.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return mean_loss(logits, y)

    value, moved = pjax.value_and_displacement(loss)(variables["params"])
    return value, read_linen(moved)


def displace_equinox(numbers, x, y):
    params, static = eqx.partition(EquinoxNetwork(numbers), eqx.is_inexact_array)
    value, moved = pjax.value_and_displacement(
        lambda p: mean_loss(jax.vmap(eqx.combine(p, static))(x), y)
    )(params)
    return value, read_equinox(moved)


def check_equal(displace, dtype, tolerance):
    numbers = make_numbers(dtype)
    x, y = (given[0] for given in make_batches(dtype, 1))
    value, found = displace(numbers, x, y)
    expected_value, expected = pjax.value_and_displacement(loss_fn)(numbers, x, y)
    np.testing.assert_allclose(value, expected_value, rtol=tolerance)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
    assert_close(found, expected, tolerance)


FRAMEWORKS = [displace_nnx, displace_linen, displace_equinox]


@pytest.mark.parametrize("displace", FRAMEWORKS)
def test_frameworks_agree_in_float64(x64, displace):
    """The same numbers have the same displacement as in plain JAX."""
    check_equal(displace, jnp.float64, 1e-6)


@pytest.mark.parametrize("displace", mostly_slow(FRAMEWORKS, [displace_linen]))
def test_frameworks_agree_in_float32(displace):
    check_equal(displace, jnp.float32, 1e-5)


# --- optax ----------------------------------------------------------------------------------------


def chain():
    """Everything that would show another scale than a gradient's: the clip is active, the decay is
    not small beside the step, and the rate changes.
    """
    schedule = optax.warmup_cosine_decay_schedule(1e-3, 2e-2, warmup_steps=2, decay_steps=6)
    return optax.chain(
        optax.clip_by_global_norm(0.3), optax.adamw(schedule, eps=1e-3, weight_decay=0.1)
    )


def norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))


def train(value_and_moves, tx, params, xs, ys):
    """A whole epoch as one `scan` in one `jit`."""

    @jax.jit
    def epoch(params, opt_state, xs, ys):
        def step(carry, batch):
            params, opt_state = carry
            value, moves = value_and_moves(params, *batch)
            updates, opt_state = tx.update(moves, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), (value, norm(moves))

        return jax.lax.scan(step, (params, opt_state), (xs, ys))

    (params, _), (values, norms) = epoch(params, tx.init(params), xs, ys)
    return params, values, norms


def test_a_chain_trains_as_with_gradients_in_the_limit(x64):
    """Clipping, decay and a schedule see numbers of a gradient's size: six steps in a scan end
    where those with the gradient do.
    """
    params = make_numbers(jnp.float64)
    batches = make_batches(jnp.float64, 6)
    step = pjax.value_and_displacement(loss_fn, metric=LIMIT)
    found, values, _ = train(step, chain(), params, *batches)
    expected, expected_values, norms = train(jax.value_and_grad(loss_fn), chain(), params, *batches)
    assert float(jnp.min(norms)) > 0.3  # every step is clipped
    assert_close(found, expected, 1e-5)
    assert_close(values, expected_values, 1e-5)


def test_a_state_is_a_carry_of_a_scan():
    params = make_numbers(jnp.float32)
    batches = make_batches(jnp.float32, 8)
    step = pjax.value_and_displacement(loss_fn)

    def body(state, batch):
        (value, moved), state = step.update(state, params, *batch)
        return state, (value, moved)

    first = step.init(params, *(given[0] for given in batches))
    _, (values, moved) = jax.jit(lambda xy: jax.lax.scan(body, first, xy))(batches)
    last = jax.tree.map(lambda leaf: leaf[-1], (values, moved))
    # The power iterations have gone on for longer: sharper bounds, and nothing else.
    assert_close(last, step(params, *(given[-1] for given in batches)), 0.05)


def test_two_half_batches_accumulate_to_the_whole(x64):
    """`optax.MultiSteps`, up to rounding: each row of a mean is asked by itself."""
    params = make_numbers(jnp.float64)
    x, y = (given[0] for given in make_batches(jnp.float64, 1))
    step = pjax.value_and_displacement(loss_fn)
    tx = optax.MultiSteps(optax.sgd(0.1), 2, accumulator_dtype=jnp.float64)
    update = jax.jit(tx.update)
    opt_state, found = tx.init(params), params
    for rows in (slice(0, 12), slice(12, 24)):
        _, moved = step(found, x[rows], y[rows])
        updates, opt_state = update(moved, opt_state, found)
        if rows.start == 0:
            assert all(not jnp.any(leaf) for leaf in jax.tree.leaves(updates))
        found = optax.apply_updates(found, updates)
    assert bool(tx.has_updated(opt_state))
    _, moved = step(params, x, y)
    difference = jax.tree.map(lambda a, b: a - b, found, params)
    assert_close(difference, jax.tree.map(lambda m: -0.1 * m, moved), 1e-12)


def test_rows_without_weight_change_nothing(x64):
    """A padded batch is the batch without the padding, and a sum is N means."""
    params = make_numbers(jnp.float64)
    x, y = (given[0] for given in make_batches(jnp.float64, 1))
    kept = jnp.arange(24) % 3 > 0

    def masked(params, x, y, weights):
        rows = pjax.squared_error(network(params, x), y)
        return jnp.sum(weights * rows) / jnp.sum(weights)

    def mean(params, x, y):
        return jnp.mean(pjax.squared_error(network(params, x), y))

    def total(params, x, y):
        return jnp.sum(pjax.squared_error(network(params, x), y))

    padded = jnp.where(kept[:, None], x, 100.0)
    found = pjax.value_and_displacement(masked)(params, padded, y, kept.astype(x.dtype))
    expected = pjax.value_and_displacement(mean)(params, x[kept], y[kept])
    assert_close(found, expected, 1e-9)
    summed = pjax.value_and_displacement(total)(params, x[kept], y[kept])
    assert_close(summed, jax.tree.map(lambda leaf: 16 * leaf, expected), 1e-9)


def test_arguments_auxiliaries_and_integers(x64):
    """Two arguments are parameters, one with a counter; the accuracy and hidden means come along:
    all as from `jax.value_and_grad`, and a filter keeps the counter from the optimiser.
    """
    *layers, head = make_numbers(jnp.float64)
    body = {"layers": layers, "count": jnp.arange(3)}
    x, y = (given[0] for given in make_batches(jnp.float64, 1))

    def loss(body, x, head):
        params = [*body["layers"], head]
        logits = network(params, x)
        hits = jnp.argmax(logits, -1) == jnp.argmax(y, -1)
        aux = {"accuracy": jnp.mean(hits), "hidden": hidden_layers(params, x).mean(0)}
        return mean_loss(logits, y), aux

    step = pjax.value_and_displacement(loss, has_aux=True, argnums=(0, 2), metric=LIMIT)
    (value, aux), moved = jax.jit(step)(body, x, head)
    (expected_value, expected_aux), gradient = jax.jit(
        jax.value_and_grad(loss, has_aux=True, argnums=(0, 2), allow_int=True)
    )(body, x, head)
    assert_close((value, aux), (expected_value, expected_aux), 1e-12)
    assert 0 < float(aux["accuracy"]) < 1
    assert moved[0]["count"].dtype == gradient[0]["count"].dtype == jax.dtypes.float0
    assert moved[0]["count"].shape == (3,)
    floats = eqx.filter(moved, eqx.is_inexact_array)
    assert_close(floats, eqx.filter(gradient, eqx.is_inexact_array), 1e-5)

    params = body, head
    tx = optax.sgd(0.1)
    updates, _ = tx.update(floats, tx.init(eqx.filter(params, eqx.is_inexact_array)))
    new_body, new_head = eqx.apply_updates(params, updates)
    np.testing.assert_array_equal(new_body["count"], body["count"])
    assert_close(new_head, jax.tree.map(lambda p, m: p - 0.1 * m, head, moved[1]), 1e-12)


# --- Each framework's own training loop -----------------------------------------------------------


def running_mean_step(tx):
    """Plain JAX, with the running mean of the last hidden layer beside the loss."""

    def loss(params, mean, x, y):
        hidden = hidden_layers(params, x)
        w, b = params[-1]
        return mean_loss(hidden @ w + b, y), 0.9 * mean + 0.1 * hidden.mean(0)

    displace = pjax.value_and_displacement(loss, has_aux=True)

    def step(carry, batch):
        params, opt_state, mean = carry
        (value, mean), moved = displace(params, mean, *batch)
        updates, opt_state = tx.update(moved, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, mean), value

    return step


@pytest.fixture(scope="module")
def plain():
    """Three steps in plain JAX: what each framework is to find."""
    params, batches = make_numbers(jnp.float32), make_batches(jnp.float32, 3)
    # An eps beside which rounding is nothing: Adam's first step is a sign.
    tx = optax.adam(1e-2, eps=1e-4)
    carry = params, tx.init(params), jnp.zeros(SIZES[-2])
    (found, _, mean), values = jax.jit(
        lambda carry, batches: jax.lax.scan(running_mean_step(tx), carry, batches)
    )(carry, batches)
    return params, batches, tx, (found, mean, values)


def test_a_scan_steps_as_a_loop_does(plain):
    """The scan's steps, taken one by one; the running mean that `has_aux` carries is that of the
    forward passes.
    """
    params, (xs, ys), tx, found = plain
    mean, opt_state, values = jnp.zeros(SIZES[-2]), tx.init(params), []
    step, update = pjax.value_and_displacement(loss_fn), jax.jit(tx.update)
    for x, y in zip(xs, ys, strict=True):
        mean = 0.9 * mean + 0.1 * hidden_layers(params, x).mean(0)
        value, moved = step(params, x, y)
        updates, opt_state = update(moved, opt_state, params)
        params = optax.apply_updates(params, updates)
        values.append(value)
    assert float(jnp.max(mean)) > 0.1
    assert_close(found, (params, mean, jnp.stack(values)), 1e-4)


def test_nnx_optimizer(plain):
    """`nnx.split`, `nnx.merge`, `nnx.Optimizer` and batch statistics under `nnx.jit`."""
    numbers, (xs, ys), tx, expected = plain
    model = make_nnx(numbers)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        definition, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            merged = nnx.merge(definition, params, rest, copy=True)
            return mean_loss(merged(x), y), nnx.state(merged, nnx.BatchStat)

        (value, stats), moved = pjax.value_and_displacement(loss, has_aux=True)(params)
        optimizer.update(model, moved)
        nnx.update(model, stats)
        return value

    values = jnp.stack([step(model, optimizer, x, y) for x, y in zip(xs, ys, strict=True)])
    assert int(optimizer.step[...]) == 3
    assert_close((read_nnx(model.layers), model.mean[...], values), expected, 1e-4)


def test_linen_train_state(plain):
    """A `TrainState` with batch statistics, carried by a scan."""
    numbers, batches, tx, expected = plain
    model, variables = make_linen(numbers)

    class State(TrainState):
        batch_stats: dict

    def step(state, batch):
        x, y = batch

        def loss(params):
            logits, new = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats}, x, mutable=["batch_stats"]
            )
            return mean_loss(logits, y), new["batch_stats"]

        (value, stats), moved = pjax.value_and_displacement(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=moved, batch_stats=stats), value

    state = State.create(apply_fn=model.apply, tx=tx, **variables)
    state, values = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))(
        state, batches
    )
    assert int(state.step) == 3
    found = read_linen(state.params), state.batch_stats["mean"], values
    assert_close(found, expected, 1e-4)


def test_equinox_partition(plain):
    """`eqx.partition` and `eqx.apply_updates` under `eqx.filter_jit`, the model over `jax.vmap`."""
    numbers, (xs, ys), tx, (params, _, expected_values) = plain

    @eqx.filter_jit
    def step(model, opt_state, x, y):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        value, moved = pjax.value_and_displacement(
            lambda p: mean_loss(jax.vmap(eqx.combine(p, static))(x), y)
        )(params)
        updates, opt_state = tx.update(moved, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, value

    model = EquinoxNetwork(numbers)
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    values = []
    for x, y in zip(xs, ys, strict=True):
        model, opt_state, value = step(model, opt_state, x, y)
        values.append(value)
    assert_close((read_equinox(model), jnp.stack(values)), (params, expected_values), 1e-4)


def test_frozen_layers_stay(plain):
    """A filter that leaves the first layer out: it is data, and the others move."""
    numbers, (xs, ys), _, _ = plain
    model = EquinoxNetwork(numbers)
    trained = eqx.tree_at(
        lambda m: m.layers[0],
        jax.tree.map(eqx.is_inexact_array, model),
        jax.tree.map(lambda _: False, model.layers[0]),
    )
    params, static = eqx.partition(model, trained)
    moved = pjax.displacement(lambda p: mean_loss(jax.vmap(eqx.combine(p, static))(xs[0]), ys[0]))(
        params
    )
    assert moved.layers[0].weight is None
    gradient = jax.jit(jax.grad(loss_fn))(numbers, xs[0], ys[0])
    for layer, (expected, _) in zip(moved.layers[1:], gradient[1:], strict=True):
        found = layer.weight.T
        cosine = jnp.vdot(found, expected) / (norm(found) * norm(expected))
        assert float(cosine) > 0.97


# --- Learning -------------------------------------------------------------------------------------


def test_learns_digits():
    """Two hundred batches of scikit-learn's digits; rows that the training does not see."""
    digits = load("digits")
    rows = np.stack(list(itertools.islice(batch_rows(len(digits.train), 128, seed=0), 200)))
    xs, ys = jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)
    params = make_numbers(jnp.float32, (64, 64, 64, 10))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(3e-3, 200), weight_decay=1e-3),
    )
    params, values, _ = train(pjax.value_and_displacement(loss_fn), tx, params, xs, ys)
    assert float(values[-1]) < 0.2 * float(values[0])
    predicted = jnp.argmax(network(params, digits.test.x), -1)
    assert float(jnp.mean(predicted == digits.test.y)) > 0.93
