from __future__ import annotations

import functools
import math
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from scipy import optimize

from pjax.projections.products.dot_general import DotGeneral
from pjax.projections.products.free import CompactProjection, project_compact, project_lifted
from pjax.projections.products.operation import Multiply
from pjax.projections.products.pinned import (
    project_pinned_compact,
    project_pinned_structured,
    structured_mean,
    structured_squared_norm,
)
from pjax.projections.products.scalar_products import solve_multiplier
from tests import oracles
from tests.conftest import enable_x64
from tests.oracles import Precision, assert_no_farther, assert_small
from tests.oracles_bilinear import (
    REGIMES,
    ScalarProducts,
    draw_scalar_products,
    least_objective,
    root_of_multiplier_equation,
)

POINTS = 1250  # times 8 regimes: 10,000 for each slice length and precision, per drawn seed

# Far inside what is promised (1e-3 and 1e-5), so that a loss of accuracy shows.
FLOAT32 = Precision(np.float32, relative=2e-5, eps=1.2e-7)
FLOAT64 = Precision(np.float64, relative=1e-9, eps=2.3e-16)
PRECISIONS = (FLOAT32, FLOAT64)

precisions = pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.dtype.__name__)
seeds = st.integers(0, 2**32 - 1)


def few_draws(count):
    """`count` draws of hypothesis; each holds many points, and there is nothing to shrink."""
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=count, deadline=None, derandomize=True, phases=phases)


def scalar_products(points, length):
    """The operation that is `points` scalar products of slices of their own."""
    shape = (points, length)
    return DotGeneral((((1,), (1,)), ((0,), (0,))), shape, shape)


def arrays(problem: ScalarProducts, precision: Precision):
    values = (getattr(problem, field.name) for field in fields(problem))
    return [jnp.asarray(value, precision.dtype) for value in values]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(project, op, left_ref, right_ref, *rest):
    return project(op, left_ref, right_ref, *rest, op(left_ref, right_ref))


def float64(values):
    return [np.asarray(value, np.float64) for value in values]


def assert_nearest(
    problem: ScalarProducts, left: np.ndarray, right: np.ndarray, output, precision: Precision
):
    """Feasible, and no farther than the oracle, up to the rounding of the result itself."""
    assert all(np.isfinite(value).all() for value in (left, right, output))
    moved_right = problem.right_ref + right
    moves = np.abs(problem.left_ref * right) + np.abs(left * moved_right)
    given_moves = np.abs(problem.left_ref * problem.right_dev)
    given_moves += np.abs(problem.left_dev * problem.right)
    terms = np.sum(moves + given_moves, axis=-1) + np.abs(problem.target_dev)
    change = problem.output_change(left, right)
    assert_small(change - output, 8 * precision.eps * terms + np.finfo(np.float32).tiny)

    rounding = problem.left_weight * np.sum(left**2 + problem.left_dev**2, axis=-1)
    rounding += problem.right_weight * np.sum(right**2 + problem.right_dev**2, axis=-1)
    rounding += problem.target_weight * terms**2
    assert_no_farther(
        problem.objective(left, right),
        least_objective(problem),
        16 * precision.eps**2 * rounding + np.finfo(np.float32).tiny ** 2,
        precision.relative,
    )


def assert_stays(problem: ScalarProducts, first, again, precision: Precision):
    """A second projection is the nearest point too: of a target that is met to rounding."""
    left, right, output = first
    miss = problem.output_change(left, right) - output
    moved = problem.left_weight * np.sum((again[0] - left) ** 2, axis=-1)
    moved += problem.right_weight * np.sum((again[1] - right) ** 2, axis=-1)
    terms = np.abs(problem.left_ref * right) + np.abs(left * (problem.right_ref + right))
    rounding = problem.left_weight * np.sum(left**2, axis=-1)
    rounding += problem.right_weight * np.sum(right**2, axis=-1)
    rounding += problem.target_weight * np.sum(terms, axis=-1) ** 2
    assert_small(
        moved,
        2 * problem.target_weight * miss**2
        + 256 * precision.eps**2 * rounding
        + np.finfo(np.float32).tiny ** 2,
    )


# The multiplier


