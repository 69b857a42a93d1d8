"""Every operation with a rule, in one graph: the nodes against the program they were made from."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.graph import UnusedParameterWarning, bipartite, build_graph
from pjax.problem import Formulation, Layout, Problem, layout
from pjax.program import TraceError, read
from pjax.projections import linear
from pjax.rules import Affine, Dense, Lifted
from pjax.rules.piecewise_constant import Quantizer
from pjax.rules.products import NeuronBilinear, PinnedBilinear
from pjax.trace import trace
from tests.conftest import enable_x64

RNG = np.random.default_rng(1)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


PARAMS: dict[str, Any] = {
    "x": draw(3, 4), "y": draw(3, 4), "z": draw(3, 4), "b": draw(4), "w": draw(4, 3),
    "s": draw(), "t": draw(2, 3, 4), "u": draw(2, 4, 3),
}  # fmt: skip
DATA = {"c": draw(3, 4), "m": draw(3, 4) > 0, "s": np.array(0.7), "t": draw(2, 3, 4)}


# --- The zoo: `operation(params, data)`, with the node names that it must become ------------------

ZOO: dict[str, tuple[Any, tuple[str, ...]]] = {
    # Sums and scalings.
    "add": (lambda p, d: p["x"] + p["y"], ("add",)),
    "add three": (lambda p, d: p["x"] + p["y"] - 2 * p["z"], ("sub",)),
    "add data": (lambda p, d: p["x"] + d["c"], ("add",)),
    "add broadcast": (lambda p, d: p["x"] + p["b"], ("add",)),
    "add scalar": (lambda p, d: p["x"] + p["s"], ("add",)),
    "add itself": (lambda p, d: p["x"] + p["y"] + p["x"], ("add",)),
    "add integers of data": (lambda p, d: p["x"] + jnp.arange(4), ("add",)),
    "sub": (lambda p, d: p["x"] - p["y"], ("sub",)),
    "sub from data": (lambda p, d: d["c"] - p["x"], ("sub",)),
    "sub from number": (lambda p, d: 2.0 - p["x"], ("sub",)),
    "neg": (lambda p, d: -p["x"], ("neg",)),
    "copy": (lambda p, d: jnp.array(p["x"], copy=True), ()),
    "mul number": (lambda p, d: 3 * p["x"], ("mul",)),
    "mul zero": (lambda p, d: 0 * p["x"], ("mul",)),
    "mul zero in a sum": (lambda p, d: 0 * p["x"] + p["y"], ("add",)),
    "mul data": (lambda p, d: d["c"] * p["x"], ("mul",)),
    "mul data twice": (lambda p, d: d["c"] * p["x"] * d["m"], ("mul",)),
    "mul scalar of data": (lambda p, d: d["s"] * p["x"], ("mul",)),
    "mul": (lambda p, d: p["x"] * p["y"], ("mul",)),
    "mul broadcast": (lambda p, d: p["x"] * p["b"], ("mul",)),
    "mul itself": (lambda p, d: p["x"] * p["x"], ("mul",)),
    "div data": (lambda p, d: p["x"] / d["c"], ("div",)),
    "div number": (lambda p, d: p["x"] / 3, ("div",)),
    "stop gradient": (lambda p, d: p["x"] / jax.lax.stop_gradient(p["y"]), ("div",)),
    "straight through": (
        lambda p, d: p["x"] + jax.lax.stop_gradient(jnp.tanh(p["x"]) - p["x"]),
        ("add",),
    ),
    # Reductions.
    "sum": (lambda p, d: p["x"].sum()[None], ("reduce_sum",)),
    "sum axis": (lambda p, d: p["t"].sum(1), ("reduce_sum",)),
    "sum axes": (lambda p, d: p["t"].sum((0, 2)), ("reduce_sum",)),
    "sum kept": (lambda p, d: p["t"].sum((0, 2), keepdims=True), ("reduce_sum",)),
    "sum of sums": (lambda p, d: p["t"].sum(0).sum(0), ("reduce_sum", "reduce_sum")),
    "mean": (lambda p, d: p["x"].mean(1), ("div",)),
    "mean kept": (
        lambda p, d: p["x"] - p["x"].mean(1, keepdims=True),
        ("reduce_sum", "div", "sub"),
    ),
    "weighted mean": (
        lambda p, d: (d["c"] * p["x"]).sum(0) / d["c"].sum(0) * 2 + p["b"],
        ("add",),
    ),
    "masked mean": (lambda p, d: p["x"].mean(1, where=d["m"]), ("div",)),
    "relu of a mean": (
        lambda p, d: jax.nn.relu((p["t"] * d["t"]).mean(0) - p["x"]),
        ("sum_relu",),
    ),
    # Piecewise linear functions.
    "relu": (lambda p, d: jax.nn.relu(p["x"]), ("relu",)),
    "relu of a sum": (lambda p, d: jax.nn.relu(p["x"] + p["y"] - d["c"]), ("sum_relu",)),
    "relu of a dense layer": (
        lambda p, d: jax.nn.relu(d["c"] @ p["w"] + p["s"]),
        ("dot", "sum_relu"),
    ),
    "residual relu": (lambda p, d: p["x"] + jax.nn.relu(p["x"]), ("add",)),
    "leaky relu": (lambda p, d: jax.nn.leaky_relu(p["x"] - p["y"], 0.1), ("sum_select_n",)),
    "relu6": (lambda p, d: jax.nn.relu6(9 * p["x"]), ("min",)),
    "hard tanh": (lambda p, d: jax.nn.hard_tanh(p["x"]), ("select_n",)),
    "hard sigmoid": (lambda p, d: jax.nn.hard_sigmoid(3 * p["x"]), ("div",)),
    "hard swish": (lambda p, d: p["x"] * jax.nn.relu6(p["x"]), ("mul",)),
    "abs": (lambda p, d: jnp.abs(p["x"] * 2 + d["c"]), ("abs",)),
    "abs of scaled data": (lambda p, d: jnp.abs(p["x"] * d["c"] - p["y"]), ("sum_abs",)),
    "clip": (lambda p, d: jnp.clip(p["x"], -0.5, 0.4), ("min",)),
    "clip by data": (lambda p, d: jnp.clip(p["x"], -d["s"], d["c"] + 1), ("max", "min")),
    "clamp by data": (lambda p, d: jax.lax.clamp(-d["s"], p["x"], d["s"]), ("max", "min")),
    "clamp by parameters": (lambda p, d: jax.lax.clamp(-1.0, p["x"], p["y"]), ("max", "min")),
    "clip without bounds": (lambda p, d: jnp.clip(p["x"], -jnp.inf, 0.5), ("min",)),
    "max with data": (lambda p, d: jnp.maximum(p["x"] + p["y"], d["c"]), ("sum_max",)),
    "min with data": (lambda p, d: jnp.minimum(d["c"], p["x"]), ("min",)),
    "max with the mean of data": (lambda p, d: jnp.maximum(p["x"], d["c"].mean()), ("max",)),
    "sign": (lambda p, d: jnp.sign(p["x"] + p["y"]), ("sum_sign",)),
    "sign of a relu": (lambda p, d: jnp.sign(jax.nn.relu(p["x"])), ("sign",)),
    "step": (lambda p, d: pjax.step(p["x"]), ("step",)),
    "step by where": (lambda p, d: jnp.where(p["x"] > 0.2, 1.0, 0.0), ("select_n",)),
    "step by comparison": (
        lambda p, d: (p["x"] <= 0.1).astype(jnp.float64) * 2 - 1,
        ("sub",),
    ),
    "step of both sides": (
        lambda p, d: jnp.where((p["x"] > -0.5) & ~(p["x"] >= 0.5), p["x"], 2.0),
        ("select_n",),
    ),
    "step of either side": (
        lambda p, d: ((p["x"] < -0.5) | (p["x"] > 0.5)).astype(jnp.float64),
        ("convert_element_type",),
    ),
    "heaviside": (lambda p, d: jnp.heaviside(p["x"], 0.5), ("select_n",)),
    "nonzero": (lambda p, d: jnp.where(p["x"] != 0, p["x"], 1.0) * 2, ("mul",)),
    "round": (lambda p, d: jnp.round(p["x"]), ("round",)),
    "round to decimals": (lambda p, d: jnp.round(p["x"], 1), ("mul", "round", "div")),
    "quantize": (lambda p, d: pjax.quantize(p["x"], 4, -1.0, 2.0), ("quantize",)),
    "identity": (lambda p, d: pjax.identity(p["x"]), ("identity",)),
    # Extrema.
    "maximum": (lambda p, d: jnp.maximum(p["x"], p["y"]), ("max",)),
    "minimum": (lambda p, d: jnp.minimum(p["x"], p["b"]), ("min",)),
    "max of three": (
        lambda p, d: jnp.maximum(jnp.maximum(p["x"], p["y"]), p["z"]),
        ("max", "max"),
    ),
    "reduce max": (lambda p, d: p["t"].max(1), ("reduce_max",)),
    "reduce max axes": (lambda p, d: p["t"].max((0, 2)), ("reduce_max",)),
    "reduce max all": (lambda p, d: p["t"].max()[None], ("reduce_max",)),
    "reduce max kept": (lambda p, d: p["t"].max((0, 1), keepdims=True), ("reduce_max",)),
    "reduce min": (lambda p, d: p["t"].min((1, 2)), ("reduce_min",)),
    "masked max": (
        lambda p, d: p["x"].max(1, where=d["m"] | (d["c"] < 0), initial=-9.0),
        ("reduce_max", "max"),
    ),
    # Products.
    "matmul": (lambda p, d: p["x"] @ p["w"], ("dot",)),
    "matmul data left": (lambda p, d: d["c"] @ p["w"], ("dot",)),
    "matmul data right": (lambda p, d: p["w"] @ d["c"], ("dot",)),
    "matmul itself": (lambda p, d: p["x"] @ p["x"].T, ("dot",)),
    "matmul batched": (lambda p, d: p["t"] @ p["u"], ("dot",)),
    "matmul broadcast": (lambda p, d: p["t"] @ p["w"], ("dot",)),
    "matmul batched data": (lambda p, d: d["t"] @ p["u"], ("dot",)),
    "contract two axes": (lambda p, d: jnp.einsum("bij,ij->b", p["t"], p["x"]), ("dot",)),
    "contract two axes with data": (
        lambda p, d: jnp.einsum("bij,ij->b", d["t"], p["x"]),
        ("dot",),
    ),
    "batch axes anywhere": (
        lambda p, d: jnp.einsum("bij,kbi->ijk", p["t"].mT, p["t"].transpose(1, 0, 2)),
        ("dot",),
    ),
    "outer product": (lambda p, d: jnp.einsum("i,j->ij", p["b"], p["x"][0]), ("dot",)),
    "batch of scalars": (lambda p, d: jnp.einsum("ij,ij->ij", p["x"], p["y"]), ("dot",)),
    "inner product": (lambda p, d: jnp.dot(p["b"], p["x"][0])[None], ("dot",)),
    "inner product with data": (lambda p, d: jnp.dot(d["c"][0], p["b"])[None], ("dot",)),
    "vector times matrix": (lambda p, d: p["b"] @ p["w"], ("dot",)),
    # Wiring at the end, in front, and within a sum.
    "wiring": (lambda p, d: jnp.stack([p["x"][::-1], p["y"][:, [3, 3, 0, 1]]]), ()),
    "sum of wires": (lambda p, d: p["x"][:, ::-1] + jnp.roll(p["y"], 1, 0), ("add",)),
    "padded": (lambda p, d: jax.nn.relu(jnp.pad(p["x"], 1) + 0.5), ("relu",)),
    "masked": (lambda p, d: jnp.where(d["m"], p["x"] + p["y"], d["c"]), ("add",)),
    "converted": (lambda p, d: p["x"].astype(jnp.float32) * 2, ("mul",)),
}  # fmt: skip


def arrays(tree):
    return {name: jnp.asarray(value) for name, value in tree.items()}


def zoo_loss(params, data, targets):
    parts = []
    for number, (name, (operation, _)) in enumerate(ZOO.items()):
        out = operation(params, data)
        rows = pjax.squared_error(out, targets[name].astype(out.dtype))
        parts.append((1 + number % 3) * jnp.mean(rows.astype(jnp.float64)))
    return sum(parts)


def make_layout(reflecting: bool) -> tuple[Layout, list[Any], list[Any]]:
    params = arrays(PARAMS)
    data = arrays(DATA)
    shapes = jax.eval_shape(lambda: {k: f(params, data) for k, (f, _) in ZOO.items()})
    targets = {k: jnp.zeros(v.shape, v.dtype) for k, v in shapes.items()}
    program, leaves, consts, _ = trace(lambda p: zoo_loss(p, data, targets), params)
    metric = pjax.metrics.Uniform(weight=1.3, activation=0.8)
    return layout(program, Formulation(metric, reflecting=reflecting)), leaves, consts


# --- Structure -----------------------------------------------------------------------------------


def graph_of(fn, params=None):
    return build_graph(trace(fn, arrays(PARAMS) if params is None else params)[0])


@pytest.mark.parametrize("name", ZOO)
def test_an_operation_becomes_these_nodes(name, x64):
    operation, nodes = ZOO[name]
    data = arrays(DATA)
    shape = jax.eval_shape(operation, PARAMS, data).shape
    graph = graph_of(lambda p: pjax.squared_error(operation(p, data), jnp.zeros(shape)))
    assert tuple(n.name for n in graph.nodes if n.kind == "operation") == nodes
    # Sorted topologically: parameters, operations, losses.
    for producer, reader in graph.edges():
        assert producer < reader


# --- Semantics -----------------------------------------------------------------------------------


def operands(problem: Problem, node, deviations):
    """The full values of a node's slots."""
    slots = [problem.graph.slots[i] for i in node.slots]
    return [problem.values[s.variable] + d for s, d in zip(slots, deviations, strict=True)]


