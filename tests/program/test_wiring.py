"""Routes against dense Jacobians, and consensus as a weighted mean over scalar indices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.graph import Graph, build_graph
from pjax.problem import Formulation, Problem, State, layout
from pjax.problem.layouts import _reader_counts
from pjax.program import TraceError, is_wiring
from pjax.trace import trace

A, B = (4, 6), (4, 6)
MASK = np.arange(24).reshape(A) % 3 == 0
DATA = np.linspace(-1, 1, 24, dtype=np.float32).reshape(A)
START = np.array(1)
TABLE = np.array([[0, 2], [2, 2], [-1, 3]])

#: Functions of two parameters, `a` and `b`, and a dictionary of data, `d`.
ROUTES: dict[str, Any] = {
    "itself": lambda a, b, d: a,
    "reshape": lambda a, b, d: a.reshape(3, 2, 4),
    "transpose": lambda a, b, d: a.reshape(2, 2, 6).transpose(2, 0, 1),
    "broadcast": lambda a, b, d: jnp.broadcast_to(a[:, None, :], (4, 5, 6)),
    "squeeze and expand": lambda a, b, d: jnp.expand_dims(a[:1].squeeze(0), (0, 2)),
    "repeated rows": lambda a, b, d: a[jnp.asarray(TABLE)],
    "repeated rows of data": lambda a, b, d: a[d["table"]],
    "repeated columns and rows": lambda a, b, d: a[d["table"][:, 0], d["table"][:, 1]],
    "clipped indices": lambda a, b, d: a.at[jnp.array([0, 9, -9])].get(mode="clip"),
    "filled indices": lambda a, b, d: a.at[jnp.array([0, 9, 2])].get(mode="fill", fill_value=7.0),
    "default indices out of bounds": lambda a, b, d: jnp.take(a, jnp.array([3, 3, 1]), axis=0),
    "overlapping patches": lambda a, b, d: jnp.stack([a[:, i : i + 3] for i in range(4)], 1),
    "patches by gather": lambda a, b, d: a[:, jnp.arange(4)[:, None] + jnp.arange(3)],
    "pad": lambda a, b, d: jnp.pad(a, ((1, 2), (0, 3)), constant_values=5.0),
    "pad inside and cut": lambda a, b, d: jax.lax.pad(a, 0.0, ((-1, 2, 1), (0, -2, 0))),
    "pad by wrapping": lambda a, b, d: jnp.pad(a, ((1, 1), (2, 2)), mode="wrap"),
    "pad by reflection": lambda a, b, d: jnp.pad(a, 2, mode="reflect"),
    "concatenate with data": lambda a, b, d: jnp.concatenate([a, d["data"], b, a[:1]], 0),
    "concatenate the same": lambda a, b, d: jnp.concatenate([a, a], 1),
    "stack": lambda a, b, d: jnp.stack([a, b, d["data"], a], 1),
    "unstack": lambda a, b, d: jnp.unstack(a)[2],
    "strides": lambda a, b, d: a[1::2, ::3],
    "negative strides": lambda a, b, d: a[::-2, ::-1],
    "reverse": lambda a, b, d: jnp.flip(a, 0),
    "roll": lambda a, b, d: jnp.roll(a, 2, 1),
    "roll by data": lambda a, b, d: jnp.roll(a, d["start"], 0),
    "select": lambda a, b, d: jnp.where(d["mask"], a, b),
    "select data": lambda a, b, d: jnp.where(d["mask"], d["data"], a),
    "select a number": lambda a, b, d: jnp.where(d["mask"], a, -jnp.inf),
    "select of three": lambda a, b, d: jax.lax.select_n(d["kind"], a, b, d["data"]),
    "split": lambda a, b, d: jnp.concatenate(jnp.split(a, 3, 1)[::-1], 0),
    "array split": lambda a, b, d: jnp.array_split(a, [1, 5], 1)[1],
    "dynamic slice": lambda a, b, d: jax.lax.dynamic_slice(a, (d["start"], 2), (2, 3)),
    "dynamic index": lambda a, b, d: a[d["start"]],
    "dynamic update": lambda a, b, d: jax.lax.dynamic_update_slice(a, b[:2, :2], (d["start"], 3)),
    "dynamic update of data": lambda a, b, d: jax.lax.dynamic_update_slice(
        d["data"], a[:2], (d["start"], 0)
    ),
    "set a row": lambda a, b, d: a.at[1].set(b[0]),
    "set a column to a number": lambda a, b, d: a.at[:, 2].set(3.0),
    "set scattered entries": lambda a, b, d: a.at[jnp.array([0, 2]), jnp.array([1, 1])].set(
        b[0, :2], unique_indices=True
    ),
    "set repeated rows": lambda a, b, d: a.at[d["table"][:, 0]].set(b[:3]),
    "set repeated entries": lambda a, b, d: a.at[jnp.array([0, 0, 2]), jnp.array([1, 1, 9])].set(
        b[0, :3]
    ),
    "set repeated rows to a number": lambda a, b, d: a.at[jnp.array([0, 0])].set(1.0),
    "tile": lambda a, b, d: jnp.tile(a, (2, 1, 2)),
    "repeat": lambda a, b, d: jnp.repeat(a, 3, 1),
    "diagonal": lambda a, b, d: jnp.diagonal(a),
    "triangle": lambda a, b, d: jnp.tril(a),
    "meshes": lambda a, b, d: jnp.stack(jnp.meshgrid(a[0], b[:, 0])),
    "copies": lambda a, b, d: jax.device_put(jnp.array(a, copy=True)),
    "barrier": lambda a, b, d: jnp.stack(jax.lax.optimization_barrier((a, b))),
    "under vmap": lambda a, b, d: jax.vmap(lambda r, i: jnp.roll(r, 1)[i], (1, 0))(a, d["columns"]),
    "narrower and back": lambda a, b, d: a.astype(jnp.bfloat16).astype(jnp.float32)[::-1],
    "windows of the library": lambda a, b, d: pjax.conv_patch(a[None, None], (2, 3), 1, 1),
}  # fmt: skip

ARRAYS = {
    "mask": MASK,
    "data": DATA,
    "table": TABLE,
    "start": START,
    "kind": (np.arange(24).reshape(A) % 3).astype(np.int32),
    "columns": np.array([0, 3, 3, 1, 2, 0]),
}


#: Nearly all of the time goes into compiling.
compiled = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def make(name):
    """The graph of a route alone, the inputs of its program, and its slot."""
    fn = ROUTES[name]
    data = {k: jnp.asarray(v) for k, v in ARRAYS.items()}
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("a", A), ("b", B))}
    out = jax.eval_shape(lambda p: fn(p["a"], p["b"], data), params)

    def loss(p):
        target = jnp.zeros(out.shape, out.dtype)
        return jnp.sum(pjax.squared_error(fn(p["a"], p["b"], data), target))

    program, leaves, consts, _ = trace(loss, params)
    graph = build_graph(program)
    (node,) = graph.losses
    (slot,) = (graph.slots[i] for i in node.slots)
    return graph, (leaves, consts), slot, (fn, params, data)


def dense(slot, values):
    """The matrix of a route: `slot entries × entries of all sources`."""
    program = slot.route.program
    shapes = [program.shape(v) for v in slot.route.sources]
    dtypes = [program.dtype(v) for v in slot.route.sources]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])

    def column(flat):
        parts = jnp.split(flat, ends[:-1])
        parts = [p.reshape(s).astype(d) for p, s, d in zip(parts, shapes, dtypes, strict=True)]
        return slot.route(parts, values).astype(flat.dtype).ravel()

    return jax.vmap(column, out_axes=1)(jnp.eye(ends[-1]))


def blocks_of(slot, matrix):
    """The columns of a route's matrix, source by source."""
    sizes = [int(np.prod(slot.route.program.shape(v))) for v in slot.route.sources]
    return np.split(np.asarray(matrix), np.cumsum(sizes)[:-1], axis=1)


