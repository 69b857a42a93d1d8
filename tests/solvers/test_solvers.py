"""Solvers on sets whose projections are known: their formulas, their limits, their verdicts."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import solvers
from pjax.solvers import Verdict


class Sets:
    """A problem whose state is one vector and whose groups are given projections."""

    def __init__(self, *projections, start):
        self.projections = projections
        self.num_groups = len(projections)
        self.start = jnp.asarray(start, jnp.float64)
        self.loss = jnp.zeros(())

    def require(self, grouping, reflecting):
        pass

    def initial(self):
        # The solvers' states are deviations; the sets are given relative to the start.
        return (jnp.zeros_like(self.start),)

    def project(self, group, state):
        return (self.projections[group](state[0] + self.start) - self.start,)

    def difference(self, a, b):
        return (a[0] - b[0],)

    def distance(self, a, b):
        return jnp.linalg.norm(a[0] - b[0])

    def point(self, state):
        return np.asarray(state[0] + self.start)


def line(point, direction):
    point = jnp.asarray(point, jnp.float64)
    unit = jnp.asarray(direction, jnp.float64) / np.linalg.norm(direction)
    return lambda z: point + unit * jnp.dot(unit, z - point)


def circle(radius):
    return lambda z: radius * z / jnp.linalg.norm(z)


TWO_SETS = [
    solvers.AlternatingProjections,
    solvers.DouglasRachford,
    solvers.DifferenceMap,
    solvers.CyclicProjections,
    solvers.CyclicDouglasRachford,
]


@pytest.mark.parametrize("solver", TWO_SETS)
def test_finds_where_two_lines_meet(x64, solver):
    problem = Sets(line([1, 2], [1, 0.3]), line([1, 2], [-0.4, 1]), start=[5.0, -3.0])
    state, history = solver(steps=200).solve(problem)
    np.testing.assert_allclose(problem.point(state), [1, 2], atol=1e-6)
    assert history.verdict == Verdict.CONVERGING
    assert float(history) < 1e-6
    assert history.distances.shape == (200, 2)
    assert history.step_size.shape == (200,)


def test_alternating_reflections_go_round_and_average_to_douglas_rachford(x64):
    problem = Sets(line([1, 2], [1, 0.3]), line([1, 2], [-0.4, 1]), start=[5.0, -3.0])
    half, _ = solvers.AlternatingReflections(steps=7, relaxation=0.5).solve(problem)
    same, _ = solvers.DouglasRachford(steps=7).solve(problem)
    np.testing.assert_allclose(half[0], same[0], atol=1e-12)
    # Reflections are isometries: the state keeps its distance from where the lines meet.
    z = (jnp.zeros(2),)
    for _ in range(3):
        z = solvers.AlternatingReflections().step(problem, z).state
        np.testing.assert_allclose(np.linalg.norm(problem.point(z) - [1, 2]), np.hypot(4, 5))


def test_formulas_of_one_step(x64):
    a, b, z0 = line([0, 1], [1, 0]), circle(2.0), np.array([3.0, 0.5])
    problem = Sets(a, b, start=z0)
    zero = problem.initial()

    def after(solver):
        return problem.point(solver.step(problem, zero).state)

    def pa(z):
        return np.asarray(a(jnp.asarray(z)))

    def pb(z):
        return np.asarray(b(jnp.asarray(z)))

    np.testing.assert_allclose(after(solvers.AlternatingProjections()), pb(pa(z0)))
    swapped = solvers.AlternatingProjections(change_projection_order=True)
    np.testing.assert_allclose(after(swapped), pa(pb(z0)))
    dr = z0 + 0.7 * (pb(2 * pa(z0) - z0) - pa(z0))
    np.testing.assert_allclose(after(solvers.DouglasRachford(relaxation=0.7)), dr)
    swapped = solvers.DouglasRachford(change_projection_order=True)
    np.testing.assert_allclose(after(swapped), z0 + pa(2 * pb(z0) - z0) - pb(z0))
    for beta in (0.8, -0.6, 1.0):
        f_a = pa(z0) - (pa(z0) - z0) / beta
        f_b = pb(z0) + (pb(z0) - z0) / beta
        expected = z0 + beta * (pa(f_b) - pb(f_a))
        np.testing.assert_allclose(after(solvers.DifferenceMap(beta=beta)), expected)
    ar = 2 * pb(2 * pa(z0) - z0) - (2 * pa(z0) - z0)
    np.testing.assert_allclose(after(solvers.AlternatingReflections()), ar)
    np.testing.assert_allclose(after(solvers.CyclicProjections()), pb(pa(z0)))
    t12 = z0 + pb(2 * pa(z0) - z0) - pa(z0)
    t21 = t12 + pa(2 * pb(t12) - t12) - pb(t12)
    np.testing.assert_allclose(after(solvers.CyclicDouglasRachford()), t21)


@dataclass(frozen=True)
class Dykstra(solvers.Solver):
    """Alternating projections with a correction for each set: of convex sets, to the point of both
    that is nearest to the start (Boyle and Dykstra, 1986). It carries the corrections.
    """

    def start(self, problem, state):
        return state, state, state

    def step(self, problem, state):
        z, *corrections = state
        points, distances = [z], []
        for group, correction in enumerate(corrections):
            before = solvers.affine((1.0, points[-1]), (1.0, correction))
            points.append(problem.project(group, before))
            distances.append(problem.distance(points[-1], before))
            corrections[group] = solvers.affine((1.0, before), (-1.0, points[-1]))
        return solvers.Step(
            (points[-1], *corrections),
            lambda: tuple(distances),
            points[-2],
            points[-1],
            residual=lambda: problem.distance(points[-1], points[-2]),
            size=lambda: problem.distance(points[-1], z),
        )

    def solution(self, problem, state):
        return state[0]


def half_plane(normal):
    unit = jnp.asarray(normal, jnp.float64) / np.linalg.norm(normal)
    return lambda z: z - unit * jnp.maximum(jnp.dot(unit, z), 0)


def test_a_solver_may_carry_more_than_a_point(x64):
    problem = Sets(half_plane([1, 0]), half_plane([1, 1]), start=[3.0, 1.0])
    state, history = Dykstra(steps=60).solve(problem)
    # Nearest to (3, 1) is the corner; projections in turn end elsewhere on the border.
    np.testing.assert_allclose(problem.point(state), [0, 0], atol=1e-6)
    np.testing.assert_allclose(Dykstra(steps=60).run(problem)[0], state[0])
    assert history.verdict == Verdict.CONVERGING
    assert history.step_size.shape == (60,)
    other, _ = solvers.AlternatingProjections(steps=60).solve(problem)
    assert np.linalg.norm(problem.point(other)) > 0.1


def test_a_solver_that_carries_more_solves_and_profiles_networks():
    x = jax.random.normal(jax.random.key(0), (8, 3))
    params = {"w": jnp.full((3, 2), 0.1)}

    def loss(p):
        return pjax.squared_error(x @ p["w"], jnp.ones((8, 2))).mean()

    solver = Dykstra(steps=20)
    found, _ = pjax.optim.Optimizer(solver).update(loss, params)
    assert loss(found) < 0.9 * loss(params)
    problem = pjax.feasibility_problem(loss, params, grouping="colours", reflecting=True)
    assert np.isfinite(pjax.profile(problem, solver).residual).all()


def test_history_holds_distances_and_steps(x64):
    problem = Sets(line([0, 1], [1, 0]), circle(2.0), start=[3.0, 0.5])
    _, history = solvers.AlternatingProjections(steps=2).solve(problem)
    z = jnp.array([3.0, 0.5])
    for row in range(2):
        a = problem.projections[0](z)
        b = problem.projections[1](a)
        expected = [jnp.linalg.norm(a - z), jnp.linalg.norm(b - a)]
        np.testing.assert_allclose(history.distances[row], expected)
        np.testing.assert_allclose(history.step_size[row], jnp.linalg.norm(b - z))
        np.testing.assert_allclose(history.gap[row], jnp.linalg.norm(b - a))
        z = b
    np.testing.assert_allclose(history.residual, np.hypot(*history.distances.T))
    np.testing.assert_allclose(history.total, history.residual)
    np.testing.assert_allclose(float(history), history.residual[-1])
    assert f"{history:.2f}" == f"{float(history):.2f}"


@pytest.mark.parametrize("swapped", [False, True])
def test_reflecting_methods_give_the_distance_to_each_side(x64, swapped):
    sets = (line([0, 1], [1, 0]), circle(2.0))
    z = jnp.array([3.0, 0.5])
    a, b = sets[::-1] if swapped else sets
    length = np.linalg.norm

    def one_step(solver, **options):
        problem = Sets(*sets, start=z)
        _, history = solver(steps=1, change_projection_order=swapped, **options).solve(problem)
        np.testing.assert_allclose(history.total, length(history.distances, axis=-1))
        np.testing.assert_allclose(float(history), history.residual[-1])
        return history

    reflected = 2 * a(z) - z
    moves = [length(a(z) - z), length(b(reflected) - reflected)]
    for solver in (solvers.DouglasRachford, solvers.AlternatingReflections):
        history = one_step(solver, relaxation=0.6)
        np.testing.assert_allclose(history.distances[0], moves)
        np.testing.assert_allclose(history.residual[0], length(b(reflected) - a(z)))
        np.testing.assert_allclose(history.gap, history.residual)
    history = one_step(solvers.DifferenceMap, beta=0.8)
    np.testing.assert_allclose(history.distances[0], [length(a(z) - z), length(b(z) - z)])
    np.testing.assert_allclose(history.gap, history.residual)
    # Around the cycle: A to B, then B to A.
    between = z + b(reflected) - a(z)
    back = 2 * b(between) - between
    gaps = [length(b(reflected) - a(z)), length(a(back) - b(between))]
    history = one_step(solvers.CyclicDouglasRachford)
    np.testing.assert_allclose(history.distances[0], [moves[0], length(b(between) - between)])
    np.testing.assert_allclose(history.residual[0], length(gaps))
    np.testing.assert_allclose(history.gap[0], gaps[0])


@pytest.mark.parametrize(
    ("solver", "height"),
    [
        (solvers.DouglasRachford(steps=40), -4.0),
        (solvers.AlternatingReflections(steps=40, relaxation=0.6), -4.0),
        (solvers.DifferenceMap(steps=40), 4.0),
    ],
)
def test_a_state_that_stays_off_the_sets_converges(x64, solver, height):
    """Boxes that touch along an edge: the state comes to rest away from them."""
    above = jnp.array([[1.0, jnp.inf], [0.0, jnp.inf]])
    below = jnp.array([[0.0, 2.0], [-jnp.inf, 0.0]])
    boxes = (lambda z: jnp.clip(z, *above.T), lambda z: jnp.clip(z, *below.T))
    problem = Sets(*boxes, start=[5.0, height])
    state, history = solver.solve(problem)
    x, y = problem.point(state)
    assert 1 <= x <= 2
    assert abs(y) < 1e-12
    assert history.residual[0] >= 1
    assert history.residual[-1] < 1e-12
    assert history.total[-1] > 3.9
    assert history.verdict == Verdict.CONVERGING


@pytest.mark.parametrize("solver", TWO_SETS)
def test_parallel_lines_are_infeasible(x64, solver):
    problem = Sets(line([0, 0], [1, 0]), line([0, 1], [1, 0]), start=[2.0, 5.0])
    _, history = solver(steps=40).solve(problem)
    assert history.verdict == Verdict.INFEASIBLE
    np.testing.assert_allclose(history.gap[-1], 1.0)


def test_verdicts_of_trouble(x64):
    blow_up = Sets(lambda z: 2 * z, lambda z: -1.5 * z, start=[1.0, 0.0])
    _, history = solvers.AlternatingProjections(steps=20).solve(blow_up)
    assert history.verdict == Verdict.DIVERGED
    nan = Sets(lambda z: z * jnp.nan, lambda z: z, start=[1.0, 0.0])
    _, history = solvers.AlternatingProjections(steps=5).solve(nan)
    assert history.verdict == Verdict.NON_FINITE
    rotate = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    turning = Sets(lambda z: rotate @ z, lambda z: z, start=[1.0, 0.0])
    _, history = solvers.AlternatingProjections(steps=20).solve(turning)
    assert history.verdict == Verdict.STALLED
    assert str(Verdict.NON_FINITE) == "non-finite"


def test_an_infeasible_network_says_so(x64):
    """Two labels for one prediction, both demanded outright: no parameters satisfy them."""
    targets = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    x = jnp.ones((2, 3))
    metric = pjax.metrics.Uniform(prox_step=1e6)

    def verdict(targets, steps=300):
        optimizer = pjax.optim.AlternatingProjections(steps, metric=metric)
        params = {"w": jnp.full((3, 2), 0.1)}
        _, residual = optimizer.update(
            lambda p: pjax.squared_error(jnp.dot(x, p["w"]), targets), params
        )
        return residual.verdict

    assert verdict(targets) == Verdict.INFEASIBLE
    assert verdict(jnp.ones((2, 2))) == Verdict.CONVERGING


@pytest.mark.parametrize("solver", [solvers.DouglasRachford, solvers.DifferenceMap])
def test_reflecting_residuals_vanish_at_an_optimum(x64, solver):
    """Logistic regression: the fixed point is the optimum, and the state itself is not feasible
    there.
    """
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(30, 3)))
    y = jax.nn.one_hot(rng.integers(0, 2, 30), 2, dtype=jnp.float64)
    optimizer = pjax.optim.Optimizer(solver(steps=1500), fanout="exact")
    found, residual = optimizer.update(
        lambda w: pjax.cross_entropy(x @ w, y), jnp.array(rng.normal(size=(3, 2)))
    )
    gradient = jax.jit(jax.grad(lambda w: jnp.mean(pjax.cross_entropy(x @ w, y))))(found)
    assert float(jnp.max(jnp.abs(gradient))) < 1e-8
    assert float(residual) < 1e-6 * float(residual.residual[0])
    # The loss keeps pulling: the state stays where its projections move it, by the same amount.
    assert np.all(residual.distances[-1] > 1e3 * float(residual))
    assert residual.verdict == Verdict.CONVERGING


def test_a_problem_for_another_solver_is_refused(x64):
    x, y = jnp.ones((4, 3)), jnp.ones((4, 2)) / 2
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 2))}

    def fn(p):
        return pjax.cross_entropy(jax.nn.relu(x @ p["a"]) @ p["b"], y)

    compact = pjax.feasibility_problem(fn, params)
    with pytest.raises(ValueError, match="reflecting=True"):
        solvers.DouglasRachford(2).solve(compact)
    with pytest.raises(ValueError, match='grouping="levels"'):
        solvers.CyclicProjections(2).solve(compact)
    levels = pjax.feasibility_problem(fn, params, grouping="levels", reflecting=True)
    with pytest.raises(ValueError, match='grouping="colours"'):
        solvers.DouglasRachford(2).solve(levels)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.AlternatingProjections(steps=2.5), "`steps` must be a whole"),  # pyright: ignore
        (
            lambda: solvers.AlternatingProjections(steps=0),
            "`steps` must be a whole number",
        ),
        (lambda: solvers.DouglasRachford(relaxation=2.5), "`relaxation` must be between 0 and 2"),
        (lambda: solvers.CyclicDouglasRachford(relaxation=0.0), "`relaxation` must be"),
        (lambda: solvers.DifferenceMap(beta=0.0), "`beta` must not be 0"),
        (lambda: solvers.AlternatingReflections(relaxation=1.5), "`relaxation` must be in"),
        (lambda: pjax.metrics.Uniform(weight=-1.0), "`weight` must be positive"),
        (lambda: pjax.metrics.Uniform(prox_step=float("nan")), "`prox_step` must be positive"),
        (lambda: pjax.metrics.Uniform(row_weights="x"), "`row_weights` must be"),  # pyright: ignore
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_verdict_code_works_inside_jit(x64):
    problem = Sets(line([0, 0], [1, 0]), line([0, 1], [1, 0]), start=[2.0, 5.0])
    solver = solvers.AlternatingProjections(steps=40)
    code = jax.jit(lambda: solver.solve(problem)[1].verdict_code)()
    assert int(code) == Verdict.INFEASIBLE


@pytest.mark.parametrize("steps", [100, 1000])
def test_slow_progress_is_not_called_infeasible(x64, steps):
    """Both rows are satisfied at w = (2000, 0), a thousandth of a step at a time."""
    x, y = jnp.array([[1e-3, 1.0], [1e-3, -1.0]]), jnp.ones((2, 1))
    solver = solvers.AlternatingProjections(steps=steps)
    problem = pjax.feasibility_problem(
        lambda p: jnp.sum(pjax.margin_loss(x @ p["w"], y, 1.0)),
        {"w": jnp.array([[0.1], [0.2]])},
        metric=pjax.metrics.Uniform(prox_step=1e6),
        grouping=solver.grouping,
    )
    assert solver.solve(problem)[1].verdict == Verdict.CONVERGING


@pytest.mark.parametrize("solver", [solvers.DouglasRachford, solvers.DifferenceMap])
def test_rounding_does_not_hide_that_a_state_drifts(solver):
    """In float32 a gap vector is rounded by more than it changes, where the state drifts."""
    x, y = jnp.array([[1.0, 0.5], [1.0, 0.5]]), jnp.array([[1.0], [0.0]])
    found = solver(steps=1000)
    problem = pjax.feasibility_problem(
        lambda p: jnp.sum(pjax.margin_loss(x @ p["w"], y, 1.0)),
        {"w": jnp.array([[0.1], [0.2]])},
        metric=pjax.metrics.Uniform(prox_step=1e6),
        reflecting=True,
    )
    assert found.solve(problem)[1].verdict in (Verdict.CONVERGING, Verdict.INFEASIBLE)