def reevaluate(problem: Problem, node, deviations):
    """The output of a node's operations in the program, where its slots have these deviations."""
    graph, values = problem.graph, problem.values
    program = graph.program
    variables = [graph.slots[i].variable for i in node.slots]
    full = operands(problem, node, deviations)
    definitions = {out: e for e in program.equations for out in e.outputs}
    if isinstance(node.rule, Affine) and len(set(variables)) < len(variables):
        # A sum that reads a variable twice: by what its terms say (other sums check the terms).
        assert node.rule.function is None
        axes = [term.axes for term in node.rule.terms]
        coefficients = node.rule._coefficients([read(values, a) for a in node.knowns])
        return values[node.output] + linear.forward(deviations, coefficients, axes)
    if len(set(variables)) < len(variables):  # a product of a variable with itself
        equation, given = definitions[node.output], iter(full)
        (out,) = equation.bind(*(next(given) for _ in equation.inputs))
        return out
    env = dict(zip(variables, full, strict=True))

    def value(atom):
        if not program.is_variable(atom):
            return read(values, atom)
        if atom not in env:
            equation = definitions[atom]
            out = equation.bind(*map(value, equation.inputs))
            env.update(zip(equation.outputs, out, strict=True))
        return env[atom]

    return value(node.output)


def has_jumps(node) -> bool:
    rule = node.rule
    if isinstance(rule, Affine) and rule.function is not None:
        pieces = rule.function.pieces
        ends = itertools.pairwise(pieces)
        return any(abs(a.value(a.upper) - b.value(a.upper)) > 1e-9 for a, b in ends)
    return isinstance(rule, Quantizer)


