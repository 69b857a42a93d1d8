"""Convolutions: the operation against a loop, its copies at borders, and compact against lifted."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics
from pjax.projections.gains import largest
from pjax.projections.products.convolution import Convolution
from pjax.projections.products.free import project_compact, project_lifted
from pjax.projections.products.pinned import (
    project_pinned_compact,
    project_pinned_structured,
    structured_mean,
    structured_squared_norm,
)
from pjax.rules import LayerSum, Product
from pjax.rules.layer_terms import product_gain
from tests.oracles_bilinear import ScalarProducts, least_objective
from tests.selection import mostly_slow

NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
NCHW = ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))


def conv(left, right, numbers=NHWC, **options):
    rank = len(left) - 2
    given = {
        "window_strides": (1,) * rank,
        "padding": ((0, 0),) * rank,
        "lhs_dilation": (1,) * rank,
        "rhs_dilation": (1,) * rank,
    }
    return Convolution(left, right, dimension_numbers=numbers, **{**given, **options})


OPERATIONS = {
    "plain": conv((2, 4, 5, 3), (2, 3, 3, 4)),
    "same": conv((2, 4, 5, 2), (3, 3, 2, 3), padding=((1, 1), (1, 1))),
    "strided": conv((2, 6, 5, 2), (3, 3, 2, 3), window_strides=(2, 2), padding=((0, 1), (1, 1))),
    "skips entries": conv((2, 7, 6, 2), (2, 1, 2, 3), window_strides=(3, 2)),
    "negative padding": conv((2, 6, 6, 2), (3, 2, 2, 2), padding=((-1, 0), (2, -1))),
    "dilated": conv((1, 7, 6, 2), (3, 2, 2, 3), rhs_dilation=(2, 3), padding=((2, 2), (1, 0))),
    "transposed": conv((2, 3, 4, 2), (3, 3, 2, 2), lhs_dilation=(2, 3), padding=((2, 1), (1, 2))),
    "feature groups": conv(
        (2, 4, 5, 4), (3, 2, 2, 6), padding=((1, 1), (0, 0)), feature_group_count=2
    ),
    "depthwise": conv((2, 4, 4, 3), (3, 3, 1, 3), padding=((1, 1), (1, 1)), feature_group_count=3),
    "batch groups": conv(
        (4, 4, 3, 2), (2, 2, 2, 6), padding=((1, 0), (0, 0)), batch_group_count=2
    ),
    "channels first": conv(
        (2, 3, 5, 4), (2, 3, 3, 2), NCHW, window_strides=(2, 1), padding=((1, 1), (0, 1))
    ),
    "odd numbers": conv((3, 2, 5, 2), (2, 3, 2, 3), ((3, 1, 2, 0), (0, 2, 1, 3), (2, 3, 0, 1)),
                        padding=((1, 0), (1, 2))),
    "one axis": conv((2, 7, 3), (3, 3, 2), ((0, 2, 1), (2, 1, 0), (0, 2, 1)), padding=((2, 0),)),
    "three axes": conv(
        (1, 3, 3, 4, 2), (2, 2, 2, 2, 2), ((0, 4, 1, 2, 3), (4, 3, 0, 1, 2), (0, 4, 1, 2, 3)),
        window_strides=(2, 1, 2), padding=((1, 1), (0, 0), (1, 0)),
    ),
    "one entry": conv((2, 3, 3, 1), (1, 1, 1, 2), padding=((1, 0), (0, 0))),
    "only padding": conv((2, 2, 3, 2), (1, 1, 2, 2), padding=((2, 0), (0, 1))),
}  # fmt: skip
OFTEN = ("strided", "transposed", "feature groups", "odd numbers")
operations = pytest.mark.parametrize("name", mostly_slow(OPERATIONS, OFTEN))


def reads(op: Convolution):
    """For each output the pairs of (left, right) entries that it multiplies, by a plain loop."""
    lhs, rhs, out = op.dimension_numbers
    spatial = range(len(op.window_strides))
    group_in, group_out = op.right_shape[rhs[1]], op.right_shape[rhs[0]]
    per_group = group_out // (op.feature_group_count * op.batch_group_count)
    batch = op.left_shape[lhs[0]] // op.batch_group_count
    found = {}
    for output in np.ndindex(*op.output_shape):
        n, o = output[out[0]], output[out[1]]
        group = o // per_group
        pairs = []
        taps = [range(op.right_shape[rhs[2 + axis]]) for axis in spatial]
        for tap in itertools.product(*taps):
            place = []
            for axis in spatial:
                at = output[out[2 + axis]] * op.window_strides[axis]
                at += tap[axis] * op.rhs_dilation[axis] - op.padding[axis][0]
                at, rest = divmod(at, op.lhs_dilation[axis])
                if rest == 0 and 0 <= at < op.left_shape[lhs[2 + axis]]:
                    place.append(at)
            if len(place) < len(taps):
                continue
            for channel in range(group_in):
                left, right = [0] * (2 + len(taps)), [0] * (2 + len(taps))
                left[lhs[0]] = n + (group * batch if op.batch_group_count > 1 else 0)
                left[lhs[1]] = channel + (group * group_in if op.feature_group_count > 1 else 0)
                right[rhs[0]], right[rhs[1]] = o, channel
                for axis in spatial:
                    left[lhs[2 + axis]], right[rhs[2 + axis]] = place[axis], tap[axis]
                pairs.append((tuple(left), tuple(right)))
        found[output] = pairs
    return found


def jitted(project):
    return jax.jit(project, static_argnums=0)


def draw(op, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=op.left_shape)),
        jnp.asarray(rng.normal(size=op.right_shape)),
        jnp.asarray(rng.normal(size=op.output_shape)),
    )


@operations
def test_values_transposes_and_sums_are_those_of_a_loop(x64, name):
    op = OPERATIONS[name]
    operands = draw(op)
    left, right, cotangent = map(np.asarray, operands)
    expected = {
        key: np.zeros(shape)
        for key, shape in (
            ("value", op.output_shape), ("left energy", op.output_shape),
            ("right energy", op.output_shape), ("length", op.output_shape),
            ("left", op.left_shape), ("left sum", op.left_shape), ("left copies", op.left_shape),
            ("right", op.right_shape), ("right sum", op.right_shape),
            ("right copies", op.right_shape),
        )
    }  # fmt: skip
    for output, pairs in reads(op).items():
        for x, w in pairs:
            expected["value"][output] += left[x] * right[w]
            expected["left energy"][output] += left[x]
            expected["right energy"][output] += right[w]
            expected["length"][output] += 1
            expected["left"][x] += cotangent[output] * right[w]
            expected["left sum"][x] += cotangent[output]
            expected["left copies"][x] += 1
            expected["right"][w] += cotangent[output] * left[x]
            expected["right sum"][w] += cotangent[output]
            expected["right copies"][w] += 1
    assert jax.eval_shape(op, left, right).shape == op.output_shape
    left, right, cotangent = operands
    found = {
        "value": op(left, right),
        "left energy": op.left_energy(left),
        "right energy": op.right_energy(right),
        "length": op.slice_lengths,
        "left": op.transpose_left(cotangent, right),
        "left sum": op.left_sum(cotangent),
        "left copies": op.left_copies,
        "right": op.transpose_right(cotangent, left),
        "right sum": op.right_sum(cotangent),
        "right copies": op.right_copies,
    }
    for key, value in found.items():
        value = np.broadcast_to(value, expected[key].shape)
        np.testing.assert_allclose(value, expected[key], atol=1e-12, err_msg=key)


@operations
def test_copies_are_those_of_a_loop_and_lowering_is_the_transpose(x64, name):
    op = OPERATIONS[name]
    left, right, _ = draw(op)
    lifted_left, lifted_right = op.lift_left(left), op.lift_right(right)
    assert lifted_left.shape == lifted_right.shape == (*op.output_shape, op.slice_length)
    for output, pairs in reads(op).items():
        products = sorted((float(left[x]), float(right[w])) for x, w in pairs)
        copies = zip(lifted_left[output].tolist(), lifted_right[output].tolist(), strict=True)
        assert products == sorted(pair for pair in copies if pair != (0.0, 0.0))
    np.testing.assert_allclose(op.lower_left(lifted_left), op.left_copies * left, atol=1e-12)
    np.testing.assert_allclose(op.lower_right(lifted_right), op.right_copies * right, atol=1e-12)
    ones = jnp.ones((*op.output_shape, op.slice_length))
    np.testing.assert_array_equal(op.mask_slices(ones), op.lift_left(jnp.ones_like(left)))


@pytest.mark.parametrize("weighting", [pytest.param("one", marks=pytest.mark.slow), "per output"])
@pytest.mark.parametrize("name", mostly_slow(OPERATIONS, ("strided", "odd numbers")))
def test_compact_is_the_mean_of_the_lifted_copies(x64, name, weighting):
    """And the copies are nearest points, found by brute force; entries without copies stay."""
    op = OPERATIONS[name]
    rng = np.random.default_rng(3)
    left_ref, right_ref, target = draw(op, 1)
    left, right = (0.3 * jnp.asarray(rng.normal(size=a.shape)) for a in (left_ref, right_ref))
    shape = op.output_shape if weighting == "per output" else ()
    left_weight, right_weight, target_weight = (
        jnp.asarray(rng.uniform(0.3, 3, shape)) for _ in range(3)
    )
    output_ref = op(left_ref, right_ref)
    asked = (left_weight, right_weight, target, target_weight, output_ref)
    compact = jitted(project_compact)(op, left_ref, right_ref, left, right, *asked)
    lifted = jitted(project_lifted)(
        op, left_ref, right_ref, op.lift_left(left), op.lift_right(right), *asked
    )

    def flat(copies):
        return np.asarray(copies).reshape(-1, op.slice_length)

    def per_output(value):
        return np.broadcast_to(value, op.output_shape).reshape(-1)

    problem = ScalarProducts(
        flat(op.lift_left(left_ref)), flat(op.lift_right(right_ref)),
        flat(op.lift_left(left)), flat(op.lift_right(right)),
        per_output(left_weight), per_output(right_weight),
        per_output(target), per_output(target_weight),
    )  # fmt: skip
    moved = flat(lifted.left_copies), flat(lifted.right_copies)
    np.testing.assert_allclose(problem.output_change(*moved), per_output(lifted.output), atol=1e-12)
    reading = per_output(op.slice_lengths) > 0
    least = least_objective(problem)
    assert np.all(problem.objective(*moved)[reading] <= least[reading] * (1 + 1e-9) + 1e-12)
    assert not per_output(lifted.output)[~reading].any()
    mask = np.asarray(op.lift_left(jnp.ones_like(left))) == 0
    assert not np.asarray(lifted.left_copies)[mask].any()
    assert not np.asarray(lifted.right_copies)[mask].any()

    np.testing.assert_allclose(compact.output, lifted.output, atol=1e-12)
    for mean, spread, copies, weight, lift, lower, counts, before in (
        (compact.left, compact.left_spread, lifted.left_copies, left_weight, op.lift_left,
         op.lower_left, op.left_copies, left),
        (compact.right, compact.right_spread, lifted.right_copies, right_weight, op.lift_right,
         op.lower_right, op.right_copies, right),
    ):  # fmt: skip
        weights = jnp.broadcast_to(weight, op.output_shape)[..., None]
        total = lower(jnp.broadcast_to(weights, copies.shape))
        read = np.broadcast_to(counts, before.shape) > 0
        expected = np.where(read, lower(weights * copies) / jnp.where(read, total, 1), before)
        np.testing.assert_allclose(mean, expected, atol=1e-12)
        squared = jnp.sum(weights * jnp.square(copies - lift(mean)))
        np.testing.assert_allclose(spread, squared, atol=1e-10)


@operations
def test_slices_of_zeros_move_along_entries_that_are_there(x64, name):
    """Where both operands vanish a nearest point is chosen; constants are no part of it."""
    op = OPERATIONS[name]
    left, right = jnp.zeros(op.left_shape), jnp.zeros(op.right_shape)
    target = jnp.full(op.output_shape, 5.0)
    asked = (1.0, 1.0, target, 2.0, jnp.zeros(op.output_shape))
    lifted = jitted(project_lifted)(
        op, left, right, op.lift_left(left), op.lift_right(right), *asked
    )
    output = jnp.sum(lifted.left_copies * lifted.right_copies, axis=-1)
    np.testing.assert_allclose(output, lifted.output, atol=1e-12)
    lengths = np.broadcast_to(op.slice_lengths, op.output_shape)
    # |x|² = |w|² = y and 2 (z − y) = 1.
    np.testing.assert_allclose(output, np.where(lengths > 0, 4.5, 0.0), atol=1e-9)
    compact = jitted(project_compact)(op, left, right, left, right, *asked)
    mean = op.lower_left(lifted.left_copies) / np.maximum(op.left_copies, 1)
    np.testing.assert_allclose(compact.left, mean, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@operations
def test_a_pinned_operand_keeps_the_structured_form(x64, name, side):
    op = OPERATIONS[name]
    rng = np.random.default_rng(5)
    left, right, target = draw(op, 2)
    pinned, free = (left, right) if side == "left" else (right, left)
    free_dev = 0.3 * jnp.asarray(rng.normal(size=free.shape))
    lift_pinned, lift, lower, counts = (
        (op.lift_left, op.lift_right, op.lower_right, op.right_copies)
        if side == "left"
        else (op.lift_right, op.lift_left, op.lower_left, op.left_copies)
    )
    data, copies = lift_pinned(pinned), lift(free_dev)
    multiplier = jnp.zeros(op.output_shape)
    for _ in range(2):
        # Each scalar product alone is a least-squares problem of one row.
        value = jnp.sum(data * copies, axis=-1)
        energy = jnp.sum(data**2, axis=-1)
        copies = copies + data * (2.0 * (target - value) / (0.7 + 2.0 * energy))[..., None]
        structured = project_pinned_structured(
            op, side, pinned, free_dev, multiplier, 0.7, target, 2.0
        )
        multiplier = structured.multiplier
    np.testing.assert_allclose(structured.output, jnp.sum(data * copies, axis=-1), atol=1e-12)
    mean = structured_mean(op, side, pinned, free_dev, multiplier)
    read = np.broadcast_to(counts, free.shape) > 0
    expected = np.where(read, lower(copies) / np.maximum(counts, 1), free_dev)
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    norm = structured_squared_norm(op, side, pinned, free_dev, multiplier, 0.7)
    np.testing.assert_allclose(norm, 0.7 * jnp.sum(copies**2), rtol=1e-10)
    compact = project_pinned_compact(op, side, pinned, free_dev, 0.7, target, 2.0)
    first = project_pinned_structured(
        op, side, pinned, free_dev, jnp.zeros(op.output_shape), 0.7, target, 2.0
    )
    once = structured_mean(op, side, pinned, free_dev, first.multiplier)
    np.testing.assert_allclose(compact.free, once, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@operations
def test_gains_are_bounds_and_close(x64, name, side):
    op = OPERATIONS[name]
    left, right, _ = draw(op, 4)
    other = right if side == "left" else left
    bound = product_gain(Product(op, True, True), side, (left, right), None)
    ((gain, vector),) = largest([bound], 8)
    free = left if side == "left" else right

    def apply(x):
        return op(x, other) if side == "left" else op(other, x)

    matrix = np.asarray(jax.jit(jax.jacobian(apply))(free)).reshape(-1, free.size)
    exact = np.linalg.norm(matrix, 2) ** 2
    assert 0.95 * exact < float(gain) < 1.5 * exact
    assert vector is not None
    assert vector.size <= free.size


@operations
def test_channels_are_last_in_all_that_runs(name):
    """Other convolutions are compiled to plain loops within a loop, on a CPU."""
    op = OPERATIONS[name]
    left, right, out = draw(op, 4)
    for apply, operands in (
        (op, (left, right)),
        (op.transpose_left, (out, right)),
        (op.transpose_right, (out, left)),
    ):
        jaxpr = jax.make_jaxpr(apply)(*operands).jaxpr
        (found,) = [e for e in jaxpr.eqns if e.primitive is jax.lax.conv_general_dilated_p]
        numbers = found.params["dimension_numbers"]
        count = len(numbers.lhs_spec) - 2
        spatial = tuple(range(1, count + 1))
        assert numbers.lhs_spec == numbers.out_spec == (0, count + 1, *spatial)
        assert numbers.rhs_spec == (count + 1, count, *(axis - 1 for axis in spatial))


def test_an_empty_slice_is_refused():
    with pytest.raises(ValueError, match="sums over no entries"):
        conv((2, 4, 4, 0), (3, 3, 0, 2))


# Graphs


def features(p, x, options, pool):
    x = jax.nn.relu(
        jax.lax.conv_general_dilated(x, p["k0"], dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                     **options) + p["b0"]
    )  # fmt: skip
    if pool:
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    x = jax.lax.conv_general_dilated(
        x, p["k1"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(x + p["b1"])
    return x.reshape(len(x), -1)


def example(options, pool=False, groups=1):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 6, 2)))
    params = {"k0": rng.normal(size=(3, 3, 2 // groups, 4)), "b0": rng.normal(size=4),
              "k1": rng.normal(size=(3, 3, 4, 3)), "b1": rng.normal(size=3)}  # fmt: skip
    params = {name: jnp.asarray(0.4 * value) for name, value in params.items()}
    width = jax.eval_shape(lambda: features(params, x, options, pool)).shape[-1]
    params["w"] = jnp.asarray(0.3 * rng.normal(size=(width, 4)))
    labels = jax.nn.one_hot(jnp.arange(3) % 4, 4)

    def loss(p):
        return pjax.cross_entropy(features(p, x, options, pool) @ p["w"], labels).mean()

    return loss, params


CONFIGURATIONS = {
    "strided": ({"window_strides": (2, 2), "padding": "SAME"}, False, 1),
    "pooled": ({"window_strides": (1, 1), "padding": "SAME"}, True, 1),
    "groups": (
        {"window_strides": (2, 1), "padding": "SAME", "feature_group_count": 2}, False, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(CONFIGURATIONS, ["strided"]))
def test_alternating_projections_on_means_are_those_on_all_copies(x64, name):
    """In neuron splitting, until the first layer moves: borders, strides and groups included."""
    loss, params = example(*CONFIGURATIONS[name])
    found, sizes = [], []
    for reflecting in (False, True):
        problem = pjax.feasibility_problem(loss, params, reflecting=reflecting)
        project = jax.jit(problem.project, static_argnums=0)
        state = problem.initial()
        for _ in range(5):
            for group in range(problem.num_groups):
                state = project(group, state)
        # The parameters' consensus, after a projection onto the operations.
        found.append(problem.parameter_deviations(state))
        sizes.append(problem.sizes())
    assert sizes[0].edge_variables == sizes[1].edge_variables
    assert sizes[0].stored < sizes[1].stored
    for compact, lifted in zip(*found, strict=True):
        assert np.abs(lifted).max() > 1e-10
        np.testing.assert_allclose(compact, lifted, atol=1e-7 * np.abs(lifted).max())


@pytest.mark.parametrize("splitting", mostly_slow(["neuron", "layer"], ["layer"]))
@pytest.mark.parametrize(
    "solver",
    mostly_slow(
        ["AlternatingProjections", "CyclicProjections", "DouglasRachford"], ["CyclicProjections"]
    ),
)
def test_every_solver_trains_a_convolutional_network(x64, splitting, solver):
    loss, params = example(*CONFIGURATIONS["pooled"])
    options = {} if solver == "CyclicProjections" else {"steps_per_update": 30}
    optimizer = getattr(pjax.optim, solver)(splitting=splitting, check=False, **options)
    state, start = optimizer.init(loss, params), float(loss(params))
    for _ in range(6):
        params, _, state = optimizer.update(loss, params, state)
    assert float(loss(params)) < 0.97 * start


def test_the_displacement_of_stiff_activations_is_the_gradient(x64):
    """Convolution, bias, max-pooling and dense layer: in the limit, `jax.grad` of the loss."""
    loss, params = example(*CONFIGURATIONS["pooled"])
    metric = metrics.Spectral(activations=1e7, prox_step=1e-7)
    value, found = pjax.value_and_displacement(loss, metric=metric)(params)
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    for name in params:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4 * scale, err_msg=name)


@pytest.mark.slow
def test_layers_of_flax_and_equinox_are_convolutions_without_copies():
    """Convolution with bias is one node in layer splitting (Flax), and no patch is stored."""
    nnx = pytest.importorskip("flax.nnx")
    eqx = pytest.importorskip("equinox")
    x, labels = jnp.ones((2, 8, 8, 3)), jax.nn.one_hot(jnp.arange(2), 4)

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
            self.deep = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
            self.up = nnx.ConvTranspose(8, 4, (2, 2), strides=(2, 2), rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.conv(x))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            x = nnx.relu(self.deep(x))
            return nnx.avg_pool(self.up(x), (4, 4)).reshape(len(x), -1)

    graphdef, flax_params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    def flax_loss(p):
        return pjax.cross_entropy(nnx.merge(graphdef, p, copy=True)(x), labels).mean()

    keys = jax.random.split(jax.random.key(0), 2)
    model = eqx.nn.Sequential([
        eqx.nn.Conv2d(3, 8, 3, stride=2, padding=1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool2d(3, 1, padding=1),
        eqx.nn.AvgPool2d(2, 2),
        eqx.nn.Conv2d(8, 4, 2, key=keys[1]),
        eqx.nn.AdaptiveAvgPool2d(1),
    ])  # fmt: skip
    eqx_params, static = eqx.partition(model, eqx.is_inexact_array)
    images = jnp.moveaxis(x, -1, 1)

    def eqx_loss(p):
        logits = jax.vmap(eqx.combine(p, static))(images)
        return pjax.cross_entropy(logits.reshape(2, 4), labels).mean()

    for loss, params, convolutions in ((flax_loss, flax_params, 3), (eqx_loss, eqx_params, 2)):
        for splitting in ("neuron", "layer"):
            problem = pjax.feasibility_problem(loss, params, splitting=splitting)
            np.testing.assert_allclose(problem.loss, loss(params), rtol=1e-5)
            operations = [
                operation
                for node in problem.graph.nodes
                if node.rule is not None
                for product in getattr(node.rule, "terms", (node.rule,))
                if isinstance(operation := getattr(product, "operation", None), Convolution)
            ]
            assert len(operations) == convolutions
            residuals = problem.residuals()
            assert all(np.isfinite(float(value)) for value in residuals.values())
    nodes = pjax.feasibility_problem(flax_loss, flax_params, splitting="layer").graph.nodes
    assert [len(n.rule.terms) for n in nodes if isinstance(n.rule, LayerSum)] == [2, 2, 2]