@precisions
@pytest.mark.parametrize(("low", "high"), [(-2, 2), (-6, 6), (-12, 12), (-25, 2), (-6, 0), (0, 8)])
def test_multiplier_solves_its_equation(precision, low, high):
    random = np.random.default_rng(0)
    alpha, beta, g = (10 ** random.uniform(low, high, (3, 20_000))).astype(np.float32)
    g *= random.choice([-1, 1], g.shape)
    with precision.context():
        values = [jnp.asarray(value, precision.dtype) for value in (alpha, beta, g)]
        root = jax.jit(solve_multiplier)(*values)
        odds, set_valued = np.asarray(root.odds, np.float64), np.asarray(root.set_valued)
    near, far = np.where(g < 0, beta, alpha), np.where(g < 0, alpha, beta)
    t, u = root_of_multiplier_equation(*float64((near, far, np.abs(g))))
    assert np.isfinite(odds).all()
    here = ~set_valued
    assert here.mean() > 0.9
    tiny = float(np.finfo(np.float32).tiny)
    found = odds[here] / (1 + odds[here])
    np.testing.assert_allclose(found, t[here], rtol=100 * precision.eps, atol=tiny)
    # Where the two poles balance, 1 - t is only as well known as the coefficients are.
    tolerance = {np.float32: 3e-4, np.float64: 1e-11}[precision.dtype]
    np.testing.assert_allclose(1 / (1 + odds[here]), u[here], rtol=tolerance)


@precisions
def test_multiplier_is_finite_on_a_grid_with_zeros(precision):
    values = np.concatenate([[0.0], 10.0 ** np.arange(-36, 13, 4)])
    alpha, beta, g = np.meshgrid(values, values, np.concatenate([-values[::-1], values]))
    with precision.context():
        inputs = [jnp.asarray(value, precision.dtype) for value in (alpha, beta, g)]
        odds = np.asarray(jax.jit(solve_multiplier)(*inputs).odds)
    assert np.isfinite(odds).all()
    assert (odds >= 0).all()
    assert (odds[g == 0] == 0).all()


# Nearest points of scalar products


@precisions
@pytest.mark.parametrize("length", [1, 2, 5])
@few_draws(2)
@given(seed=seeds)
def test_lifted_projection_is_nearest_and_idempotent(precision, length, seed):
    op = scalar_products(POINTS, length)
    for regime in REGIMES:
        problem = draw_scalar_products(regime, seed, POINTS, length).rounded(precision.dtype)
        with precision.context():
            inputs = arrays(problem, precision)
            projected = run(project_lifted, op, *inputs)
            left, right, output = float64(projected)
            assert all(value.dtype == precision.dtype for value in projected)
            again = float64(
                run(
                    project_lifted,
                    op,
                    *inputs[:2],
                    *projected[:2],
                    *inputs[4:6],
                    projected[2],
                    inputs[7],
                )
            )
        assert_nearest(problem, left, right, output, precision)
        assert_stays(problem, (left, right, output), again, precision)


@precisions
@few_draws(2)
@given(seed=seeds)
def test_product_of_two_variables_is_nearest_and_idempotent(precision, seed):
    op = Multiply((POINTS,))
    for regime in REGIMES:
        problem = draw_scalar_products(regime, seed, POINTS, 1).rounded(precision.dtype)
        with precision.context():
            inputs = [
                value[:, 0] if value.ndim == 2 else value for value in arrays(problem, precision)
            ]
            projected = run(project_compact, op, *inputs)
            left, right, output = float64(projected[:3])
            again = float64(
                run(
                    project_compact,
                    op,
                    *inputs[:2],
                    *projected[:2],
                    *inputs[4:6],
                    projected.output,
                    inputs[7],
                )[:2]
            )
            # Each entry has one copy, which is its own mean.
            moved = problem.left_weight[:, None] * (left[:, None] - problem.left_dev) ** 2
            assert projected.left_spread <= 4 * precision.eps**2 * np.sum(moved)
        left, right = left[:, None], right[:, None]
        assert_nearest(problem, left, right, output, precision)
        again = [value[:, None] for value in again]
        assert_stays(problem, (left, right, output), again, precision)