class Case:
    """Random deviations, weights and targets for one node: three cases, see `CASES`."""

    def __init__(self, node, problem: Problem):
        rng = np.random.default_rng(node.index)
        self.node, self.rng = node, rng
        reference = problem.reference(node.index)
        self.storages = node.rule.storages(True, [True] * len(node.slots))
        assert all(isinstance(storage, (Dense, Lifted)) for storage in self.storages)
        shapes = [
            jax.eval_shape(storage.fill, value)
            for storage, value in zip(self.storages, reference.inputs, strict=True)
        ]
        out = reference.output
        assert out is not None
        self.weights = [0.5 + 0.3 * i + 0.1 * (node.index % 7) for i in range(len(shapes))]
        self.starts = [self.cases(self.normal(s), CASES[0]) for s in shapes]
        self.target = self.cases(self.normal(out), CASES[1])
        self.target_weight = self.cases(np.abs(self.normal(out)) + 0.1, CASES[2])

    def normal(self, like) -> np.ndarray:
        return np.asarray(self.rng.normal(size=like.shape)).astype(like.dtype)

    def cases(self, value: np.ndarray, factors: Sequence[float]) -> np.ndarray:
        return np.stack([value * np.asarray(factor, value.dtype) for factor in factors])


#: From rest; from a random point; from there, where nobody reads the output.
CASES = ((0.0, 0.7, 0.7), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0))


