"""Packed networks compute what JAX does, bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pjax
from pjax.export import packing, predictor, thresholds
from pjax.export.operations import HANDLERS
from pjax.export.operations import packed as packed_codes
from pjax.export.walk import Walk
from pjax.lab.data import DataError, batch_rows, load

he = jax.nn.initializers.he_normal()


def signs(x):
    return jnp.where(x > 0, 1.0, -1.0)


def whole(*shape, seed=0, most=9):
    """Whole numbers, as those of pixels."""
    return jnp.asarray(np.random.default_rng(seed).integers(-most, most + 1, shape), jnp.float32)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def packed(fn, params, x, path):
    """The report, and the predictor of the file."""
    report = pjax.export.pack(fn, params, x, path)
    return report, pjax.export.load(path)


def assert_equal(fn, params, x, path):
    """The file's outputs are those of the function, compiled and not, for any number of rows."""
    report, predict = packed(fn, params, x, path)
    found, wanted = predict(np.asarray(x)), fn(params, x)
    for a, b, c in zip(*map(jax.tree.leaves, (found, wanted, jax.jit(fn)(params, x))), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert report.difference == 0
    for rows in (1, 3):
        for a, b in zip(jax.tree.leaves(predict(np.asarray(x[:rows]))),
                        jax.tree.leaves(found), strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b[:rows])
    return report


# Networks, as they are written in docs and benchmarks.


def perceptron(params, x):
    """Every weight and every hidden unit is a sign."""
    *hidden, last = zip(params["w"], params["b"], strict=True)
    for w, b in hidden:
        x = signs(x @ signs(w) + b)
    w, b = last
    return x @ signs(w) + b


def convolutional(params, x):
    side = round(x.shape[1] ** 0.5)
    x = x.reshape(len(x), side, side, 1)
    *kernels, last = params["w"]
    for kernel, b in zip(kernels, params["b"], strict=False):
        x = jax.lax.conv_general_dilated(
            x, jnp.sign(kernel), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        x = jnp.sign(x + b)
    return x.reshape(len(x), -1) @ jnp.sign(last) + params["b"][-1]


def of_levels(params, x):
    """Activations of four levels and weights of two bits, all of them multiples of ½."""
    *hidden, last = zip(params["w"], params["b"], strict=True)
    for w, b in hidden:
        x = pjax.quantize(x @ pjax.quantize(w, 4, -1.5, 1.5) / 16 + b, 4, -1.5, 1.5)
    w, b = last
    return x @ pjax.quantize(w, 4, -1.5, 1.5) + b


def init(shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        "w": [0.5 * he(key, shape) * np.prod(shape[:-1]) ** 0.5
              for key, shape in zip(keys, shapes, strict=True)],
        "b": [jnp.zeros(shape[-1]) for shape in shapes],
    }  # fmt: skip


def layers(*sizes):
    return init(list(itertools.pairwise(sizes)))


def trained(network, params, x, y, batches, scale, rows=128):
    """Parameters after some batches of pure projection."""

    def loss(params, x, y):
        return jnp.mean(pjax.cross_entropy(scale * network(params, x), y))

    optimizer = pjax.optim.Projection()
    y = jax.nn.one_hot(y, 10)
    state = optimizer.init(loss, params, x[:rows], y[:rows])
    for number, own in zip(range(batches), batch_rows(len(x), rows, seed=0), strict=False):
        relaxation = 0.5 * (1 + np.cos(np.pi * number / batches))
        params, state, _ = optimizer.update(
            loss, params, state, x[own], y[own], relaxation=relaxation
        )
    return params


def accuracy(outputs, y):
    return float(np.mean(np.argmax(outputs, -1) == y))


@pytest.mark.parametrize(
    ("network", "params", "least"),
    [
        (perceptron, layers(64, 128, 128, 10), 0.85),
        (convolutional, init([(3, 3, 1, 16), (3, 3, 16, 32), (128, 10)]), 0.7),
        (of_levels, layers(64, 128, 10), 0.85),
    ],
    ids=["perceptron", "convolutions", "levels"],
)
def test_trained_on_digits(network, params, least, tmp_path):
    digits = load("digits")
    x, test = (jnp.asarray(16 * split.x) for split in (digits.train, digits.test))
    params = trained(network, params, x, digits.train.y, 40, 1 / 8)
    report = assert_equal(network, params, test, tmp_path / "digits.npz")
    outputs = pjax.export.load(report.path)(16 * digits.test.x)
    assert accuracy(outputs, digits.test.y) > least
    assert report.bytes == (tmp_path / "digits.npz").stat().st_size
    assert report.float_bytes == 4 * sum(a.size for a in jax.tree.leaves(params))
    assert report.products[0].bits == 0
    assert all(product.bits for product in report.products[1:])
    assert all(product.levels in (2, 4) for product in report.products)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "params", "least", "share"),
    [
        (perceptron, layers(784, 128, 10), 0.87, 25),
        (convolutional, init([(3, 3, 1, 32), (3, 3, 32, 64), (3136, 10)]), 0.9, 25),
        (of_levels, layers(784, 128, 10), 0.9, 14),
    ],
    ids=["perceptron", "convolutions", "levels"],
)
def test_trained_on_mnist(network, params, least, share, tmp_path):
    try:
        mnist = load("mnist")
    except DataError as error:
        pytest.skip(str(error))
    x, test = (jnp.round(255 * split.x) for split in (mnist.train, mnist.test))
    params = trained(network, params, x, mnist.train.y, 200, 1 / 32)
    path = tmp_path / "mnist.npz"
    report, predict = packed(network, params, test[:500], path)
    wanted = np.concatenate([jax.jit(network)(params, test[i : i + 500])
                             for i in range(0, len(test), 500)])  # fmt: skip
    found = predict(np.asarray(test))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))
    assert accuracy(found, mnist.test.y) > least
    assert report.float_bytes >= share * report.bytes