@few_draws(1)
@given(seed=seeds)
def test_one_scalar_product_each_is_its_own_mean(seed):
    precision = FLOAT64
    op = scalar_products(POINTS, 5)
    for regime in REGIMES:
        if regime == "nearly opposed":
            continue  # the compact form knows |x ± w|² as a difference only; tested below
        problem = draw_scalar_products(regime, seed, POINTS, 5)
        with precision.context():
            compact = run(project_compact, op, *arrays(problem, precision))
            lifted = run(project_lifted, op, *arrays(problem, precision))
            left, right, _ = float64(compact[:3])
            wanted = float64(lifted)
        objective, least = problem.objective(left, right), problem.objective(*wanted[:2])
        rounding = problem.target_weight * np.sum(np.abs(problem.left * problem.right), -1) ** 2
        assert_no_farther(objective, least, 1e-28 * rounding, 1e-9)
        assert float(compact.left_spread) <= 1e-12 * np.sum(problem.left_weight[:, None] * left**2)


@pytest.mark.parametrize(("precision", "tolerance"), [(FLOAT32, 0.3), (FLOAT64, 1e-3)])
def test_compact_form_next_to_the_set_valued_case(precision, tolerance):
    # Documented: known to ε^⅓ there, times what a far target makes of it.
    op = scalar_products(20_000, 5)
    problem = draw_scalar_products("nearly opposed", 0, 20_000, 5).rounded(precision.dtype)
    with precision.context():
        left, right, _ = float64(run(project_compact, op, *arrays(problem, precision))[:3])
    least = least_objective(problem)
    excess = problem.objective(left, right) / least - 1
    assert np.quantile(excess, 0.9) < 10 * float(precision.eps) ** (1 / 3)
    assert excess.max() < tolerance


@pytest.mark.parametrize("regime", ["moderate", "zeros", "opposed"])
def test_oracle_is_the_global_minimum(regime):
    # The oracle searches stationary points; a minimiser that knows only the objective agrees.
    problem = draw_scalar_products(regime, 7, 8, 2)
    least = least_objective(problem)
    random = np.random.default_rng(0)
    for i in range(8):
        one = ScalarProducts(
            *(getattr(problem, field.name)[i : i + 1] for field in fields(problem))
        )

        def objective(point, one=one):
            return one.objective(point[None, :2], point[None, 2:])[0]

        size = np.abs(one.target_dev[0]) ** 0.5 + 1
        starts = random.normal(size=(6, 4)) * size
        found = min(optimize.minimize(objective, start).fun for start in starts)
        assert found >= least[i] * (1 - 1e-6) - 1e-9
        assert found <= least[i] * (1 + 1e-4) + 1e-6


@precisions
def test_nothing_moves_where_nothing_is_asked(precision):
    op = scalar_products(POINTS, 5)
    problem = draw_scalar_products("moderate", 0, POINTS, 5)
    problem.target_weight[:] = 0
    with precision.context():
        inputs = arrays(problem, precision)
        lifted = run(project_lifted, op, *inputs)
        compact = run(project_compact, op, *inputs)
        for left, right, output in (lifted, compact[:3]):
            np.testing.assert_array_equal(left, inputs[2])
            np.testing.assert_array_equal(right, inputs[3])
            change = problem.rounded(precision.dtype).output_change(*float64(inputs[2:4]))
            np.testing.assert_allclose(output, change, rtol=1e-4, atol=1e-5)
        assert compact.left_spread == compact.right_spread == 0


# Operations


def draw_dot_general(data):
    """Any pattern of batch, contracting and free axes, in any order of axes."""
    sizes = st.integers(1, 3)
    batch = data.draw(st.lists(sizes, max_size=2))
    contracting = data.draw(st.lists(sizes, max_size=2))
    operands = []
    for _ in range(2):
        free = data.draw(st.lists(sizes, max_size=2))
        lengths = [*batch, *contracting, *free]
        places = data.draw(st.permutations(range(len(lengths))))
        shape = [0] * len(lengths)
        for place, length in zip(places, lengths, strict=True):
            shape[place] = length
        split = len(batch)
        operands.append((shape, places[:split], places[split : split + len(contracting)]))
    (left, left_batch, left_contracting), (right, right_batch, right_contracting) = operands
    numbers = ((left_contracting, right_contracting), (left_batch, right_batch))
    return DotGeneral(numbers, tuple(left), tuple(right))