def project(problem: Problem, case: Case, starts, target, target_weight):
    """The three projections onto one node."""
    reference = problem.reference(case.node.index)

    def one(states, target, target_weight):
        weights = tuple(case.weights)
        return case.node.rule.project(reference, tuple(states), weights, target, target_weight)

    return jax.vmap(one)(starts, target, target_weight)


def outputs(problem: Problem, case: Case, points):
    """The outputs of one node's operations in the program at some points, as deviations."""
    node, rule = case.node, case.node.rule
    reference: Any = problem.reference(node.index)
    lifted = [isinstance(storage, Lifted) for storage in case.storages]

    def one(states):
        if not any(lifted):
            return reevaluate(problem, node, states) - reference.output
        copies = [
            storage.fill(value) + d
            for storage, value, d in zip(case.storages, reference.inputs, states, strict=True)
        ]
        if isinstance(rule, PinnedBilinear):
            op, (known,) = rule.operation, reference.knowns
            copies.append(op.lift_left(known) if rule.pinned == "left" else op.lift_right(known))
        return jnp.sum(copies[0] * copies[1], -1) - reference.output

    return jax.vmap(one)(points)


def points_of(case: Case, ends: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Where to look at a node: at the projections, beside them, and on the way to them."""
    end, start = [e[1] for e in ends], [s[1] for s in case.starts]
    points = [[e[0] for e in ends], end]
    if has_jumps(case.node):
        points += [
            [e + shift * (-1) ** (pattern >> i & 1) for i, e in enumerate(end)]
            for shift in (1e-7, -1e-7)
            for pattern in range(2 ** (len(end) - 1))
        ]
    beside = len(points)
    for fraction in (0.0, 0.5, 0.9, 1.1):
        points.append([fraction * e + (1 - fraction) * s for e, s in zip(end, start, strict=True)])
    for scale in (1e-4, 1e-4, 1e-4, 1e-4, 1e-2, 1e-2, 0.1, 0.1, 1.0, 1.0):
        points.append([e + scale * case.normal(e) for e in end])
    columns = zip(*points, strict=True)
    return [
        np.stack(column).astype(e.dtype) for column, e in zip(columns, end, strict=True)
    ], beside


#: Nearly all of the time goes into compiling.
compiled = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@pytest.fixture(scope="module")
def checked():
    """For each node of the zoo what two compiled functions find; see the tests that read it."""
    with enable_x64():  # pyright: ignore[reportGeneralTypeIssues]
        found, leaves, consts = make_layout(reflecting=True)
        # Of equal nodes one is enough.
        unique: dict[Any, Any] = {}
        for node in found.graph.nodes:
            if node.kind in ("operation", "identity"):
                shapes = tuple(found.graph.slots[i].shape for i in node.slots)
                offset = node.inner is not None and node.inner[1] is not None
                unique.setdefault((node.rule, shapes, offset), node)
        nodes = list(unique.values())
        made: list[Case] = []

        def cases(leaves, consts):
            problem = Problem(found, leaves, consts)
            made[:] = [Case(node, problem) for node in nodes]

        jax.eval_shape(cases, leaves, consts)

        @compiled
        def projections(leaves, consts, starts):
            problem = Problem(found, leaves, consts)
            return [project(problem, c, *s) for c, s in zip(made, starts, strict=True)]

        @compiled
        def evaluations(leaves, consts, points):
            problem = Problem(found, leaves, consts)
            return [outputs(problem, c, p) for c, p in zip(made, points, strict=True)]

        moved = projections(
            leaves, consts, [(tuple(c.starts), c.target, c.target_weight) for c in made]
        )
        moved = jax.tree_util.tree_map(np.asarray, moved)
        points = [points_of(case, ends) for case, (ends, _) in zip(made, moved, strict=True)]
        values = evaluations(leaves, consts, [tuple(p) for p, _ in points])
        yield {
            case.node.index: (case.node, summary(case, *m, *p, np.asarray(v)))
            for case, m, p, v in zip(made, moved, points, values, strict=True)
        }


def summary(case: Case, ends, outs, points, beside, values) -> dict[str, float]:
    start, end = [s[1] for s in case.starts], [e[1] for e in ends]

    def objective(states, out):
        cost = sum(
            w * np.sum(np.square(a - b))
            for w, a, b in zip(case.weights, states, start, strict=True)
        )
        return cost + np.sum(case.target_weight[1] * np.square(out - case.target[1]))

    others = [objective([p[i] for p in points], values[i]) for i in range(beside, len(values))]
    largest = lambda arrays: max(float(np.max(np.abs(a))) for a in arrays)  # noqa: E731
    return {
        "moved from rest": largest([*(e[0] for e in ends), outs[0]]),
        "reference": largest([values[0]]),
        # At a jump the nearest point of the closure may have the value of either side.
        # In units of the precision of float64.
        "closure": float(np.max(np.min(np.abs(values[1:beside] - outs[1]), axis=0)))
        * float(np.finfo(np.float64).eps / np.finfo(outs.dtype).eps),
        "nearer": float(objective(end, outs[1]) - min(others)),
        "moves": largest([a - b for a, b in zip(end, start, strict=True)]),
        "unread": largest([e[2] - s for e, s in zip(ends, start, strict=True)]),
        "finite": all(bool(np.isfinite(a).all()) for a in (*ends, outs)),
    }


def failures(checked, key, bound):
    return {
        f"{node.name} {node.rule}": float(result[key])
        for node, result in checked.values()
        if not result[key] <= bound(node)
    }


def test_the_program_and_the_rule_agree_on_the_reference(checked):
    assert not failures(checked, "reference", lambda n: 1e-6)


def test_nothing_moves_from_rest(checked):
    assert not failures(checked, "moved from rest", lambda n: 0.0)


def test_the_moved_inputs_reproduce_the_output(checked):
    assert not failures(checked, "closure", lambda n: 1e-6 if has_jumps(n) else 1e-10)


def test_no_feasible_point_nearby_is_nearer(checked):
    assert not failures(checked, "nearer", lambda n: 1e-9)
    assert len(checked) > 70
    moving = [result for node, result in checked.values() if float(result["moves"]) > 1e-3]
    assert len(moving) > len(checked) - 5


def test_what_nobody_reads_asks_for_nothing(checked):
    assert not failures(checked, "unread", lambda n: 0.0)
    assert all(bool(result["finite"]) for _, result in checked.values())


# --- Products: the forms in which their copies are stored -----------------------------------------

PRODUCTS = [
    "matmul", "matmul data right", "contract two axes with data", "batch axes anywhere",
    "inner product", "inner product with data",
]  # fmt: skip


def test_the_forms_of_storage_agree_on_every_product(x64):
    """One projection of compact, structured and lifted copies: outputs, means and distances."""
    params, data = arrays({k: PARAMS[k] for k in "xbtw"}), arrays(DATA)

    def loss(p):
        outs = [ZOO[name][0](p, data) for name in PRODUCTS]
        return sum(jnp.sum(pjax.squared_error(out, jnp.zeros(out.shape))) for out in outs)

    program, leaves, consts, _ = trace(loss, params)
    found = layout(program, Formulation())
    nodes = [n for n in found.graph.nodes if isinstance(n.rule, (NeuronBilinear, PinnedBilinear))]
    assert len(nodes) == len(PRODUCTS)

    def one(problem, node, storages, draws):
        *values, target, target_weight = draws
        other = problem.reference(node.index).knowns
        other = other[0] if other else None
        weights = (1.3, 0.7)[: len(storages)]
        start = [storage.fill(value) for storage, value in zip(storages, values, strict=True)]
        end, out = node.rule.project(
            problem.reference(node.index), tuple(start), weights, target, target_weight
        )
        means = [s.mean(e, other) for s, e in zip(storages, end, strict=True)]
        distances = [
            s.squared_distance(e, b, w, other)
            for s, e, b, w in zip(storages, end, start, weights, strict=True)
        ]
        return out, means, distances

    def forms(node):
        rule, slots = node.rule, len(node.slots)
        lifted = rule.storages(True, [True] * slots)
        assert all(isinstance(storage, Lifted) for storage in lifted)
        yield lifted
        yield rule.storages(False, [False] * slots)
        if slots == 1:
            yield rule.storages(True, [False])

    def draw(node, rng):
        slots = [found.graph.slots[i] for i in node.slots]
        out = program.shape(node.output)
        arrays = [rng.normal(size=shape) for shape in (*(s.shape for s in slots), out)]
        return [*arrays, np.abs(rng.normal(size=out)) + 0.1]

    rng = np.random.default_rng(0)
    draws = [draw(node, rng) for node in nodes]

    @compiled
    def run(leaves, consts, draws):
        problem = Problem(found, leaves, consts)
        return [
            [one(problem, node, form, drawn) for form in forms(node)]
            for node, drawn in zip(nodes, draws, strict=True)
        ]

    for node, (lifted, *others) in zip(nodes, run(leaves, consts, draws), strict=True):
        assert float(jnp.max(jnp.abs(lifted[0]))) > 0.01
        for other in others:
            for a, b in zip(*map(jax.tree_util.tree_leaves, (lifted, other)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9, err_msg=str(node.rule))


# --- Shared specifications, kinds, levels, coefficients -------------------------------------------


def tower(p, x, y, depth=4):
    for i in range(depth):
        x = jax.nn.relu(x @ p[f"w{i}"] + p[f"b{i}"])
    return jnp.mean(pjax.cross_entropy(x, y))


def tower_params(depth=4, width=3):
    names = [f"w{i}" for i in range(depth)] + [f"b{i}" for i in range(depth)]
    return {n: jnp.ones((width, width) if n[0] == "w" else (width,)) for n in names}


def tower_graph():
    x = jnp.arange(6.0).reshape(2, 3)
    program = trace(lambda p: tower(p, x, jnp.eye(3)[:2]), tower_params())[0]
    return build_graph(program)


def test_equal_nodes_share_one_specification():
    graph = bipartite(tower_graph())
    rules = [n.rule for n in graph.nodes if n.kind != "parameter"]
    dots = [r for r in rules if isinstance(r, NeuronBilinear)]
    relus = [r for r in rules if isinstance(r, Affine)]
    assert (len(dots), len(relus)) == (3, 4)
    assert all(rule is dots[0] for rule in dots)
    assert all(rule is relus[0] for rule in relus)
    assert (
        len({id(rule) for rule in rules}) == 4
    )  # with the first dot, whose input is data, and the loss


def test_identities_share_the_specification_of_the_one_that_a_user_writes():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))

    def fn(p):
        h = pjax.identity(x @ p["w"])
        h = h + h @ p["v"]  # a cycle of three nodes
        h = h + h @ p["v"]
        return pjax.squared_error(h, x)

    graph = bipartite(build_graph(trace(fn, {"w": w, "v": w})[0]))
    assert any(node.kind == "identity" for node in graph.nodes)
    identities = [node.rule for node in graph.nodes if node.name == "identity"]
    assert len(identities) >= 2
    assert all(rule is identities[0] for rule in identities)


def test_slots_of_weights_and_of_activations():
    x, ids = jnp.ones((5, 4)), jnp.array([0, 2, 2, 1, 0])
    params = {"w": jnp.ones((4, 4)), "e": jnp.ones((3, 4)), "b": jnp.ones(4), "i": ids}

    def fn(p):
        tied = jnp.sign(p["w"]).T * 0.5
        h = jax.nn.relu(x @ tied + p["b"])
        h = h @ p["w"] + jnp.broadcast_to(p["b"], (5, 4))
        # Rows of a parameter, whichever data asks for, are a weight.
        return pjax.squared_error(h + p["e"][p["i"]] + p["b"] * x, x)

    graph = build_graph(trace(fn, params)[0])
    kinds = {
        (node.name, graph.nodes[slot.producers[0]].name, slot.kind)
        for node in graph.nodes
        for slot in (graph.slots[i] for i in node.slots)
    }
    assert {kind for name, _, kind in kinds if name == "mul"} == {"weight"}
    assert ("sum_relu", "['b']", "weight") in kinds
    assert ("dot", "sum_relu", "activation") in kinds
    assert ("dot", "['w']", "weight") in kinds
    assert {kind for _, producer, kind in kinds if producer == "['e']"} == {"weight"}
    assert {kind for name, _, kind in kinds if name == "squared_error"} == {"activation"}


def test_levels_run_from_the_losses_to_the_parameters():
    for graph in (tower_graph(), bipartite(tower_graph()), bipartite(residual_graph())):
        groups = graph.level_groups()
        assert sorted(itertools.chain(*groups)) == [node.index for node in graph.nodes]
        place = {index: number for number, group in enumerate(groups) for index in group}
        assert {graph.nodes[i].kind for i in groups[0]} == {"loss"}
        assert {graph.nodes[i].kind for i in groups[-1]} == {"parameter"}
        for producer, reader in graph.edges():
            assert place[producer] > place[reader]


def residual_graph():
    x = jnp.ones((2, 3))

    def fn(p):
        h = x @ p["w0"]
        for i in range(1, 4):
            h = h + h @ p[f"w{i}"]  # a cycle of three nodes
        return pjax.squared_error(h, x)

    return build_graph(trace(fn, {f"w{i}": jnp.ones((3, 3)) for i in range(4)})[0])


def test_the_sets_of_a_residual_network_share_no_slot():
    plain = residual_graph()
    graph = bipartite(plain)
    identities = [node for node in graph.nodes if node.kind == "identity"]
    assert identities
    for producer, reader in graph.edges():
        assert graph.nodes[producer].colour != graph.nodes[reader].colour
    assert graph.losses[0].colour == "A"
    # One identity per producer, and what it passes on is the producer's own value.
    assert len({graph.slots[n.slots[0]].producers for n in identities}) == len(identities)
    for node in identities:
        slot = graph.slots[node.slots[0]]
        assert graph.nodes[slot.producers[0]].output == node.output == slot.variable
    # The way from producer to reader is still the same.
    through = {n.index: graph.slots[n.slots[0]].producers[0] for n in identities}
    for before, after in zip(plain.slots, graph.slots, strict=False):
        assert before.producers == tuple(through.get(p, p) for p in after.producers)


def coefficients(fn, params):
    program, leaves, consts, _ = trace(fn, params)
    graph = build_graph(program)
    return graph.loss_coefficients(graph.program.evaluate(leaves, consts))


def test_coefficients_of_the_losses():
    w, y = jnp.ones((3, 2)), jnp.zeros((4, 2))
    x = jnp.arange(12.0).reshape(4, 3)
    rows = jnp.array([1.0, 0.0, 2.0, 3.0])
    mask = jnp.array([True, True, False, True])

    def losses(p):
        return pjax.squared_error(x @ p, y), pjax.cross_entropy(x @ p, y)

    tails = {
        "as it is": (lambda a, b: a, [jnp.ones(4)]),
        "sum": (lambda a, b: a.sum(), [jnp.ones(4)]),
        "mean": (lambda a, b: a.mean(), [jnp.full(4, 0.25)]),
        "weights": (lambda a, b: (rows * a).sum() / rows.sum(), [rows / 6]),
        "dot": (lambda a, b: jnp.dot(rows, a), [rows]),
        "average": (lambda a, b: jnp.average(a, weights=rows), [rows / 6]),
        "mask": (lambda a, b: jnp.where(mask, a, 0).sum(), [mask * 1.0]),
        "masked mean": (lambda a, b: jnp.mean(a, where=mask), [mask / 3]),
        "two": (lambda a, b: 0.5 * a.mean() + jnp.sum(b) + 3, [jnp.full(4, 0.125), jnp.ones(4)]),
        "difference": (lambda a, b: (2 * a - 0.5 * a).sum(), [jnp.full(4, 1.5)]),
        "choice": (lambda a, b: jnp.where(mask, a, b), [mask * 1.0, 1.0 - mask]),
        "join": (lambda a, b: jnp.concatenate([a, 2 * b]), [jnp.ones(4), jnp.full(4, 2.0)]),
        "some rows": (lambda a, b: a[jnp.array([0, 0, 3])].sum(), [jnp.array([2.0, 0, 0, 1])]),
        "narrower": (lambda a, b: a.astype(jnp.bfloat16).sum(), [jnp.ones(4)]),
    }

    @compiled
    def all_found():
        return {
            name: coefficients(lambda p, tail=tail: tail(*losses(p)), w)
            for name, (tail, _) in tails.items()
        }

    for name, found in all_found().items():
        expected = tails[name][1]
        assert len(found) == len(expected), name
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


def test_a_loss_of_data_alone_is_a_number():
    """A frozen head: its loss moves nothing and is no node."""
    x, y = jnp.ones((2, 3)), jnp.eye(3)[:2]

    def fn(p):
        return pjax.cross_entropy(x @ p, y).mean() + pjax.cross_entropy(x, y).sum()

    graph = build_graph(trace(fn, jnp.ones((3, 3)))[0])
    assert len(graph.losses) == 1


# --- Errors --------------------------------------------------------------------------------------

X, Y = jnp.ones((2, 3)), jnp.eye(3)[:2]
W = {"w": jnp.ones((3, 3)), "v": jnp.ones((3, 3))}


def ce(logits):
    return pjax.cross_entropy(logits, Y)


def line_of(marker: str) -> int:
    """The number of the line of this file that ends in `marker`."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {marker}")]
    return number


