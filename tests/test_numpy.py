"""`pjax.numpy` against NumPy, and its errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax import numpy as pnp


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = values(2, 3, 4)

CASES = {
    "dot": (pnp.dot, np.dot, (values(2, 3), values(3, 4))),
    "dot of vectors": (pnp.dot, np.dot, (values(3), values(3, seed=1))),
    "dot, many axes": (pnp.dot, np.dot, (values(2, 5, 3), values(3, 4))),
    "matmul": (pnp.matmul, np.matmul, (values(5, 2, 3), values(5, 3, 4))),
    "add": (pnp.add, np.add, (values(2, 3), values(3, seed=1))),
    "add of three": (pnp.add, lambda a, b, c: a + b + c, (X, X * X, values(4))),
    "maximum": (pnp.maximum, np.maximum, (values(2, 3), values(3, seed=1))),
    "relu": (pnp.relu, lambda a: np.maximum(a, 0), (X,)),
    "sum_relu": (pnp.sum_relu, lambda a, b: np.maximum(a + b, 0), (X, values(4, seed=1))),
    "sum_relu of one": (pnp.sum_relu, lambda a: np.maximum(a, 0), (X,)),
    "sum": (pnp.sum, np.sum, (X,)),
    "sum, axes": (lambda a: pnp.sum(a, [0, 2]), lambda a: a.sum((0, 2)), (X,)),
    "sum, keepdims": (lambda a: pnp.sum(a, -1, True), lambda a: a.sum(-1, keepdims=True), (X,)),
    "max": (pnp.max, np.max, (X,)),
    "max, axis": (lambda a: pnp.max(a, 1), lambda a: a.max(1), (X,)),
    "max, axes": (
        lambda a: pnp.max(a, (0, -1), keepdims=True),
        lambda a: a.max((0, -1), keepdims=True),
        (X,),
    ),
    "reshape": (lambda a: pnp.reshape(a, (4, -1)), lambda a: a.reshape(4, -1), (X,)),
    "transpose": (pnp.transpose, np.transpose, (X,)),
    "transpose, axes": (
        lambda a: pnp.transpose(a, (1, 0, 2)),
        lambda a: a.transpose(1, 0, 2),
        (X,),
    ),
    "swapaxes": (lambda a: pnp.swapaxes(a, 0, -1), lambda a: a.swapaxes(0, -1), (X,)),
    "moveaxis": (lambda a: pnp.moveaxis(a, 0, -1), lambda a: np.moveaxis(a, 0, -1), (X,)),
    "moveaxis, two": (
        lambda a: pnp.moveaxis(a, [0, 1], [1, 2]),
        lambda a: np.moveaxis(a, [0, 1], [1, 2]),
        (X,),
    ),
    "expand_dims": (lambda a: pnp.expand_dims(a, 1), lambda a: np.expand_dims(a, 1), (X,)),
    "expand_dims, two": (
        lambda a: pnp.expand_dims(a, [0, -1]),
        lambda a: np.expand_dims(a, (0, -1)),
        (X,),
    ),
    "squeeze": (pnp.squeeze, np.squeeze, (values(1, 3, 1),)),
    "squeeze, axis": (lambda a: pnp.squeeze(a, 0), lambda a: a.squeeze(0), (values(1, 3, 1),)),
    "repeat": (lambda a: pnp.repeat(a, 2), lambda a: a.repeat(2), (X,)),
    "repeat, axis": (lambda a: pnp.repeat(a, 3, axis=1), lambda a: a.repeat(3, axis=1), (X,)),
    "repeat, counts": (
        lambda a: pnp.repeat(a, [0, 2, 1], axis=-2),
        lambda a: a.repeat([0, 2, 1], axis=-2),
        (X,),
    ),
    "concatenate": (
        lambda a, b: pnp.concatenate([a, b], axis=-1),
        lambda a, b: np.concatenate([a, b], axis=-1),
        (X, values(2, 3, 1)),
    ),
    "stack": (
        lambda a, b: pnp.stack((a, b), axis=-1),
        lambda a, b: np.stack((a, b), axis=-1),
        (X, 2 * X),
    ),
    "broadcast_to": (
        lambda a: pnp.broadcast_to(a, (5, 2, 3)),
        lambda a: np.broadcast_to(a, (5, 2, 3)),
        (values(2, 1),),
    ),
    "zero_pad": (lambda a: pnp.zero_pad(a, 2), lambda a: np.pad(a, 2), (X,)),
    "zero_pad, pairs": (
        lambda a: pnp.zero_pad(a, [0, (1, 2), (3, 0)]),
        lambda a: np.pad(a, [(0, 0), (1, 2), (3, 0)]),
        (X,),
    ),
    "index, repeated": (lambda a: pnp.index(a, [1, 0, 1]), lambda a: a[[1, 0, 1]], (X,)),
    "index, integer": (lambda a: pnp.index(a, -1), lambda a: a[-1], (X,)),
    "index, slices": (
        lambda a: pnp.index(a, (slice(None), slice(None, None, 2), None)),
        lambda a: a[:, ::2, None],
        (X,),
    ),
    "index, ellipsis": (
        lambda a: pnp.index(a, (..., np.array([[0, -1], [2, 2]]))),
        lambda a: a[..., np.array([[0, -1], [2, 2]])],
        (X,),
    ),
    "index, two arrays": (
        lambda a: pnp.index(a, ([0, 1, 1], [2, 0, 0])),
        lambda a: a[[0, 1, 1], [2, 0, 0]],
        (X,),
    ),
    "index, mask": (
        lambda a: pnp.index(a, (0, np.array([True, False, True]))),
        lambda a: a[0, [True, False, True]],
        (X,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_as_numpy(name: str) -> None:
    ours, reference, arguments = CASES[name]
    expected = reference(*arguments)
    for function in (ours, jax.jit(ours)):
        result = function(*arguments)
        assert isinstance(result, jax.Array)
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "lax_padding"),
    [
        (3, 1, "SAME", "SAME"),
        (3, 2, "SAME", "SAME"),
        ((2, 3), (3, 1), "VALID", "VALID"),
        ((1, 1), 2, "valid", "VALID"),
        ((5, 4), (2, 3), 2, [(2, 2), (2, 2)]),
        ((3, 2), 1, ((0, 3), (2, 1)), [(0, 3), (2, 1)]),
        (2, 4, (1, (0, 1)), [(1, 1), (0, 1)]),
        ((8, 9), 1, "VALID", "VALID"),
    ],
)
def test_conv_patch_times_a_kernel_is_the_convolution(kernel, stride, padding, lax_padding) -> None:
    x = jnp.asarray(values(2, 8, 9, 3))
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = jnp.asarray(values(kh, kw, 3, 5, seed=1))
    patches = pnp.conv_patch(x, kernel, stride, padding)
    strides = (stride, stride) if isinstance(stride, int) else stride
    expected = jax.lax.conv_general_dilated(
        x, weight, strides, lax_padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert patches.shape == (*expected.shape[:3], kh * kw * 3)
    np.testing.assert_allclose(
        pnp.dot(patches, weight.reshape(-1, 5)), expected, rtol=1e-4, atol=1e-4
    )


def test_conv_patch_entries_follow_the_formula() -> None:
    x = values(5, 6, 2)
    patches = pnp.conv_patch(x, (2, 3), (2, 1), "VALID")
    i, j, a, b, k = 1, 2, 1, 2, 0
    assert patches[i, j, (a * 3 + b) * 2 + k] == x[i * 2 + a, j + b, k]


def test_conv_patch_is_wiring_only() -> None:
    jaxpr = jax.make_jaxpr(lambda x: pnp.conv_patch(x, 3, 2, "SAME"))(values(2, 8, 8, 3))
    wiring = {"slice", "concatenate", "pad", "reshape", "transpose", "broadcast_in_dim", "jit"}
    assert {equation.primitive.name for equation in jaxpr.eqns} <= wiring


def test_vmap_is_the_usual_one() -> None:
    weight = values(3, 4)
    np.testing.assert_allclose(
        pnp.vmap(lambda row: pnp.dot(row, weight))(values(5, 3)), values(5, 3) @ weight, rtol=1e-5
    )


def test_index_with_traced_indices_is_clipped() -> None:
    taken = jax.jit(pnp.index)(X, jnp.array([1, 0, 7]))
    np.testing.assert_array_equal(taken, X[[1, 0, 1]])


def test_array_and_parameter() -> None:
    assert pnp.array([1, 2], name="counts").dtype == jnp.int32
    assert pnp.parameter([1, 2], name="scale").dtype == jnp.float32
    assert pnp.parameter(np.float16(1)).dtype == jnp.float16
    with pytest.raises(TypeError, match="real numbers"):
        pnp.parameter(True)
    with pytest.raises(TypeError, match="`name`"):
        pnp.array(1.0, name=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pnp.conv_patch(values(8, 8), 3), ValueError, "height, width, channels"),
        (lambda: pnp.conv_patch(values(4, 4, 1), 5, padding="VALID"), ValueError, "does not fit"),
        (lambda: pnp.conv_patch(values(4, 4, 1), 0), ValueError, "kernel_size"),
        (lambda: pnp.conv_patch(values(4, 4, 1), 3, stride=(1, 2, 3)), ValueError, "stride"),
        (lambda: pnp.conv_patch(values(4, 4, 1), 3, padding="FULL"), ValueError, "SAME"),
        (lambda: pnp.conv_patch(values(4, 4, 1), 3, padding=-1), ValueError, "padding"),
        (lambda: pnp.zero_pad(X, [(1, 1)]), ValueError, "each of 3 axes"),
        (lambda: pnp.zero_pad(X, [0, 0, (1, 2, 3)]), ValueError, "pairs"),
        (lambda: pnp.zero_pad(X, -1), ValueError, "pad_width"),
        (lambda: pnp.index(X, 2), IndexError, "out of bounds"),
        (lambda: pnp.index(X, (0, [0, 3])), IndexError, "out of bounds"),
        (lambda: pnp.index(X, 1.5), IndexError, "valid indices"),
        (lambda: jax.jit(pnp.index)(X, jnp.array([0.5])), IndexError, "integer indices"),
        (lambda: pnp.repeat(X, -1, axis=0), ValueError, "repeats"),
        (lambda: pnp.repeat(X, [1, 2, 3], axis=0), ValueError, "2 entries"),
        (lambda: pnp.repeat(X, 2, axis=3), ValueError, "axis 3"),
        (lambda: pnp.stack([]), ValueError, "at least one"),
        (lambda: pnp.stack([values(2), values(3)]), ValueError, "one shape"),
        (lambda: pnp.dot(values(2, 3), values(4, 5)), TypeError, "contract"),
        (lambda: pnp.reshape(X, (5, 5)), TypeError, "reshape"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