@pytest.mark.parametrize("name", ROUTES)
def test_route_and_pull(name):
    graph, inputs, slot, (fn, params, data) = make(name)
    program = graph.program
    assert [n.kind for n in graph.nodes if n.kind != "parameter"] == ["loss"]
    names = [graph.nodes[p].name.strip("[]'") for p in slot.producers]
    there = jnp.asarray(np.random.default_rng(1).normal(size=slot.shape), slot.dtype)

    @compiled
    def everything(leaves, consts):
        values = program.evaluate(leaves, consts)

        def function(*args):
            return fn(*({**params, **dict(zip(names, args, strict=True))}[k] for k in "ab"), data)

        jacobian = jax.jacobian(function, argnums=tuple(range(len(names))))
        rows = jacobian(*(params[n] for n in names))
        return dense(slot, values), rows, slot.route.pull(there, values)

    matrix, jacobian, pulled = jax.tree_util.tree_map(np.asarray, everything(*inputs))
    # One 1 in a row, or none where the entry is a constant.
    assert set(np.unique(matrix)) <= {0.0, 1.0}
    assert set(matrix.sum(1)) <= {0.0, 1.0}
    # It is the Jacobian of the function; constants drop out.
    expected = np.concatenate([j.reshape(len(matrix), -1) for j in jacobian], 1)
    np.testing.assert_array_equal(matrix, expected)
    # `pull` is the transpose, in the types of the sources.
    assert [p.shape for p in pulled] == [program.shape(v) for v in slot.route.sources]
    assert [p.dtype for p in pulled] == [program.dtype(v) for v in slot.route.sources]
    flat = np.concatenate([p.ravel() for p in pulled])
    tolerance = 1e-2 if "narrower" in name else 1e-5
    np.testing.assert_allclose(flat, matrix.T @ np.asarray(there).ravel(), atol=tolerance)