def unknown_directly(p):
    return ce(jnp.nextafter(X @ p["w"], 2.0))  # unknown directly


@jax.jit
def product_layer(x, w):
    return jax.lax.nextafter(x @ w, x)  # unknown in jit


def unknown_in_flax(p):
    import flax.linen as nn

    model = nn.Sequential([functools.partial(jnp.nextafter, 2.0)])
    return ce(model.apply({}, X @ p["w"]))  # unknown in flax


def unknown_under_vmap(p):
    return ce(jax.vmap(lambda x: jnp.nextafter(x @ p["w"], 2.0))(X))  # unknown under vmap


def unknown_in_pjax(p):
    row = pjax.relu(pjax.index(X @ p["w"], 0))
    return pjax.cross_entropy(jax.lax.nextafter(row, row), Y[0])  # unknown product


def unknown_in_a_shared_library_function(p):
    """`nextafter` is jitted in JAX: traced first for another line, its equations are shared."""
    jax.make_jaxpr(lambda x: jnp.nextafter(x, 2.0))(X)
    return ce(jnp.nextafter(X @ p["w"], 2.0))  # unknown and shared


@pytest.mark.parametrize(
    ("fn", "operation", "marker"),
    [
        (unknown_directly, "nextafter", "unknown directly"),
        (lambda p: ce(product_layer(X, p["w"])), r"\w+", "unknown in jit"),
        (lambda p: ce(product_layer(product_layer(X, p["v"]), p["w"])), r"\w+", "unknown in jit"),
        (unknown_in_flax, r"\w+", "unknown in flax"),
        (unknown_under_vmap, "nextafter", "unknown under vmap"),
        (unknown_in_pjax, "nextafter", "unknown product"),
        (unknown_in_a_shared_library_function, r"\w+", "unknown and shared"),
    ],
)
def test_an_operation_without_a_rule(fn, operation, marker):
    match = (
        rf"no projection for the operation `{operation}` at .*test_graph.py:{line_of(marker)} \("
        rf"(.|\n)*Register one:\s+@pjax.register_projection\(jax.lax.{operation}_p\)"
        '(.|\n)*`fallback="gauss-newton"`'
    )
    with pytest.raises(TraceError, match=match):
        graph_of(fn, W)