def draw_arrays(seed, *shapes):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape) for shape in shapes]  # NumPy: nothing compiles one by one


@functools.partial(jax.jit, static_argnums=0)
def parts_and_wanted(op, left, right, cotangent, copies):
    """What the methods of `op` give, each beside what it must be."""
    product = functools.partial(lax.dot_general, dimension_numbers=op.dimension_numbers)
    output, transpose = jax.vjp(product, left, right)
    to_left, to_right = transpose(cotangent)
    ones_left, ones_right = jnp.ones_like(left), jnp.ones_like(right)
    lifted_left, lifted_right = op.lift_left(left), op.lift_right(right)
    return (
        (op(left, right), output),
        (op.transpose_left(cotangent, right), to_left),
        (op.transpose_right(cotangent, left), to_right),
        (jnp.broadcast_to(op.left_energy(left), output.shape), product(left, ones_right)),
        (jnp.broadcast_to(op.right_energy(right), output.shape), product(ones_left, right)),
        (
            jnp.broadcast_to(op.left_sum(cotangent), left.shape),
            op.transpose_left(cotangent, ones_right),
        ),
        (
            jnp.broadcast_to(op.right_sum(cotangent), right.shape),
            op.transpose_right(cotangent, ones_left),
        ),
        # Copies: consistently ordered, adjoint to their sum, and as many as said.
        (jnp.sum(lifted_left * lifted_right, axis=-1), output),
        (jnp.sum(lifted_left * copies), jnp.sum(left * op.lower_left(copies))),
        (jnp.sum(lifted_right * copies), jnp.sum(right * op.lower_right(copies))),
        (op.lower_left(lifted_left), op.left_copies * left),
        (op.lower_right(lifted_right), op.right_copies * right),
    )


def check_parts(op, seed):
    copies = (*op.output_shape, op.slice_length)
    with enable_x64():
        values = draw_arrays(seed, op.left_shape, op.right_shape, op.output_shape, copies)
        for value, wanted in parts_and_wanted(op, *values):
            assert value.shape == wanted.shape
            np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-12)


@few_draws(12)
@given(data=st.data(), seed=seeds)
def test_dot_general_and_its_parts(data, seed):
    check_parts(draw_dot_general(data), seed)


# Contracted axes in one order, in crossed orders, and batch axes that come last or crossed.
PATTERNS = [
    DotGeneral((((1,), (0,)), ((), ())), (2, 3), (3, 4)),
    DotGeneral((((0, 2), (1, 2)), ((), ())), (2, 3, 4), (5, 2, 4)),
    DotGeneral((((1, 3), (2, 0)), ((2,), (1,))), (3, 3, 2, 2), (2, 2, 3, 4)),
    DotGeneral((((3, 1), (0, 3)), ((2, 0), (1, 2))), (2, 4, 3, 5), (5, 3, 2, 4, 6)),
]


@pytest.mark.parametrize("op", PATTERNS, ids=lambda op: str(op.dimension_numbers))
def test_dot_general_patterns(op):
    check_parts(op, 0)


def test_multiply_and_its_parts():
    op = Multiply((2, 3))
    left, right, cotangent = map(jnp.asarray, draw_arrays(0, (2, 3), (2, 3), (2, 3)))
    assert op.left_shape == op.right_shape == op.output_shape == (2, 3)
    assert op.slice_length == op.left_copies == op.right_copies == 1
    np.testing.assert_array_equal(op(left, right), left * right)
    np.testing.assert_array_equal(op.transpose_left(cotangent, right), cotangent * right)
    np.testing.assert_array_equal(op.transpose_right(cotangent, left), cotangent * left)
    np.testing.assert_array_equal(op.lower_left(op.lift_left(left)), left)
    np.testing.assert_array_equal(op.lower_right(op.lift_right(right)), right)
    np.testing.assert_array_equal(op.left_sum(cotangent), cotangent)
    np.testing.assert_array_equal(op.right_sum(cotangent), cotangent)


