"""`pjax.nn`: names, shapes, values, and what happens when parameters do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import nn
from pjax import numpy as pnp


class Network(nn.Module):
    """The paper's way of writing a model."""

    def __init__(self) -> None:
        self.dense1 = nn.Linear(4, 8)
        self.relu1 = nn.ReLU(8)
        self.dense2 = nn.Linear(8, 3)

    def __call__(self, x):
        return self.dense2(self.relu1(self.dense1(x)))


def test_names_shapes_and_order() -> None:
    params = Network().init(jax.random.key(0))
    assert [(name, value.shape) for name, value in params.items()] == [
        ("dense1.weight", (4, 8)),
        ("relu1.bias", (8,)),
        ("dense2.weight", (8, 3)),
    ]


def test_apply_computes_the_network() -> None:
    params = Network().init(jax.random.PRNGKey(1))
    params["relu1.bias"] += 0.1
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    hidden = np.maximum(x @ params["dense1.weight"] + 0.1, 0)
    model = Network()
    expected = hidden @ params["dense2.weight"]
    np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-5, atol=1e-6)
    by_row = jax.vmap(model.apply, (None, 0))(params, x)
    np.testing.assert_allclose(by_row, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: model.apply(p, x).sum()))(params)
    np.testing.assert_allclose(gradient["dense2.weight"][:, 0], hidden.sum(0), rtol=1e-5, atol=1e-5)


def test_init_is_a_function_of_the_key() -> None:
    first, again, other = (Network().init(jax.random.key(seed)) for seed in (3, 3, 4))
    for name in ("dense1.weight", "dense2.weight"):
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.allclose(first[name], other[name])
    assert (first["relu1.bias"] == 0).all()


def test_he_initialisation_has_its_variance() -> None:
    weight = nn.Linear(400, 300).init(jax.random.key(0))["weight"]
    np.testing.assert_allclose(np.var(weight), 2 / 400, rtol=0.02)
    kernel = nn.Conv2D(16, 64, 5).init(jax.random.key(0))["weight"]
    np.testing.assert_allclose(np.var(kernel), 2 / (25 * 16), rtol=0.04)


def test_initializer_is_an_option() -> None:
    ones = nn.Linear(2, 3, initializer=jax.nn.initializers.ones).init(jax.random.key(0))
    assert (ones["weight"] == 1).all()


def test_relu_adds_its_inputs_and_its_bias() -> None:
    relu = nn.ReLU(2)
    result = relu.apply({"bias": jnp.array([1.0, -9.0])}, jnp.ones((3, 2)), jnp.array([2.0, 3.0]))
    np.testing.assert_array_equal(result, np.tile([4.0, 0.0], (3, 1)))


@pytest.mark.parametrize(
    ("stride", "padding", "expected_padding"),
    [(1, "SAME", "SAME"), ((2, 3), "VALID", "VALID"), (2, ((1, 0), 2), [(1, 0), (2, 2)])],
)
def test_conv2d_is_the_convolution(stride, padding, expected_padding) -> None:
    layer = nn.Conv2D(3, 5, (3, 2), stride, padding)
    params = layer.init(jax.random.key(0))
    assert params["weight"].shape == (3, 2, 3, 5)
    x = jax.random.normal(jax.random.key(1), (2, 8, 9, 3))
    strides = (stride, stride) if isinstance(stride, int) else stride
    expected = jax.lax.conv_general_dilated(
        x, params["weight"], strides, expected_padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_embedding_looks_rows_up() -> None:
    layer = nn.Embedding(5, 3)
    params = layer.init(jax.random.key(0))
    tokens = np.array([[4, 0, 4], [1, 1, 2]])
    np.testing.assert_array_equal(layer.apply(params, tokens), params["weight"][tokens])
    np.testing.assert_array_equal(
        jax.jit(layer.apply)(params, tokens), np.asarray(params["weight"])[tokens]
    )
    np.testing.assert_array_equal(layer.apply(params, [0, 2]), params["weight"][:3:2])
    with pytest.raises(IndexError):
        layer.apply(params, np.array([5]))
    with pytest.raises(TypeError, match="integers"):
        layer.apply(params, np.array([1.0]))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(causal: bool) -> None:
    features, heads, length = 6, 2, 5
    layer = nn.MultiHeadAttention(features, heads, causal)
    params = layer.init(jax.random.key(0))
    assert list(params) == ["query.weight", "key.weight", "value.weight", "output.weight"]
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, length, features)))
    result = np.zeros_like(x)
    for row in range(2):
        outputs = []
        for head in range(heads):
            part = slice(head * 3, head * 3 + 3)
            query, key, value = (
                x[row] @ np.asarray(params[f"{name}.weight"])[:, part]
                for name in ("query", "key", "value")
            )
            scores = np.maximum(query @ key.T / np.sqrt(3), 0)
            for i in range(length):
                seen = i + 1 if causal else length
                scores[i] = np.where(np.arange(length) < seen, scores[i] / seen, 0)
            outputs.append(scores @ value)
        result[row] = np.concatenate(outputs, -1) @ params["output.weight"]
    np.testing.assert_allclose(layer.apply(params, x), result, rtol=1e-4, atol=1e-5)


def test_causal_attention_does_not_look_ahead() -> None:
    layer = nn.MultiHeadAttention(4, 2, causal=True)
    params = layer.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (6, 4))
    changed = x.at[4:].add(1.0)
    before, after = layer.apply(params, x), layer.apply(params, changed)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert not np.allclose(before[4:], after[4:])