def test_an_operation_with_several_outputs_has_no_rule():
    with pytest.raises(TraceError, match="`hessenberg` at .*several outputs, and a node has one"):
        graph_of(lambda p: ce(X @ jax.lax.linalg.hessenberg(p["w"].T @ p["w"])[0]), W)


def test_control_flow_over_parameters():
    with pytest.raises(TraceError, match="`while` at .*Control flow over parameters"):
        graph_of(
            lambda p: ce(
                jax.lax.while_loop(lambda h: h[0, 0] > 0, lambda h: h - jnp.sum(p["w"]), X)
            ),
            W,
        )
    choice = graph_of(lambda p: ce(jax.lax.cond(X[0, 0] > 0, lambda: X @ p["w"], lambda: X)), W)
    assert [n.name for n in choice.nodes if n.kind == "operation"] == ["dot"]


TRACE_ERRORS = {
    "no loss": (
        lambda p: jnp.sum(X @ p["w"]),
        r"does not end in a loss: it is linear in `params\['w'\]`.*ends in `reduce_sum` \(.*test_",
    ),
    "parameter as the result": (lambda p: p["w"], "does not end in a loss"),
    "several outputs": (lambda p: (ce(X @ p["w"]), X @ p["w"]), "returns 2 arrays"),
    "no output": (lambda p: None, "returns 0 arrays"),
    "a number": (lambda p: 1.0, "does not depend on any parameter"),
    "data": (lambda p: ce(X), "does not depend on any parameter"),
    "stopped": (
        lambda p: jax.lax.stop_gradient(ce(X @ p["w"])),
        "does not depend on any parameter",
    ),
    "labels of parameters": (
        lambda p: pjax.cross_entropy(X @ p["w"], X @ p["v"]),
        r"labels of `cross_entropy` \(.*test_graph.*depend on the parameters",
    ),
    "exchanged operands": (
        lambda p: pjax.squared_error(Y, X @ p["w"]),
        "labels of `squared_error` .*depend on the parameters",
    ),
    "loss of a loss": (
        lambda p: pjax.squared_error(ce(X @ p["w"]), Y[:, 0]),
        "`squared_error` .*reads the result of another loss",
    ),
    "product of losses": (
        lambda p: ce(X @ p["w"]) * ce(X @ p["v"]),
        "`mul` .*joins a loss .* no function of one prediction",
    ),
    "weights of parameters": (
        lambda p: jnp.sum(ce(X @ p["w"]) * p["v"][0, :2]),
        "`mul` .*joins a loss with a value of the parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRACE_ERRORS)
def test_trace_errors(name):
    fn, match = TRACE_ERRORS[name]
    with pytest.raises(TraceError, match=match):
        graph_of(fn, W)


def test_an_empty_batch():
    x, y = jnp.ones((0, 3)), jnp.ones((0, 3))
    with pytest.raises(
        TraceError, match=r"batch is empty: `cross_entropy` \(.*test_graph.*\(0, 3\)"
    ):
        pjax.feasibility_problem(lambda p: pjax.cross_entropy(x @ p["w"], y).sum(), {"w": W["w"]})


def test_an_unused_parameter_is_named_in_the_caller_s_line():
    params = {"w": W["w"], "spare": {"deep": jnp.ones(4)}, "count": jnp.array(3)}
    optimizer = pjax.optim.AlternatingProjections(steps_per_update=1)

    def loss(p):
        jnp.sum(p["spare"]["deep"])  # computed, but the loss does not depend on it
        return ce(X @ p["w"])

    for call in (pjax.feasibility_problem, optimizer.problem):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(loss, params)
        # The first of two equal problems says it; each optimiser has problems of its own.
        (warning,) = [w for w in caught if issubclass(w.category, UnusedParameterWarning)]
        assert "`params['spare']['deep']` (4,) is not used by the loss" in str(warning.message)
        assert warning.filename == __file__


def test_an_unused_parameter_stays_as_it_is():
    params = {"w": W["w"], "unused": jnp.arange(3.0), "count": jnp.array(3)}
    optimizer = pjax.optim.AlternatingProjections(steps_per_update=1)
    with pytest.warns(UnusedParameterWarning, match="unused"):
        moved, _ = optimizer.update(lambda p: ce(X @ p["w"]), params)
    np.testing.assert_array_equal(moved["unused"], params["unused"])
    assert moved["count"] == 3
    assert moved["count"].dtype == params["count"].dtype
    assert not np.array_equal(moved["w"], params["w"])


# --- The same graph in every process --------------------------------------------------------------

DIGEST = """
import hashlib, jax, jax.numpy as jnp
import pjax
from pjax.graph.bipartition import bipartite
from pjax.graph.build import build_graph
from pjax.trace.entry import trace

x, y = jnp.ones((4, 3)), jnp.eye(3)[jnp.array([0, 1, 2, 0])]
params = {f"layer{i}": {"weight": jnp.full((3, 3), 0.1 * i), "bias": jnp.ones(3)} for i in range(4)}
params["emb"] = jnp.ones((5, 3))

def fn(p):
    h = x + p["emb"][jnp.array([0, 1, 1, 4])]
    for name in sorted(p):
        if name != "emb":
            h = h + h @ p[name]["weight"] + p[name]["bias"]
    return jnp.mean(pjax.cross_entropy(jnp.stack([h, h[::-1]]).mean(0), y))

graph = bipartite(build_graph(trace(fn, params)[0]))
assert any(node.kind == "identity" for node in graph.nodes)
lines = [
    repr((n.index, n.kind, n.name, n.rule, n.slots, n.knowns, n.output, n.colour))
    for n in graph.nodes
]
for s in graph.slots:
    lines.append(repr((s.index, s.node, s.producers, s.route.sources, s.shape, s.kind)))
    lines += [repr((e.name, e.inputs, e.outputs)) for e in s.route.equations]
print(hashlib.sha256("\\n".join(lines).encode()).hexdigest())
text = pjax.optim.DouglasRachford(steps_per_update=2).lower(fn, params).as_text()
print(hashlib.sha256(text.encode()).hexdigest(), len(text))
"""


def test_the_graph_and_the_compiled_program_do_not_depend_on_the_hash_seed():
    outputs = []
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    for process in processes:
        outputs.append(process.communicate(timeout=300)[0])
        assert process.returncode == 0
    assert outputs[0] == outputs[1]
    assert len(outputs[0].split()) == 3