def test_operations_are_static_arguments():
    numbers = ([[1], [0]], [[], []])
    op = DotGeneral(numbers, (2, 3), (3, 4))
    assert hash(op) == hash(DotGeneral((((1,), (0,)), ((), ())), (2, 3), (3, 4)))
    assert op == DotGeneral((((1,), (0,)), ((), ())), (2, 3), (3, 4))
    assert op != DotGeneral((((1,), (0,)), ((), ())), (2, 3), (3, 5))


def test_contraction_over_nothing_is_refused():
    with pytest.raises(ValueError, match="contracts over an axis of length 0"):
        DotGeneral((((1,), (0,)), ((), ())), (2, 0), (0, 4))


# Compact consensus


def draw_projection(op, seed, weights):
    """Everything `project_compact` takes but the output; weights scalar or per output."""
    random = np.random.default_rng(seed)
    shapes = (op.left_shape, op.right_shape) * 2
    shape = () if weights == "scalar" else op.output_shape
    left_weight, right_weight, target_weight = (10 ** random.uniform(-1, 1, shape) for _ in "123")
    asked = random.integers(0, 3, op.output_shape) > 0
    target = 3 * random.normal(size=op.output_shape)
    return (
        *draw_arrays(seed, *shapes),
        left_weight,
        right_weight,
        target,
        target_weight * asked,
    )


@functools.partial(jax.jit, static_argnums=0)
def lift_both(op, left, right):
    return op.lift_left(left), op.lift_right(right)


def consensus(copies, weight, lift, lower):
    """The weighted mean of explicit copies and their spread."""
    weight = jnp.broadcast_to(jnp.asarray(weight)[..., None], copies.shape)
    mean = lower(weight * copies) / lower(weight)
    return mean, jnp.sum(weight * (copies - lift(mean)) ** 2)


@functools.partial(jax.jit, static_argnums=0)
def compact_and_lifted(op, *inputs):
    """The compact projection, the same from explicit copies, and these copies."""
    left_ref, right_ref, left_dev, right_dev, left_weight, right_weight, target, asked = inputs
    given = (left_weight, right_weight, target, asked, op(left_ref, right_ref))
    compact = project_compact(op, left_ref, right_ref, left_dev, right_dev, *given)
    copies = (op.lift_left(left_dev), op.lift_right(right_dev))
    lifted = project_lifted(op, left_ref, right_ref, *copies, *given)
    left, left_spread = consensus(lifted.left_copies, left_weight, op.lift_left, op.lower_left)
    right, right_spread = consensus(
        lifted.right_copies, right_weight, op.lift_right, op.lower_right
    )
    return compact, CompactProjection(left, right, lifted.output, left_spread, right_spread), lifted


@pytest.mark.parametrize("weights", ["scalar", "per output"])
@few_draws(3)
@given(data=st.data(), seed=seeds)
def test_compact_is_the_mean_of_the_lifted_copies(weights, data, seed):
    op = draw_dot_general(data)
    with enable_x64():
        compact, wanted, _ = compact_and_lifted(op, *draw_projection(op, seed, weights))
    for value, other in zip(compact, wanted, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["zero", "equal", "opposite"])
def test_compact_set_valued_picks_are_those_of_the_copies(kind):
    op = DotGeneral((((1,), (0,)), ((), ())), (4, 6), (6, 3))
    scale = {"zero": 0.0, "equal": 1.0, "opposite": -1.0}[kind]
    left = np.random.default_rng(0).normal(size=6) * abs(scale) * np.ones((4, 1))
    right = scale * left[:3].T / 2  # with weights 1 and 4, √ρx x = ±√ρw w
    target = np.linspace(-50.0, 50.0, 12).reshape(4, 3)
    nothing = (np.zeros_like(left), np.zeros_like(right))
    with enable_x64():
        compact, wanted, lifted = compact_and_lifted(
            op, left, right, *nothing, 1.0, 4.0, target, 2.0
        )
        for value, other in zip(compact, wanted, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-6, atol=1e-6)
        # The picks do move, even from zero, and they are feasible.
        assert np.all(np.any(lifted.left_copies != 0, axis=-1))
        lifted_left, lifted_right = lift_both(op, left, right)
        x, w = lifted_left + lifted.left_copies, lifted_right + lifted.right_copies
        wanted = left @ right + lifted.output
        np.testing.assert_allclose(np.sum(np.asarray(x * w), axis=-1), wanted, rtol=1e-9, atol=1e-9)