@pytest.mark.parametrize(
    "name", ["reshape", "transpose", "broadcast", "reverse", "repeat", "narrower and back"]
)
def test_even_routes_read_each_entry_equally_often(name):
    graph, inputs, slot, _ = make(name)
    assert slot.route.even
    counts = np.asarray(dense(slot, graph.program.evaluate(*inputs))).sum(0)
    np.testing.assert_array_equal(counts, counts[0])
    assert _reader_counts(slot) == (counts[0],)


def test_there_are_enough_routes():
    assert len(ROUTES) >= 45
    direct = [name for name in ROUTES if make(name)[2].route.direct]
    assert direct == ["itself"]


def test_consensus_is_the_weighted_mean_over_scalar_indices(x64):
    """Slots of different weights read overlapping parts of two parameters; unread entries stay."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=A)), "b": jnp.asarray(rng.normal(size=B))}
    data = {k: jnp.asarray(v, jnp.float64 if k == "data" else None) for k, v in ARRAYS.items()}
    used = [
        "overlapping patches", "repeated rows of data", "pad", "concatenate with data", "select",
        "negative strides", "dynamic update", "set a row", "broadcast", "stack", "filled indices",
    ]  # fmt: skip

    def loss(p):
        # The last row of `a` is read by nobody.
        a = p["a"].at[3].set(0.0)
        outs = [ROUTES[name](a, p["b"], data) for name in used]
        return sum(jnp.sum(pjax.squared_error(o, jnp.zeros(o.shape))) for o in outs)

    program, leaves, consts, _ = trace(loss, params)
    weights: list[float] = []

    class Metric(pjax.metrics.Uniform):
        def slot_weights(self, graph: Graph):
            weights[:] = [0.5 + 0.25 * slot.index for slot in graph.slots]
            return weights

    found = layout(program, Formulation(Metric(), grouping="levels"))
    slots, nodes = found.graph.slots, found.graph.nodes
    assert all(n.kind in ("parameter", "loss") for n in nodes)
    state = State(tuple(jnp.asarray(rng.normal(size=s.shape)) for s in slots))

    @compiled
    def everything(leaves, consts, state):
        problem = Problem(found, leaves, consts)
        moved, new = (
            problem.parameter_deviations(state),
            problem.project(len(found.groups) - 1, state),
        )
        return [dense(slot, problem.values) for slot in slots], moved, new

    matrices, moved, new = everything(leaves, consts, state)
    numerator, denominator = np.zeros((2, 24)), np.zeros((2, 24))
    for slot, matrix, value in zip(slots, matrices, state.slots, strict=True):
        for producer, block in zip(slot.producers, blocks_of(slot, matrix), strict=True):
            weight = weights[slot.index]
            numerator[producer] += weight * block.T @ np.asarray(value).ravel()
            denominator[producer] += weight * block.sum(0)
    assert [node.name for node in nodes[:2]] == ["['a']", "['b']"]
    expected = numerator / np.where(denominator > 0, denominator, 1)
    np.testing.assert_allclose(np.reshape(moved, (2, 24)), expected, atol=1e-12)
    # Entries that nobody reads keep their value.
    assert (denominator[0].reshape(A)[3] == 0).all()
    assert (np.asarray(moved[0])[3] == 0).all()
    # Written back, every entry that reads a producer agrees with it, and constants rest.
    for slot, matrix, after in zip(slots, matrices, new.slots, strict=True):
        flat = np.concatenate([np.ravel(moved[nodes[p].output]) for p in slot.producers])
        np.testing.assert_allclose(np.ravel(after), np.asarray(matrix) @ flat, atol=1e-12)


def test_a_route_of_several_producers_with_operations_between():
    """A concatenation of a parameter, an operation's output and data, read by a product."""
    x = jnp.ones((2, 3))

    def loss(p):
        h = jax.nn.relu(x @ p["w"])
        joined = jnp.concatenate([h, p["c"][None].repeat(2, 0), x], 1)[:, ::-1]
        return pjax.squared_error(joined @ p["v"], jnp.zeros((2, 2)))

    params = {"w": jnp.ones((3, 4)), "c": jnp.ones(2), "v": jnp.ones((9, 2))}
    program, leaves, consts, _ = trace(loss, params)
    graph = build_graph(program)
    dots = [n for n in graph.nodes if n.name == "dot"]
    slot = graph.slots[dots[1].slots[0]]
    assert sorted(graph.nodes[p].name for p in slot.producers) == ["['c']", "relu"]
    matrix = compiled(lambda *i: dense(slot, program.evaluate(*i)))(leaves, consts)
    assert matrix.shape == (18, 8 + 2)
    assert matrix.sum() == 2 * 4 + 2 * 2
    assert slot.kind == "activation"


