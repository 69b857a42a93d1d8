"""Calls as users of JAX, Equinox, Flax and Optax write them, right and wrong ones."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pjax
from pjax import optim

STIFF = pjax.metrics.Spectral(activations=1e6, prox_step=1e-5)
X = jax.random.normal(jax.random.key(0), (8, 3))
LABELS = jnp.arange(8) % 2
PARAMS = {"w": jax.random.normal(jax.random.key(1), (3, 2)), "b": jnp.zeros(2)}


def loss_fn(params, x, labels, *, scale=1.0):
    logits = scale * (x @ params["w"] + params["b"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def assert_close(found, expected, rtol=1e-4):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if b.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.max(jnp.abs(b))))


# --- As `jax.value_and_grad` ----------------------------------------------------------------------


@pytest.mark.parametrize("argnums", [0, -4, (0,), (0, 1), [2, 0]])
@pytest.mark.parametrize("has_aux", [False, True])
def test_arguments_are_those_of_jax(argnums, has_aux):
    """Positions, names, auxiliary outputs, and Python numbers among the arguments."""

    def fn(a, b, c, n, *, scale, batch):
        rows = (batch["x"] @ a["w"] + b * c[:2] - scale) ** 2
        value = jnp.mean(rows) * n
        return (value, {"rows": rows}) if has_aux else value

    args = ({"w": PARAMS["w"]}, jnp.asarray(0.5), jnp.arange(3.0), 2)
    kwargs: Any = {"scale": jnp.asarray(1.5), "batch": {"x": X}}
    step = pjax.value_and_displacement(fn, argnums, has_aux, metric=STIFF)
    found = step(*args, **kwargs)
    assert_close(found, jax.value_and_grad(fn, argnums=argnums, has_aux=has_aux)(*args, **kwargs))
    with_state, state = step.update(step.init(*args, **kwargs), *args, **kwargs)
    assert_close(with_state, found)
    step.update(state, *args, **kwargs)
    moved = pjax.displacement(fn, argnums=argnums, has_aux=has_aux, metric=STIFF)(*args, **kwargs)
    assert_close(moved, (found[1], found[0][1]) if has_aux else found[1])


def test_arguments_by_name_of_pure_projection():
    optimizer = optim.Projection()
    state = optimizer.init(loss_fn, PARAMS, X, labels=LABELS, scale=2.0)
    new, state, info = optimizer.update(loss_fn, PARAMS, state, X, labels=LABELS, scale=2.0)
    assert float(info.loss) == pytest.approx(float(loss_fn(PARAMS, X, LABELS, scale=2.0)), rel=1e-6)
    assert loss_fn(new, X, LABELS, scale=2.0) < info.loss
    optimizer.displacement(loss_fn, new, state, X, labels=LABELS, scale=2.0)


def test_integer_parameters():
    def fn(params):
        return loss_fn(params["net"], X[params["rows"]], LABELS)

    params = {"net": PARAMS, "rows": jnp.arange(8)[::-1], "n": 3}
    expected = jax.grad(fn, allow_int=True)(params)
    assert_close(pjax.displacement(fn, metric=STIFF, allow_int=True)(params), expected)
    with pytest.raises(TypeError, match=r"`params\['n'\]` has the type int32.*allow_int"):
        pjax.displacement(fn, allow_int=False)(params)


# --- Equinox and Flax -----------------------------------------------------------------------------


class Gate(eqx.Module):
    net: eqx.nn.Sequential
    power: float
    count: jax.Array
    name: str

    def __call__(self, x):
        return self.net(x) * self.power if self.name == "gate" else x


def make_gate():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = [
        eqx.nn.Linear(3, 5, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Dropout(0.5, inference=True),
        eqx.nn.Linear(5, 2, key=keys[1]),
    ]
    return Gate(eqx.nn.Sequential(layers), 0.5, jnp.arange(3), "gate")


def module_loss(params, x, labels):
    logits = jax.vmap(params["model"])(x) + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_a_whole_equinox_module():
    """Its arrays move, its other leaves stay, and have None for a displacement."""
    model = make_gate()

    def fn(model, x, labels):
        return module_loss({"model": model, "bias": jnp.zeros(2)}, x, labels)

    found = pjax.value_and_displacement(fn, metric=STIFF)(model, X, LABELS)
    assert_close(found, eqx.filter_value_and_grad(fn)(model, X, LABELS))
    assert found[1].name is None
    assert len(pjax.explain(fn, model, X, LABELS).parameters) == 4
    tx = optax.adam(1e-2)
    updates, _ = tx.update(found[1], tx.init(eqx.filter(model, eqx.is_inexact_array)))
    assert fn(eqx.apply_updates(model, updates), X, LABELS) < found[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_projection_moves_a_module_inside_of_a_tree(compiled):
    params = {"model": make_gate(), "bias": jnp.zeros(2)}
    optimizer = optim.Projection(averaging=2.0, check=not compiled)
    state = optimizer.init(module_loss, params, X, LABELS)

    def update(params, state):
        return optimizer.update(module_loss, params, state, X, LABELS)

    new, losses = params, []
    for _ in range(5):
        new, state, info = (eqx.filter_jit(update) if compiled else update)(new, state)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0]
    assert jax.tree.structure(new) == jax.tree.structure(params)
    layers = new["model"].net.layers
    assert (layers[2].p, layers[2].inference, new["model"].power) == (0.5, True, 0.5)
    assert layers[1].fn is params["model"].net.layers[1].fn
    np.testing.assert_array_equal(new["model"].count, jnp.arange(3))
    assert not np.allclose(layers[0].weight, params["model"].net.layers[0].weight)
    average = optimizer.average(new, state)
    assert jax.tree.structure(average) == jax.tree.structure(params)
    moved, *_ = optimizer.displacement(module_loss, new, state, X, LABELS)
    assert moved["model"].name is None
    assert moved["bias"].shape == (2,)
    paper = optim.AlternatingProjections(5)
    solved, _ = paper.update(lambda p: module_loss(p, X, LABELS), params)
    assert solved["model"].name == "gate"


def test_leaves_outside_of_a_module_must_be_arrays():
    params = {"model": make_gate(), "bias": jnp.zeros(2), "activation": jnp.tanh}
    with pytest.raises(TypeError, match=r"`params\['activation'\]` is a"):
        pjax.displacement(module_loss)(params, X, LABELS)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.drop(self.norm(self.first(x)))))


def test_an_nnx_module_with_a_state_of_its_own():
    """Statistics and random numbers go through `has_aux`, as in the documents."""
    model = Net(nnx.Rngs(0))
    definition, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, rest, x, labels):
        model = nnx.merge(definition, params, rest, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    step = pjax.value_and_displacement(fn, has_aux=True, metric=STIFF)
    (value, new_rest), moved = step(params, rest, X, LABELS)
    (expected, _), gradient = jax.value_and_grad(fn, has_aux=True)(params, rest, X, LABELS)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    # The bias before a norm has none but rounding.
    del moved["first"]["bias"], gradient["first"]["bias"]
    assert_close(moved, gradient, 2e-3)
    assert int(new_rest["drop"]["rngs"]["count"][...]) == 1
    optimizer = optim.Projection(has_aux=True)
    state = optimizer.init(fn, params, rest, X, LABELS)
    for _ in range(3):
        params, state, info = optimizer.update(fn, params, state, rest, X, LABELS)
        rest = info.aux
    nnx.update(model, params, rest)
    assert int(nnx.state(model)["drop"]["rngs"]["count"][...]) == 3
    assert float(jnp.max(jnp.abs(model.norm.mean[...]))) > 0
    adam = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    before = model.last.kernel[...]
    adam.update(model, step(params, rest, X, LABELS)[1])
    assert not np.allclose(before, model.last.kernel[...])


# --- Wrong calls ----------------------------------------------------------------------------------

OWN = optim.Projection()


def raises(kind, match, call, *args, **kwargs):
    with pytest.raises(kind, match=match):
        call(*args, **kwargs)


@pytest.mark.parametrize("optimizer", [OWN, optim.DouglasRachford(5)])
def test_an_optimiser_is_no_gradient_transformation(optimizer):
    message = rf"`pjax.optim.{type(optimizer).__name__}` is called as .*`optax.chain`"
    chain = optax.chain(optax.clip(1.0), optimizer)
    raises(TypeError, message, chain.init, PARAMS)
    raises(TypeError, message, optimizer.init, PARAMS)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    raises(TypeError, message, nnx.Optimizer, model, optimizer, wrt=nnx.Param)
    # `update(gradients, state, params)`, also of a module, which can be called.
    raises(TypeError, message, optimizer.update, PARAMS, (), PARAMS)
    raises(TypeError, message, optimizer.update, make_gate(), (), make_gate())
    raises(TypeError, message, optimizer.init, make_gate())


@pytest.mark.parametrize("name", ["Adam", "adam", "SGD", "projection", "DouglasRachfrd"])
def test_names_that_are_not_there(name):
    with pytest.raises(AttributeError, match=r"has no .*`Projection`.*value_and_displacement"):
        getattr(optim, name)
    assert not hasattr(optim, name)
    if name not in ("Adam", "adam", "SGD"):
        with pytest.raises(AttributeError, match="Did you mean `(Projection|DouglasRachford)`"):
            getattr(optim, name)


@pytest.mark.parametrize("given", [3.0, jnp.ones(()), PARAMS], ids=["number", "array", "gradient"])
def test_what_is_no_function(given):
    message = "`fn` must be the loss as a function, and got a.*pass the function itself"
    state = OWN.init(loss_fn, PARAMS, X, LABELS)
    for call in (
        lambda: pjax.value_and_displacement(given),
        lambda: pjax.displacement(given),
        lambda: pjax.feasibility_problem(given, PARAMS),
        lambda: pjax.explain(given, PARAMS),
        lambda: OWN.init(given, PARAMS),
        lambda: OWN.update(given, PARAMS, state),
        lambda: optim.AlternatingProjections(3).update(given, PARAMS),
    ):
        raises(TypeError, message, call)


def test_arguments_in_another_order():
    state = OWN.init(loss_fn, PARAMS, X, LABELS)
    message = r"`update\(loss, params, state, …\)`"
    raises(TypeError, message, OWN.update, loss_fn, state, PARAMS, X, LABELS)
    raises(TypeError, message, OWN.update, loss_fn, PARAMS, X, LABELS)
    raises(TypeError, message, OWN.displacement, loss_fn, PARAMS, X, LABELS)
    step = pjax.value_and_displacement(loss_fn)
    raises(TypeError, "takes the state of `init` first; it got a dict", step.update, PARAMS, X)


def deep_loss(params, x):
    h = jnp.tanh(x @ params["w"]) @ params["v"]
    return jnp.mean((jnp.tanh(h) @ params["v"].T - 1) ** 2)


def test_a_state_of_other_shapes():
    def params(width):
        return {"w": jnp.ones((3, width)), "v": jnp.ones((width, 4))}

    step = pjax.value_and_displacement(deep_loss)
    paper = optim.CyclicProjections(5, splitting="layer")
    message = "`state` belongs to another function"
    raises(ValueError, message, step.update, step.init(params(6), X), params(5), X)
    other = pjax.value_and_displacement(loss_fn).init(PARAMS, X, LABELS)
    raises(ValueError, message, step.update, other, params(5), X)

    def fn(p):
        return deep_loss(p, X)

    raises(ValueError, message, paper.update, fn, params(5), paper.init(fn, params(6)))
    state = OWN.init(deep_loss, params(6), X)
    raises(ValueError, message, OWN.update, deep_loss, params(5), state, X)


def test_what_is_no_loss():
    def logits(p, x):
        return x @ p["w"] + p["b"]

    def rows(p, x):
        return optax.softmax_cross_entropy_with_integer_labels(logits(p, x), LABELS)

    def pair(p, x):
        return rows(p, x).mean(), logits(p, x)

    for call in (
        lambda fn: pjax.displacement(fn)(PARAMS, X),
        lambda fn: pjax.value_and_displacement(fn).init(PARAMS, X),
        lambda fn: OWN.init(fn, PARAMS, X),
    ):
        raises(TypeError, r"must be one number.*shape \(8, 2\).*softmax_cross_ent", call, logits)
        raises(TypeError, r"must be one number.*shape \(8,\).*the mean or the sum", call, rows)
        raises(
            TypeError,
            r"must be one number.*a tuple of 2.*`has_aux=True`.*value_and_grad",
            call,
            pair,
        )
    # A step of the paper's interface takes rows, and sums them.
    optim.AlternatingProjections(3).update(lambda p: rows(p, X), PARAMS)


def test_a_learning_rate_is_no_setting():
    with pytest.raises(TypeError, match=r"`has_aux` must be.*0\.1.*no learning rate"):
        optim.Projection(0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="`steps_per_update` here, not `steps`"):
        optim.DouglasRachford(steps=3)