def test_deviations_of_nothing_keep_a_forward_pass():
    # From a forward pass with the target at the output nothing moves, not even by rounding.
    op = DotGeneral((((1,), (0,)), ((), ())), (4, 6), (6, 3))
    left, right, target = draw_arrays(0, (4, 6), (6, 3), (4, 3))
    nothing = (np.zeros_like(left), np.zeros_like(right))
    with enable_x64():
        compact, _, lifted = compact_and_lifted(
            op, left, right, *nothing, 1.0, 4.0, np.zeros_like(target), 2.0
        )
        assert all(np.all(np.asarray(value) == 0) for value in (*compact, *lifted))


def test_vmap_agrees():
    op = DotGeneral((((1,), (0,)), ((), ())), (4, 6), (6, 3))
    problems = [draw_projection(op, seed, "per output") for seed in range(3)]
    batch = [np.stack(values) for values in zip(*problems, strict=True)]
    with enable_x64():
        batched = jax.jit(jax.vmap(functools.partial(run, project_compact, op)))(*batch)
        for i, problem in enumerate(problems):
            for value, wanted in zip(run(project_compact, op, *problem), batched, strict=True):
                np.testing.assert_allclose(value, wanted[i], rtol=1e-11, atol=1e-11)


def test_no_entry_without_copies_moves():
    # A contraction with an operand that has an axis of length zero: no output reads the other.
    op = DotGeneral((((1,), (0,)), ((), ())), (4, 6), (6, 0))
    left_dev = jnp.ones((4, 6))
    empty = jnp.zeros((6, 0))
    for weight in (1.0, jnp.ones((4, 0))):
        result = run(
            project_compact,
            op,
            jnp.ones((4, 6)),
            empty,
            left_dev,
            empty,
            weight,
            weight,
            jnp.zeros((4, 0)),
            1.0,
        )
        np.testing.assert_array_equal(result.left, left_dev)
        assert result.left_spread == 0


# One operand pinned


def brute_force_pinned(slices, free_copies, weight, target, target_weight):
    """Every copy's least-squares problem solved on its own, in NumPy."""
    weight = np.broadcast_to(weight, target.shape)
    copies, outputs = np.array(free_copies), np.zeros(target.shape)
    for index in np.ndindex(*target.shape):
        own, asked = math.sqrt(weight[index]), math.sqrt(target_weight[index])
        rows = np.vstack([own * np.eye(slices.shape[-1]), asked * slices[index]])
        wanted = np.append(own * copies[index], asked * target[index])
        copies[index] = np.linalg.lstsq(rows, wanted)[0]
        outputs[index] = slices[index] @ copies[index]
    return copies, outputs


def pinned_problem(op, side, seed, weights):
    """The pinned and the free operand, both as copies too, and weight, target, target weight."""
    left, right, left_dev, right_dev, weight, _, *asked = draw_projection(op, seed, weights)
    with enable_x64():
        left_slices, right_slices = map(np.asarray, lift_both(op, left, right))
        left_copies, right_copies = map(np.asarray, lift_both(op, left_dev, right_dev))
    if side == "left":
        return left, right_dev, left_slices, right_copies, weight, *asked
    return right, left_dev, right_slices, left_copies, weight, *asked


