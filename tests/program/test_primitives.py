"""The named operations as ordinary JAX functions: values, transformations, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pjax
from pjax.backend import compat, source_lines

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(size=(5, 4)) * 3)
LABELS = jax.nn.one_hot(RNG.integers(0, 4, 5), 4)
SOFT = jax.nn.softmax(jnp.asarray(RNG.normal(size=(5, 4))))


def plain_cross_entropy(x, y):
    return -jnp.sum(y * jax.nn.log_softmax(x), -1)


def plain_margin(x, y, margin=1.0):
    return 0.5 * jnp.sum(jnp.maximum(margin - (2 * y - 1) * x, 0) ** 2, -1)


def plain_squared(x, y):
    return 0.5 * jnp.sum((x - y) ** 2, -1)


LOSSES = {
    "cross_entropy": (pjax.cross_entropy, plain_cross_entropy),
    "margin_loss": (
        lambda x, y: pjax.margin_loss(x, y, 1.5),
        lambda x, y: plain_margin(x, y, 1.5),
    ),
    "squared_error": (pjax.squared_error, plain_squared),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_derivatives_equal_those_of_the_formula(name):
    loss, plain = LOSSES[name]

    @functools.partial(jax.jit, static_argnums=0)
    def everything(f, x, y):
        total = lambda x, y: jnp.sum(f(x, y) * jnp.arange(1.0, 6.0))  # noqa: E731
        return {
            "value": f(x, y),
            "gradient": jax.grad(total)(x, y),
            "of the labels": jax.grad(total, 1)(x, y),
            "jacobian": jax.jacobian(f)(x, y),
            "forward": jax.jacfwd(f)(x, y),
            "second": jax.hessian(lambda row: f(row, y[0]))(x[0]),
            "mapped": jax.vmap(f)(x, y),
            "mapped over columns": jax.vmap(f, (1, 1))(x.T, y.T),
            "one of the labels": jax.vmap(f, (0, None))(x, y[0]),
            "one of the logits": jax.vmap(f, (None, 0))(x[0], y),
            "nested": jax.vmap(jax.vmap(f, (None, 0)), (0, None))(x, y),
            "elsewhere": jax.vmap(f, (2, 0), 1)(jnp.stack([x, 2 * x], 2), jnp.stack([y, y])),
            "gradient of mapped": jax.grad(lambda x: jnp.sum(jax.vmap(f)(x, y)))(x),
            "mapped gradient": jax.vmap(jax.grad(f))(x, y),
            "rematerialised": jax.grad(jax.checkpoint(total))(x, y),
        }

    found, expected = everything(loss, LOGITS, SOFT), everything(plain, LOGITS, SOFT)
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=2e-5, atol=2e-5, err_msg=key)
    np.testing.assert_allclose(loss(LOGITS, SOFT), expected["value"], rtol=1e-6)  # not compiled


def test_cross_entropy_equals_optax():
    for labels in (LABELS, SOFT):
        expected = optax.softmax_cross_entropy(LOGITS, labels)
        np.testing.assert_allclose(pjax.cross_entropy(LOGITS, labels), expected, rtol=1e-6)
    integers = jnp.argmax(LABELS, -1)
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, integers)
    np.testing.assert_allclose(pjax.cross_entropy(LOGITS, LABELS), expected, rtol=1e-6)


def test_cross_entropy_of_a_class_that_is_ruled_out():
    """A logit of −∞ for a class that is not asked for costs nothing, also in the gradient."""
    logits = jnp.array([[0.5, -jnp.inf, 1.0]])
    labels = jnp.array([[0.0, 0.0, 1.0]])
    expected = plain_cross_entropy(logits[:, ::2], labels[:, ::2])
    np.testing.assert_allclose(pjax.cross_entropy(logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("function", [pjax.identity, pjax.step, pjax.quantize])
def test_elementwise_operations_under_transformations(function):
    x = jnp.asarray(RNG.normal(size=(3, 4)))
    value = function(x)
    np.testing.assert_array_equal(jax.jit(function)(x), value)
    for axes in (0, 1):
        np.testing.assert_array_equal(jax.vmap(function, axes, axes)(x), value)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(function))(x), value)
    gradient = jax.grad(lambda x: jnp.sum(function(x)))(x)
    expected = 1.0 if function is pjax.identity else 0.0
    np.testing.assert_array_equal(gradient, expected)
    assert function(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert function([1.0, -2.0]).shape == (2,)  # whatever `jnp.asarray` takes


def test_values_of_step_and_quantize():
    np.testing.assert_array_equal(pjax.step(jnp.array([-1.0, 0.0, -0.0, 1e-30])), [0, 0, 0, 1])
    x = jnp.array([-5.0, -0.9, -0.2, 0.3, 0.7, 9.0])
    np.testing.assert_allclose(pjax.quantize(x, 3), [-1, -1, 0, 0, 1, 1])
    np.testing.assert_allclose(pjax.quantize(x, 2, 0.0, 4.0), [0, 0, 0, 0, 0, 4])
    np.testing.assert_allclose(pjax.quantize(x), [-1, -1, -1, 1, 1, 1])


def test_types_of_losses():
    half = LOGITS.astype(jnp.bfloat16)
    assert pjax.cross_entropy(half, LABELS).dtype == jnp.bfloat16
    assert pjax.squared_error(LOGITS, np.ones((5, 4), np.int32)).dtype == jnp.float32
    rows = pjax.margin_loss(LOGITS, np.asarray(LABELS, bool))
    np.testing.assert_allclose(rows, pjax.margin_loss(LOGITS, LABELS))
    assert pjax.cross_entropy(LOGITS[None], LABELS[None]).shape == (1, 5)
    assert pjax.cross_entropy(LOGITS[0], LABELS[0]).shape == ()


def test_shapes_without_values():
    spec = jax.ShapeDtypeStruct((7, 4), jnp.float32)
    out = jax.eval_shape(pjax.cross_entropy, spec, spec)
    assert (out.shape, out.dtype) == ((7,), jnp.float32)


@pytest.mark.parametrize("loss", [pjax.cross_entropy, pjax.margin_loss, pjax.squared_error])
def test_errors_of_losses(loss):
    name = loss.__name__
    with pytest.raises(ValueError, match=rf"`{name}` needs two arrays of one shape.*one_hot"):
        loss(LOGITS, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(5, 3\).*same batch"):
        loss(LOGITS, jnp.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(1, 4\)"):  # no silent broadcasting
        loss(LOGITS, jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="at least one axis"):
        loss(jnp.float32(1.0), jnp.float32(1.0))
    with pytest.raises(TypeError, match="floating-point predictions, got int32"):
        loss(jnp.ones((5, 4), jnp.int32), LABELS)
    with pytest.raises(TypeError, match="floating-point predictions, got complex64"):
        loss(LOGITS.astype(jnp.complex64), LABELS)


def test_errors_of_quantize():
    with pytest.raises(ValueError, match="`levels` must be at least 2, got 1"):
        pjax.quantize(LOGITS, 1)
    with pytest.raises(
        ValueError, match="`low` must be below `high`, both finite, got 1.0 and -1.0"
    ):
        pjax.quantize(LOGITS, 4, 1.0, -1.0)
    for function in (pjax.quantize, pjax.step):
        with pytest.raises(TypeError, match=rf"`{function.__name__}` needs a floating-point array"):
            function(jnp.arange(3))


@pytest.mark.parametrize("margin", [0.0, -1.0, float("nan"), float("inf")])
def test_errors_of_margins(margin):
    with pytest.raises(ValueError, match="`margin` must be positive and finite"):
        pjax.margin_loss(LOGITS, LABELS, margin)


# --- Facts of JAX --------------------------------------------------------------------------------


def test_primitives_are_found_by_name_in_both_places():
    assert len(compat.find_primitives("add", "split", "stack", "no_such_thing")) == 3
    assert compat.primitive_path("tanh") == "jax.lax.tanh_p"
    path = "jax.extend.core.primitives.custom_jvp_call_p"
    assert compat.primitive_path("custom_jvp_call") == path
    assert compat.primitive_path("no_such_thing") is None


def test_what_counts_as_library_code():
    assert source_lines.is_library_file(jnp.__file__)
    assert source_lines.is_library_file(functools.__file__)
    assert source_lines.is_library_file(pjax.__file__)
    assert source_lines.is_library_file("<frozen importlib._bootstrap>")
    assert not source_lines.is_library_file(__file__)
    assert not source_lines.is_library_file("<stdin>")
    assert not source_lines.is_library_file("<ipython-input-1-abc>")


def test_types_too_narrow_for_deviations():
    wide = (jnp.float32, jnp.float64, jnp.bfloat16, jnp.int8, jnp.bool_)
    assert not any(map(compat.is_narrow, wide))
    assert all(map(compat.is_narrow, (jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2)))


def test_a_primitive_of_several_operands_differentiates_where_only_some_vary():
    def fn(x):
        return jnp.sum(pjax.squared_error(x, jax.lax.stop_gradient(2 * x)))

    np.testing.assert_allclose(jax.grad(fn)(LOGITS), LOGITS - 2 * LOGITS, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(fn, (LOGITS,), (LOGITS,))[1], -jnp.sum(LOGITS**2), rtol=1e-5)