def test_indices_inside_an_outer_jit():
    """The structure of a route may be a tracer of an outer `jit`."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=A), jnp.float32)

    @jax.jit
    def pulled(indices, there):
        def loss(p):
            return pjax.squared_error(p[indices], jnp.zeros((3, 6)))

        program, leaves, consts, _ = trace(loss, a)
        graph = build_graph(program)
        values = program.evaluate(leaves, consts)
        return graph.slots[0].route.pull(there, values)[0]

    there = jnp.arange(18.0).reshape(3, 6)
    expected = jnp.zeros(A).at[jnp.array([2, 2, 0])].add(there)
    np.testing.assert_allclose(pulled(jnp.array([2, 2, 0]), there), expected)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p: jnp.cumprod(p["a"], 1),
        lambda p: p["a"].at[0].add(1.0),
        lambda p: jax.lax.reduce_precision(p["a"], 5, 10),  # deviations would underflow
    ],
)
def test_what_is_no_wiring(fn):
    program = trace(lambda p: pjax.squared_error(fn(p), jnp.zeros(A)), {"a": jnp.ones(A)})[0]
    assert not all(is_wiring(program, e) for e in program.equations if e.name != "squared_error")


def test_what_has_no_rule_is_refused():
    def fn(p):  # deviations would underflow
        return pjax.squared_error(jax.lax.reduce_precision(p["a"], 5, 10), jnp.zeros(A))

    with pytest.raises(TraceError, match="no projection for the operation `reduce_precision`"):
        build_graph(trace(fn, {"a": jnp.ones(A)})[0])