sides = pytest.mark.parametrize("side", ["left", "right"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def pinned_compact(op, side, *inputs):
    return project_pinned_compact(op, side, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def copies_consensus(op, side, copies, weight):
    """The consensus of the free operand, `side` being pinned, and its copies again."""
    lift, lower = (
        (op.lift_right, op.lower_right) if side == "left" else (op.lift_left, op.lower_left)
    )
    mean, spread = consensus(copies, weight, lift, lower)
    return mean, spread, lift(mean)


@sides
@pytest.mark.parametrize("weights", ["scalar", "per output"])
@few_draws(3)
@given(data=st.data(), seed=seeds)
def test_pinned_compact_is_the_mean_of_nearest_copies(side, weights, data, seed):
    op = draw_dot_general(data)
    pinned, free, slices, free_copies, weight, target, target_weight = pinned_problem(
        op, side, seed, weights
    )
    copies, output = brute_force_pinned(slices, free_copies, weight, target, target_weight)
    with enable_x64():
        result = pinned_compact(op, side, pinned, free, weight, target, target_weight)
        mean, spread, _ = copies_consensus(op, side, copies, weight)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(result.free, mean)
    close(result.output, output)
    close(result.spread, spread)


@functools.partial(jax.jit, static_argnums=(0, 1))
def structured_step(op, side, pinned, common, multiplier, weight, target, target_weight):
    """Project and reflect `common + X·multiplier`, and take the consensus of the reflection."""
    projected = project_pinned_structured(
        op, side, pinned, common, multiplier, weight, target, target_weight
    )
    reflected = (2 * projected.common - common, 2 * projected.multiplier - multiplier)
    mean = structured_mean(op, side, pinned, *reflected, weight)
    squared = structured_squared_norm(op, side, pinned, *reflected, weight)
    return projected, mean, squared


@sides
@pytest.mark.parametrize("weights", ["scalar", "per output"])
def test_structured_copies_follow_the_lifted_ones(side, weights):
    # Douglas-Rachford by hand, on all copies and in structured form.
    op = PATTERNS[2]
    pinned, common, slices, copies, weight, target, target_weight = pinned_problem(
        op, side, 5, weights
    )
    multiplier = np.zeros(op.output_shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    with enable_x64():
        for _ in range(6):
            projected, mean, squared = structured_step(
                op, side, pinned, common, multiplier, weight, target, target_weight
            )
            nearest, output = brute_force_pinned(slices, copies, weight, target, target_weight)
            close(projected.output, output)
            reflected = 2 * nearest - copies
            wanted, _, lifted_mean = copies_consensus(op, side, reflected, weight)
            close(mean, wanted)
            close(squared, np.sum(np.broadcast_to(weight, target.shape)[..., None] * reflected**2))

            copies = copies + np.asarray(lifted_mean) - nearest
            common = np.asarray(common + mean - projected.common)
            multiplier = np.asarray(multiplier - projected.multiplier)
            pair = (pinned, common) if side == "left" else (common, pinned)
            lifted_common = lift_both(op, *pair)[side == "left"]
            close(lifted_common + slices * multiplier[..., None], copies)
    assert np.max(np.abs(multiplier)) > 1e-2


@sides
def test_pinned_operand_is_the_limit_of_a_stiff_one(side):
    with enable_x64():
        op = DotGeneral((((1,), (0,)), ((), ())), (5, 4), (4, 3))
        left, right, left_dev, right_dev, _, _, target, _ = draw_projection(op, 3, "scalar")
        stiff = 1e12
        if side == "left":
            left_dev, weights = jnp.zeros_like(left), (stiff, 1.0)
            pinned = pinned_compact(op, side, left, right_dev, 1.0, target, 2.0)
        else:
            right_dev, weights = jnp.zeros_like(right), (1.0, stiff)
            pinned = pinned_compact(op, side, right, left_dev, 1.0, target, 2.0)
        both = run(project_compact, op, left, right, left_dev, right_dev, *weights, target, 2.0)
        free, spread = (
            (both.right, both.right_spread) if side == "left" else (both.left, both.left_spread)
        )
        np.testing.assert_allclose(pinned.free, free, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(pinned.output, both.output, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(pinned.spread, spread, rtol=1e-4)


def check_pinned(side, values, precision):
    """Scalar products with a pinned slice: feasible, nearest, and a second projection stays."""
    op = scalar_products(*np.shape(values[0]))
    with precision.context():
        pinned, free, weight, target, asked = (jnp.asarray(v, precision.dtype) for v in values)
        projected = pinned_compact(op, side, pinned, free, weight, target, asked)
        second = pinned_compact(op, side, pinned, projected.free, weight, projected.output, asked)
        assert projected.free.dtype == projected.output.dtype == precision.dtype
        values = float64((pinned, free, weight, target, asked))
        moved, output, again = float64((projected.free, projected.output, second.free))
    pinned, free, weight, target, asked = values
    assert all(np.isfinite(value).all() for value in (moved, output, again))

    def objective(copies):
        missed = np.sum(pinned * copies, axis=-1) - target
        return weight * np.sum((copies - free) ** 2, axis=-1) + asked * missed**2

    # The least objective is that of a scalar problem along the pinned slice.
    missed = np.sum(pinned * free, axis=-1) - target
    with np.errstate(divide="ignore"):
        least = missed**2 / (np.sum(pinned**2, axis=-1) / weight + 1 / asked)
    eps, tiny = precision.eps, float(np.finfo(np.float32).tiny)
    terms = np.sum(np.abs(pinned) * (np.abs(moved) + np.abs(free)), axis=-1) + np.abs(target)
    rounding = weight * np.sum(free**2 + moved**2, axis=-1) + asked * terms**2
    miss = output - np.sum(pinned * moved, axis=-1)
    assert_small(miss, 8 * eps * terms + tiny)
    assert_no_farther(objective(moved), least, 16 * eps**2 * rounding + tiny**2, precision.relative)
    # The second time the target is met to rounding, so that it asks for no more than the miss.
    again_moved = weight * np.sum((again - moved) ** 2, axis=-1)
    assert_small(again_moved, 2 * asked * miss**2 + 256 * eps**2 * rounding + tiny**2)


@sides
@precisions
@few_draws(2)
@given(seed=seeds)
def test_pinned_projection_is_nearest_and_idempotent(precision, side, seed):
    for regime in REGIMES:
        problem = draw_scalar_products(regime, seed, POINTS, 5)
        # The pinned operand is its own reference: the target is relative to it.
        target = problem.target_dev - np.sum(problem.left_dev * problem.right_ref, axis=-1)
        weights = (problem.right_weight, target, problem.target_weight)
        check_pinned(side, (problem.left, problem.right_dev, *weights), precision)
    for regime in oracles.REGIMES:  # ties, equal and opposite values, and others
        drawn = oracles.draw(regime, seed, (2, POINTS, 5), (POINTS,))
        weights = (drawn.weight[0, :, 0], drawn.target, drawn.target_weight)
        check_pinned(side, (drawn.reference[0], drawn.deviation[1], *weights), precision)


@sides
@few_draws(2)
@given(seed=seeds)
def test_pinned_projection_in_float32(side, seed):
    # 10,000 outputs over twelve decades.
    random = np.random.default_rng(seed)
    pinned, free = random.normal(size=(2, 10_000, 3))
    pinned *= 10 ** random.uniform(-6, 6, (10_000, 1))
    free *= 10 ** random.uniform(-12, 6, (10_000, 1))
    target = random.normal(size=10_000) * 10 ** random.uniform(-12, 6, 10_000)
    weight, target_weight = 10 ** random.uniform(-6, 6, (2, 10_000))
    target_weight[::5] = 0
    pinned[::7] = 0
    check_pinned(side, (pinned, free, weight, target, target_weight), FLOAT32)


# Memory


def test_temporaries_are_of_the_size_of_the_operands():
    op = DotGeneral((((1,), (0,)), ((), ())), (256, 128), (128, 64))
    x, w, y = (jnp.ones(shape) for shape in (op.left_shape, op.right_shape, op.output_shape))
    operands = x.nbytes + w.nbytes + y.nbytes
    copies = y.nbytes * op.slice_length  # 8 MB: of one operand, once

    def temporaries(project, *arguments):
        compiled = jax.jit(project, static_argnums=0).lower(op, *arguments).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    compact = temporaries(project_compact, x, w, x, w, 1.0, 1.0, y, 1.0, y)
    assert compact <= 8 * operands < copies / 2
    pinned = temporaries(
        lambda op, *arguments: project_pinned_compact(op, "left", *arguments), x, w, 1.0, y, 1.0
    )
    assert pinned <= 2 * operands
    # Next to its inputs and outputs the lifted form needs no third array of copies.
    lifted = op.lift_left(x)
    assert temporaries(project_lifted, x, w, lifted, lifted, 1.0, 1.0, y, 1.0, y) <= copies / 2