# Operations.

W = normal(12, 10, seed=1)
V = normal(10, 4, seed=2)
B = 3 * normal(10, seed=3)
KERNEL = normal(3, 3, 3, 4, seed=4)
NHWC = ("NHWC", "HWIO", "NHWC")


def hidden(x):
    return x @ signs(W)


def convolve(x, kernel, padding="SAME", numbers=NHWC, strides=(1, 1), **options):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def image(x):
    return jnp.tile(x, (1, 9)).reshape(len(x), 6, 6, 3)


def pool(x, name, padding="SAME", size=3, stride=2):
    first, reduce = {"max": (-jnp.inf, jax.lax.max), "sum": (0.0, jax.lax.add)}[name]
    return jax.lax.reduce_window(
        x, first, reduce, (1, size, size, 1), (1, stride, stride, 1), padding
    )


FUNCTIONS = {
    "sign with zeros": lambda x: jnp.sign(hidden(x)) @ signs(V),
    "sign of an odd sum": lambda x: jnp.sign(signs(x[:, :11]) @ signs(W[:11])) @ signs(V),
    "threshold": lambda x: pjax.threshold(hidden(x) + B, 1.0) @ signs(V),
    "step": lambda x: pjax.step(hidden(x) - B) @ signs(V),
    "step as numbers": lambda x: (2 * (hidden(x) > B).astype(jnp.float32) - 1) @ signs(V),
    "at most": lambda x: jnp.where(hidden(x) <= B, 2.0, -1.0) @ signs(V),
    "where": lambda x: jnp.where(hidden(x) + B >= 0, 1, -1) @ signs(V),
    "scales of both signs": lambda x: jnp.sign((hidden(x) - B) * (B * 0.3) + 0.1) @ signs(V),
    "a scale of zero": lambda x: jnp.sign(hidden(x) * jnp.arange(-4.0, 6.0) + 0.5) @ signs(V),
    "clip, divide": lambda x: jnp.sign(jnp.clip(B - hidden(x), -3, 4) / 1.7) @ signs(V),
    "three levels": lambda x: pjax.quantize(hidden(x) / 8, 3) @ signs(V),
    "four levels": lambda x: pjax.quantize(hidden(x) / 8, 4, -1.5, 1.5) @ signs(V),
    "levels from zero": lambda x: pjax.quantize(hidden(x) / 8, 4, 0.0, 1.5) @ signs(V),
    "five levels": lambda x: pjax.quantize(hidden(x) / 8, 5) @ pjax.quantize(V, 5),
    "weights of three levels": lambda x: signs(hidden(x)) @ pjax.quantize(V, 3),
    "weights of 0 and 1": lambda x: pjax.quantize(hidden(x), 4, -1.5, 1.5) @ pjax.step(V),
    "weights of 16 levels": lambda x: signs(hidden(x)) @ pjax.quantize(V, 16, -7.5, 7.5),
    "one level": lambda x: signs(hidden(x)) @ jnp.ones((10, 3)),
    "all zero": lambda x: signs(hidden(x)) @ jnp.zeros((10, 3)),
    "three layers": lambda x: signs(signs(hidden(x) + B) @ signs(V) + 0.3) @ signs(V[:4]),
    "a vector": lambda x: signs(hidden(x)) @ signs(V[:, 0]),
    "einsum": lambda x: jnp.einsum("nabc,bce->nae", signs(x).reshape(-1, 2, 2, 3), jnp.sign(
        W.reshape(2, 3, 20))),
    "vmap": jax.vmap(lambda row: signs(signs(W).T @ row) @ signs(V)),
    "vmap of layers": jax.vmap(
        lambda row: signs(V).T @ signs(jnp.maximum(signs(W).T @ row + B, 0) - 1.5) + B[:4]),
    "vmap of convolutions": jax.vmap(
        lambda row: convolve(signs(image(row[None])), signs(KERNEL)).reshape(-1, 4).max(0)),
    "rows behind": lambda x: (jnp.concatenate([signs(W[:10]) @ signs(x.T[2:]), jnp.ones((2, len(
        x)))])[1:11].T) @ signs(V),
    "relu": lambda x: jax.nn.relu(hidden(x)) @ signs(V),
    "residual": lambda x: signs(hidden(x)) + 2 * jax.nn.relu(hidden(x)),
    "leaky": lambda x: jnp.where(hidden(x) > 0, hidden(x), hidden(x) / 4),
    "round": lambda x: jnp.clip(jnp.round(hidden(x) / 8), -2, 2) @ signs(V),
    "negative": lambda x: -signs(hidden(x)) @ signs(V),
    "signs of signs": lambda x: signs(jnp.maximum(signs(hidden(x)), 0) - 0.5) @ signs(V),
    "sums of signs": lambda x: jnp.sign(jnp.sum(signs(x).reshape(-1, 3, 4), 1)) @ signs(V[:4]),
    "sums of products": lambda x: signs(jnp.sum((signs(x).reshape(-1, 3, 4) @ signs(V[:4])), 1)),
    "largest of products": lambda x: signs(jnp.max(signs(x).reshape(-1, 3, 4) @ signs(V[:4]), 1)),
    "mean": lambda x: jnp.mean(signs(hidden(x))[:, :8], -1),
    "a bias as an input": lambda x: jnp.concatenate([-jnp.ones((len(x), 1)), signs(x)], 1)
    @ signs(jnp.concatenate([W, W[:1]])),
    "joined": lambda x: jnp.concatenate([signs(hidden(x)), jax.nn.relu(x)], 1),
    "slices": lambda x: (signs(x)[:, 1:9:2] @ signs(V[:4]))[..., None],
    "an axis": lambda x: jnp.broadcast_to(signs(x)[:, None], (len(x), 3, 12)) @ signs(W),
    "padding": lambda x: jnp.pad(signs(x), ((0, 0), (1, 2)), constant_values=-1) @ signs(
        normal(15, 4)),
    "padding of zeros": lambda x: jnp.pad(signs(x), ((0, 0), (1, 2))) @ signs(normal(15, 4)),
    "argmax": lambda x: (jnp.argmax(signs(hidden(x)) @ signs(V), -1), hidden(x)),
    "convolution": lambda x: convolve(signs(image(x)), signs(KERNEL)),
    "convolution of zeros": lambda x: convolve(jnp.sign(image(x)), pjax.quantize(KERNEL, 3)),
    "strides, dilation": lambda x: convolve(
        jnp.sign(image(x) + 1), signs(KERNEL), [(2, 1), (0, 3)], strides=(2, 1),
        rhs_dilation=(1, 2)),
    "channels in front": lambda x: convolve(
        signs(image(x)).transpose(0, 3, 1, 2), signs(KERNEL).transpose(3, 2, 0, 1),
        numbers=("NCHW", "OIHW", "NCHW")),
    "numbers, channels in front": lambda x: convolve(
        image(x).transpose(0, 3, 1, 2), signs(KERNEL).transpose(3, 2, 0, 1),
        numbers=("NCHW", "OIHW", "NCHW")),
    "one axis": lambda x: jax.lax.conv_general_dilated(
        signs(x)[..., None], signs(KERNEL[0, :, :1]), (1,), "SAME",
        dimension_numbers=("NWC", "WIO", "NWC")),
    "two convolutions": lambda x: convolve(
        jnp.sign(pool(convolve(image(x), signs(KERNEL)), "max") + B[:4]), signs(
            normal(3, 3, 4, 5))),
    "pooled signs": lambda x: pool(signs(image(x)), "max") .reshape(len(x), -1) @ signs(
        normal(27, 3)),
    "pooled sums": lambda x: jnp.sign(
        pool(convolve(signs(image(x)), signs(KERNEL)), "max", "VALID") + 0.5),
    "pooled, channels in front": lambda x: jax.lax.reduce_window(
        signs(image(x)).transpose(0, 3, 1, 2), -jnp.inf, jax.lax.max, (1, 1, 2, 3), (1, 1, 2, 1),
        "SAME"),
    "pooled means": lambda x: pool(signs(image(x)), "sum", "VALID", 2) / 4,
    "moved axes": lambda x: jnp.swapaxes(signs(image(x)), 1, 3).reshape(len(x), -1)[:, :10]
    @ signs(V),
    "integers": lambda x: signs(x.astype(jnp.int32).astype(jnp.float32)) @ signs(W),
    "stopped": lambda x: jax.lax.stop_gradient(signs(hidden(x))) @ signs(V),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations(name, tmp_path):
    assert_equal(lambda _, x: FUNCTIONS[name](x), {}, whole(24, 12), tmp_path / "f.npz")


def test_what_is_computed_by_bits():
    """Every product of levels is, with the number of bits that the levels need."""

    def bits(name):
        walk = Walk(*traced(FUNCTIONS[name]), HANDLERS)
        walk.described()
        return [product.bits for product in walk.products]

    def traced(fn):
        x = whole(24, 12)
        program, leaves, consts, _ = packing.trace(fn, x, rests=True)
        return program, leaves[0], consts

    assert bits("sign with zeros") == [0, 2]
    # A sum of an odd number of signs is not 0.
    assert bits("sign of an odd sum") == [1, 1]
    assert bits("threshold") == [0, 1]
    # 2 and −1 are no whole numbers of half their distance.
    assert bits("at most") == [0, 0]
    assert bits("four levels") == [0, 2]
    assert bits("levels from zero") == [0, 2]
    assert bits("weights of 16 levels") == [0, 1]
    assert bits("three layers") == [0, 1, 1]
    assert bits("relu") == [0, 0]
    assert bits("a bias as an input") == [1]
    assert bits("padding") == [1]
    assert bits("convolution of zeros") == [2]
    assert bits("two convolutions") == [0, 2]
    assert bits("pooled signs") == [1]


def test_straight_through_estimators_are_what_they_compute(tmp_path):
    @jax.custom_vjp
    def sign(x):
        return signs(x)

    sign.defvjp(lambda x: (signs(x), x), lambda x, g: (jnp.where(jnp.abs(x) < 1, g, 0),))
    report = assert_equal(
        lambda w, x: sign(x @ sign(w)) @ sign(w[:10]), W, whole(24, 12), tmp_path / "f.npz"
    )
    assert [p.bits for p in report.products] == [0, 1]


def test_levels_that_are_no_multiples_of_a_power_of_two(tmp_path):
    """Close, and mostly the same labels: sums are rounded in another order."""

    def network(params, x):
        x = pjax.quantize(x @ params["w"], 4)
        return x @ pjax.quantize(params["v"], 4, -0.3, 0.3)

    params = {"w": W / 9, "v": V / 5}
    report, predict = packed(network, params, whole(200, 12), tmp_path / "f.npz")
    assert [p.bits for p in report.products] == [0, 2]
    assert report.products[0].levels == 0
    found, wanted = predict(whole(200, 12)), network(params, whole(200, 12))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_rows_of_another_type(tmp_path):
    """Bytes in, as a camera has them."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (20, 12)), jnp.uint8)

    def network(_, x):
        return signs(x.astype(jnp.float32) @ signs(W) - 300.5) @ signs(V)

    assert_equal(network, {}, x, tmp_path / "f.npz")


def test_without_rows(tmp_path):
    _, predict = packed(lambda _, x: signs(hidden(x)) @ V, {}, whole(4, 12), tmp_path / "f.npz")
    assert predict(np.zeros((0, 12))).shape == (0, 4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.tanh(hidden(x)), r"`tanh` \(.*test_export.py:\d+.*no packed form"),
        (lambda x: hidden(x - x.mean(0)), "`reduce_sum` .*mixes rows"),
        (lambda x: hidden(x).T, "no row for each row"),
        (lambda x: x @ x.T, "multiplies two values of rows"),
        (lambda x: hidden(x) + jnp.arange(24.0)[:, None], "differs from row to row"),
        (lambda x: hidden(x).reshape(48, 5), "`reshape` .*rows apart"),
        (lambda x: pjax.quantize(hidden(x), 32), "32 levels"),
        (lambda x: convolve(image(x), KERNEL[:, :, :1, :3], feature_group_count=3), "groups"),
        (lambda x: hidden(x).astype(jnp.bfloat16), "bfloat16"),
        (lambda x: jnp.ones(3), "no row for each row"),
    ],
)
def test_what_cannot_be_packed_is_named(function, message, tmp_path):
    with pytest.raises(pjax.TraceError, match=message):
        pjax.export.pack(lambda _, x: function(x), {}, whole(24, 12), tmp_path / "f.npz")
    assert not list(tmp_path.iterdir())


def test_wrong_calls(tmp_path):
    path = tmp_path / "f.npz"
    with pytest.raises(TypeError, match="`fn` must be"):
        pjax.export.pack(3, {}, whole(4, 12), path)
    with pytest.raises(ValueError, match="must have rows"):
        pjax.export.pack(lambda _, x: x, {}, jnp.zeros(()), path)
    with pytest.raises(TypeError, match="must be one array of rows, got a tuple"):
        pjax.export.pack(lambda _, x: x, {}, (whole(4, 12), jnp.zeros(4)), path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*none to write f\.npz"):
        pjax.export.pack(lambda _, x: x, {}, whole(4, 12), tmp_path / "none" / "f.npz")
    _, predict = packed(lambda _, x: hidden(x), {}, whole(4, 12), path)
    with pytest.raises(ValueError, match=r"of shape \(rows, 12\), got \(4, 3\)"):
        predict(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="not finite"):
        predict(np.full((1, 12), np.nan))


def test_other_files(tmp_path):
    path = tmp_path / "f.npz"
    packed(lambda _, x: hidden(x), {}, whole(4, 12), path)
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:100])
    with pytest.raises(ValueError, match="no packed network, or is damaged"):
        pjax.export.load(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="no packed network"):
        pjax.export.load(path)
    text = json.dumps({"format": 99}).encode()
    with path.open("wb") as file:
        np.savez(file, program=np.frombuffer(text, np.uint8))
    with pytest.raises(ValueError, match="format 99"):
        pjax.export.load(path)
    with pytest.raises(FileNotFoundError):
        pjax.export.load(tmp_path / "none")


def test_a_difference_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_difference", lambda a, b: 0.5)
    with pytest.warns(packing.DifferenceWarning, match="differ by up to 0.5"):
        pjax.export.pack(lambda _, x: jnp.sign(x), {}, whole(4, 12), tmp_path / "f.npz")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_outputs_that_are_not_finite_warn(tmp_path):
    with pytest.warns(packing.DifferenceWarning, match="are not finite"):
        report = pjax.export.pack(
            lambda w, x: x @ w, jnp.full((12, 2), jnp.nan), whole(4, 12), tmp_path / "f.npz"
        )
    assert np.isnan(report.difference)


_ALONE = """
import sys
sys.modules["jax"] = None  # cannot be imported
sys.path[:0] = [{folder!r}]
import numpy as np
from predictor import load
rows, outputs = np.load({rows!r}), np.load({outputs!r})
np.testing.assert_array_equal(load({path!r})(rows), outputs)
others = {{name.partition(".")[0] for name, module in sys.modules.items() if module}}
print(sorted(n for n in others - set(sys.stdlib_module_names) if not n.startswith("_")))
"""


def test_the_predictor_needs_numpy_only(tmp_path):
    shutil.copy(predictor.__file__, tmp_path / "predictor.py")
    x = whole(24, 12)
    packed(lambda _, x: FUNCTIONS["two convolutions"](x), {}, x, tmp_path / "f.npz")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", FUNCTIONS["two convolutions"](x))
    code = _ALONE.format(
        folder=str(tmp_path), rows=str(tmp_path / "x.npy"), outputs=str(tmp_path / "y.npy"),
        path=str(tmp_path / "f.npz"),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['numpy', 'predictor']"


def test_numpy_without_a_count_of_ones(tmp_path, monkeypatch):
    words = np.random.default_rng(0).integers(0, 1 << 63, (5, 3), np.uint64)
    expected = predictor.count_ones(words)
    assert expected.tolist() == [[bin(word).count("1") for word in row] for row in words.tolist()]
    monkeypatch.setattr(predictor, "_OLD_NUMPY", True)
    monkeypatch.setattr(
        predictor, "_ONES", np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)
    )
    np.testing.assert_array_equal(predictor.count_ones(words), expected)
    np.testing.assert_array_equal(predictor.count_ones(words[:, :1]), expected[:, :1])


def test_the_file_is_bits_and_no_pickle(tmp_path):
    def network(params, x):
        return signs(x @ signs(params)) @ signs(W[:10])

    path = tmp_path / "f.npz"
    packed(network, normal(512, 10), whole(4, 512), path)
    with np.load(path, allow_pickle=False) as file:
        words = file["uint32"]
        assert set(file.files) <= {"program", "uint32", "float32", "int8"}
    assert len(words) == 512 * 10 // 32 + -(-10 * 10 // 32)
    assert zipfile.is_zipfile(path)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=80), st.integers(2, 16))
@settings(max_examples=50, deadline=None)
def test_bits_of_codes_come_back(codes, count):
    codes = np.asarray(codes, np.uint8) % count
    words = packed_codes(codes, count)
    assert words.dtype == np.uint32
    assert len(words) == -(-len(codes) * (count - 1).bit_length() // 32)
    np.testing.assert_array_equal(predictor.unpacked(words, codes.shape, count), codes)


@given(
    st.integers(2, 16), st.integers(2, 16), st.integers(-4, 4), st.integers(-4, 4),
    st.integers(1, 70), st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_products_of_levels(left, right, low, other, size, seed):
    """By bits, and by numbers."""
    rng = np.random.default_rng(seed)
    tables = [np.arange(n, dtype=np.float32) / 2 + first / 2
              for n, first in ((left, low), (right, other))]  # fmt: skip
    x = predictor.Levels(rng.integers(0, left, (5, size)).astype(np.uint8), tables[0])
    codes = rng.integers(0, right, (3, size)).astype(np.uint8)
    weights = predictor.Weights(None, tables[1], codes)
    found = predictor.product(x, weights)
    assert isinstance(found, predictor.Sums)
    np.testing.assert_array_equal(found.numbers(), x.numbers() @ tables[1][codes].T)
    assert np.abs(found.counts).max() <= found.bound
    if found.parity is not None:
        assert np.all(found.counts % 2 == found.parity)


def test_thresholds_of_any_whole_number():
    """For all sums that there can be, functions that rise and functions that fall."""
    counts = np.arange(-40, 41).reshape(-1, 1).astype(np.int32)
    value = predictor.Sums(np.tile(counts, (1, 5)), 0.25, 40, None)
    slopes = np.array([[1.0, -0.7, 0.0, 30.0, -1e-3]], np.float32)

    def level(x):
        return np.clip(np.round(x * slopes + np.float32(0.3)), -2, 3) + 2

    levels = np.arange(-2.0, 4.0)
    found = thresholds.find(lambda x: level(x).astype(int), value, (1, 5), levels)
    assert found.limits.dtype == np.int8
    got = predictor._levels(value, limits=found.limits, table=found.table, flip=found.flip)
    np.testing.assert_array_equal(got.numbers(), level(value.numbers()) - 2)


def test_thresholds_of_any_number():
    x = np.asarray(normal(4000, 4) * jnp.exp(4 * normal(4000, 1, seed=1)))
    shift = np.asarray([[0.1, -0.7, 1e-8, 0.0]], np.float32)

    def level(x):
        return np.sign(x.astype(np.float32) + shift).astype(int) + 1

    found = thresholds.find(level, x, (1, 4), np.array([-1.0, 0.0, 1.0]))
    got = predictor._levels(x, limits=found.limits, table=found.table)
    np.testing.assert_array_equal(got.numbers() + 1, level(x))
    exact = predictor._levels(-shift, limits=found.limits, table=found.table)
    np.testing.assert_array_equal(exact.numbers(), 0)


def test_reports_say_what_was_packed(tmp_path):
    report, _ = packed(
        lambda _, x: FUNCTIONS["threshold"](x), {"w": W}, whole(4, 12), tmp_path / "f.npz"
    )
    text = str(report)
    assert "480 in float32" in text
    assert "12x10, weights: 2 levels; sums" in text
    assert "10x4, weights: 2 levels; xor and popcount, inputs of 1 bits" in text
    assert Path(__file__).name in text