class Block(nn.Module):
    def __init__(self, shared: nn.Linear) -> None:
        self.layers = [nn.Linear(3, 3), (shared, nn.ReLU(3))]
        self.heads = {"mean": shared}
        self.scale = nn.Parameter((3,), jax.nn.initializers.ones)
        self.name = "not a parameter"

    def forward(self, x, *, double: bool = False):
        first, (second, relu) = self.layers
        y = relu(second(first(x))) * self.scale
        y = self.heads["mean"](y)
        return 2 * y if double else y


def test_lists_tuples_dictionaries_shared_modules_and_forward() -> None:
    block = Block(nn.Linear(3, 3))
    params = block.init(jax.random.key(0))
    assert list(params) == [
        "layers.0.weight",
        "layers.1.0.weight",
        "layers.1.1.bias",
        "scale",
    ]
    x = jax.random.normal(jax.random.key(1), (2, 3))
    shared = params["layers.1.0.weight"]
    hidden = pnp.relu(x @ params["layers.0.weight"] @ shared)
    np.testing.assert_allclose(block.apply(params, x), hidden @ shared, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        block.apply(params, x, double=True), 2 * hidden @ shared, rtol=1e-5, atol=1e-6
    )
    assert isinstance(block.scale, nn.Parameter)  # apply leaves the model as it was


def test_parameters_that_do_not_fit_are_refused() -> None:
    model = Network()
    params = model.init(jax.random.key(0))
    x = jnp.ones((2, 4))
    missing = {name: value for name, value in params.items() if name != "relu1.bias"}
    with pytest.raises(ValueError, match="missing: relu1.bias"):
        model.apply(missing, x)
    with pytest.raises(ValueError, match="unknown: dense3.weight"):
        model.apply({**params, "dense3.weight": params["dense2.weight"]}, x)
    with pytest.raises(ValueError, match=r"`dense1.weight` of `Network` has shape \(4, 8\)"):
        model.apply({**params, "dense1.weight": jnp.ones((8, 4))}, x)
    with pytest.raises(TypeError, match="dictionary of parameters"):
        model.apply(x, params)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="4 features on the last axis"):
        model.apply(params, jnp.ones((2, 5)))


def test_a_model_without_parameters_bound_says_so() -> None:
    with pytest.raises(TypeError, match="model.apply"):
        Network()(jnp.ones((2, 4)))


def test_key_and_sizes_are_checked() -> None:
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        Network().init(0)  # pyright: ignore[reportArgumentType]
    for make in (
        lambda: nn.Linear(0, 3),
        lambda: nn.ReLU(2.5),  # pyright: ignore[reportArgumentType]
        lambda: nn.Conv2D(1, 1, (3, 0)),
        lambda: nn.Conv2D(1, 1, (3, 3, 3)),
        lambda: nn.MultiHeadAttention(6, 4),
    ):
        with pytest.raises(ValueError, match="integer|divide"):
            make()
    with pytest.raises(NotImplementedError, match="__call__"):
        nn.Module().apply({})


class Convolutional(nn.Module):
    def __init__(self) -> None:
        self.conv1 = nn.Conv2D(1, 4, kernel_size=3, stride=2, padding=((1, 0), 1))
        self.relu1 = nn.ReLU(4)
        self.dense1 = nn.Linear(4, 3)

    def __call__(self, x):
        features = self.relu1(self.conv1(pnp.reshape(x, (-1, 4, 4, 1))))
        return self.dense1(pnp.max(features, axis=(1, 2)))


class Attentive(nn.Module):
    def __init__(self) -> None:
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiHeadAttention(4, 2, causal=True)
        self.relu1 = nn.ReLU(4)
        self.dense1 = nn.Linear(4, 3)

    def __call__(self, x):
        tokens = np.digitize(x[:, :6], [-1, -0.3, 0.3, 1])  # tokens repeat
        embedded = self.embedding(tokens)
        hidden = self.relu1(embedded, self.attention(embedded))
        return self.dense1(pnp.sum(hidden, axis=1))


class ByRow(nn.Module):
    """Written for one row, and mapped over the rows."""

    def __init__(self) -> None:
        self.dense1 = nn.Linear(16, 6)
        self.relu1 = nn.ReLU(6)
        self.dense2 = nn.Linear(22, 3)

    def forward(self, x):
        hidden = self.relu1(self.dense1(x))
        return self.dense2(pnp.concatenate([hidden, x]))


@pytest.mark.parametrize(
    ("model", "optimizer", "mapped"),
    [
        (Convolutional(), pjax.optim.CyclicProjections(20), False),
        (Attentive(), pjax.optim.AlternatingProjections(30), False),
        (ByRow(), pjax.optim.DouglasRachford(20), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_learn_by_projection(model, optimizer, mapped) -> None:
    x = np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32)
    y = pjax.array(np.eye(3, dtype=np.float32)[np.arange(12) % 3], name="labels")
    params = model.init(jax.random.key(0))
    apply = pjax.vmap(model.apply, (None, 0)) if mapped else model.apply
    losses = []
    for _ in range(4):
        before = params
        params, residual = optimizer.update(lambda p: pjax.cross_entropy(apply(p, x), y), params)
        losses.append(float(residual.loss.mean()))
    assert params.keys() == model.init(jax.random.key(0)).keys()
    assert all(np.isfinite(value).all() for value in params.values())
    assert all(not np.array_equal(value, before[name]) for name, value in params.items())
    assert losses[-1] < losses[0] - 0.1, losses
