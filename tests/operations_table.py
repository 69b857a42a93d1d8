"""Writes docs/operations.md: `python tests/operations_table.py`.

For each primitive that the forward pass of a layer in `catalogue.py` needs, the rules that handle
it, as the graphs of both splittings have them; for each layer, the ways in which it was tried.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import catalogue
import equinox
import flax
import jax
import jax.numpy as jnp
import numpy as np
import public_operations
from catalogue import Case

import pjax
from pjax.backend import compat
from pjax.graph import Graph, Node, build_graph
from pjax.program import SMOOTH, Program, is_wiring
from pjax.rules import Rule
from pjax.trace import trace

PAGE = Path(__file__).parent.parent / "docs" / "operations.md"
SPLITTINGS = ("layer", "neuron")

#: What stands for an operation that is expressed by others while a function is traced.
REWRITTEN = {
    "scan": "unrolled",
    "while": "unrolled",
    "cond": "the branch that the program fixes, or a choice between all",
    "clamp": "`max` and `min`",
    "psum": "`reduce_sum`",
    "reduce_window_sum": "windows by wiring, `reduce_sum`",
    "reduce_window": "windows by wiring, a reduction",
    "reduce_window_max": "windows by wiring, `reduce_max`",
    "reduce_window_min": "windows by wiring, `reduce_min`",
    "cumsum": "a product with a triangle of ones",
    "sort": "wiring in the order of the forward pass",
    "top_k": "wiring in the order of the forward pass",
}


#: What handles the operations of each group in `public_operations`.
OTHERS = {
    "scatters": (
        "Sums over segments, and `x.at[i]`",
        "Indices are constants or data. A sum is one exact constraint (`ScatterAdd`); what is "
        "written over others is wiring; a maximum is the mean of all that are as large, and "
        "which ones these are rests. A product over a segment has a rule where its factors "
        "are data or `unique_indices=True`.",
    ),
    "math": (
        "Powers, running products, special functions",
        "Each one function of its operands, linearised numerically (`ScalarFunction`, "
        "`ArrayFunction`); a running sum is a product with a triangle of ones. `floor` and "
        "`ceil` rest, so that `x - floor(x)` moves as `x` does.",
    ),
    "masks": (
        "Masks made of activations",
        "A comparison is part of the piecewise linear function of a value (`relu` as `x * (x "
        "> 0)`), a threshold that training moves values over (a spike, in whatever type), or "
        "else it rests, like any condition, count or index, as it does for the gradient. A "
        "parameter that nothing else reads is named in a warning.",
    ),
    "linear": (
        "Linear algebra",
        "Decompositions and solutions are functions of whole matrices, linearised "
        "numerically, each of a batch by itself. What is no number of them (a permutation) "
        "rests.",
    ),
    "complex": (
        "Complex values between real parameters and a real loss",
        "Pairs of real numbers: sums and wiring by parts, products as sums of real products, "
        "other functions (a Fourier transform, `exp`, `abs`) as one function of both parts.",
    ),
    "flow": (
        "Control flow",
        "Of a `cond` or `switch` whose predicate is data or depends on parameters all "
        "branches are computed, and it chooses; a `while_loop` is unrolled where the program "
        "fixes its length.",
    ),
}


class Network(NamedTuple):
    """A case as a function of parameters: `shift`, added to the input, and those of the layer."""

    params: Any
    outputs: Any
    loss: Any


def network(case: Case) -> Network:
    """The layer with a squared error on all its outputs."""
    layer, forward, x = case.make()
    params = {"layer": layer}
    moves = np.issubdtype(x.dtype, np.floating)
    if moves:
        params["shift"] = jnp.asarray(0.01 * np.cos(np.arange(x.size)).reshape(x.shape), x.dtype)

    def outputs(params: Any) -> list[Any]:
        found = forward(params["layer"], x + params["shift"] if moves else x)
        return [leaf for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def loss(params: Any) -> Any:
        total = 0.0
        for out in outputs(params):
            target = jnp.asarray(np.cos(1.0 + np.arange(out.size)), out.dtype)
            total = total + pjax.squared_error(out.reshape(-1), target)
        return total

    return Network(params, outputs, loss)


class Found(NamedTuple):
    """What the trace of a case shows: the primitives needed, what handles each, all rules."""

    primitives: frozenset[str]
    handlers: Mapping[str, Mapping[str, frozenset[str]]]
    rules: frozenset[Rule]


@functools.cache
def find(case: Case) -> Found:
    """Traces a case and builds its graphs.

    **Raises:** `pjax.TraceError` for an operation without a rule.
    """
    params, outputs, loss = network(case)
    needed = frozenset(_needed(jax.make_jaxpr(outputs)(params).jaxpr))
    program, *_ = trace(loss, params)
    handlers: dict[str, dict[str, frozenset[str]]] = {}
    rules: set[Rule] = set()
    for splitting in SPLITTINGS:
        found: dict[str, set[str]] = {}
        graph = build_graph(program, splitting)
        rules.update(node.rule for node in graph.nodes if node.kind == "operation" and node.rule)
        for name, handler in _handlers(graph):
            found.setdefault(name, set()).add(handler)
        for name in found:
            handlers.setdefault(name, {})[splitting] = frozenset(found[name])
    return Found(needed, handlers, frozenset(rules))


def _needed(jaxpr: Any) -> Iterator[str]:
    """The names of the primitives that the outputs of a jaxpr need, those in calls included."""
    live = {var for var in jaxpr.outvars if not isinstance(var, compat.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if live.isdisjoint(eqn.outvars):
            continue
        live.update(var for var in eqn.invars if not isinstance(var, compat.Literal))
        body = compat.call_body(eqn.primitive, eqn.params)
        if body is not None:
            yield from _needed(body[0])
            continue
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                # Not the reducers of windows and scatters, which are never looked at.
                is_body = isinstance(inner, (compat.ClosedJaxpr, compat.Jaxpr))
                if is_body and eqn.primitive.name in ("scan", "cond", "while"):
                    yield from _needed(compat.open_jaxpr(inner)[0])


def _handlers(graph: Graph) -> Iterator[tuple[str, str]]:
    """Pairs of a primitive's name and what handles an equation with it."""
    program = graph.program
    definitions = {out: e for e in program.equations for out in e.outputs}
    moving = _moving(program)
    for equation in program.equations:
        if moving.isdisjoint(equation.outputs):
            yield equation.name, "data"
    for slot in graph.slots:
        for equation in slot.route.equations:
            yield equation.name, "wiring"
    for node in graph.nodes:
        if node.kind != "operation":
            continue
        assert node.rule is not None
        rule = f"{type(node.rule).__name__} ({node.rule.exactness})"
        for equation in _inside(program, graph, node, definitions):
            # What an addend of a layer broadcasts.
            wired = is_wiring(program, equation) and type(node.rule).__name__ == "LayerSum"
            yield equation.name, "wiring" if wired else rule


def _moving(program: Program) -> set[int]:
    """The variables that the result follows; not those behind a `stop_gradient`."""
    moving = {atom for atom in program.outputs if isinstance(atom, int)}
    for equation in reversed(program.equations):
        if any(out in moving and program.is_variable(out) for out in equation.outputs):
            moving.update(a for a in equation.inputs if isinstance(a, int))
    return {var for var in moving if program.is_variable(var)}


def _inside(program: Program, graph: Graph, node: Node, definitions: Any) -> list[Any]:
    """The equations of parameters between a node's slots and its output."""
    ends = {graph.slots[i].variable for i in node.slots}
    # A layer's addend reads what is broadcast before the wire.
    pending, seen = [node.output], set()
    found = []
    while pending:
        var = pending.pop()
        if var in seen or var not in definitions or (var in ends and var != node.output):
            continue
        seen.add(var)
        equation = definitions[var]
        found.append(equation)
        pending += [a for a in equation.inputs if program.is_variable(a)]
    return found


def handled(cases: list[Case]) -> dict[str, dict[str, frozenset[str]]]:
    """For each primitive that the cases need and each splitting, what handles it."""
    table: dict[str, dict[str, frozenset[str]]] = {}
    for case in cases:
        found = find(case)
        for name in found.primitives:
            row = table.setdefault(name, dict.fromkeys(SPLITTINGS, frozenset()))
            for splitting in SPLITTINGS:
                row[splitting] |= found.handlers.get(name, {}).get(splitting, frozenset())
    for name, text in REWRITTEN.items():
        if name in table:
            for splitting in SPLITTINGS:
                table[name][splitting] |= {text}
    return dict(sorted(table.items()))


def _summary(rule: Rule) -> str:
    """The first sentence of what a rule says of itself."""
    paragraph = " ".join((type(rule).__doc__ or "").split("\n\n")[0].split())
    return paragraph.replace("|", "\\|").rstrip(".")


def versions() -> str:
    """The versions that a page was written with."""
    return f"JAX {jax.__version__}, Flax {flax.__version__}, Equinox {equinox.__version__}"


def page() -> str:
    """The page, for the installed versions."""
    lines = [
        "# Operations and layers",
        "",
        "Written by `python tests/operations_table.py`, and compared with the installed",
        f"libraries by `tests/test_catalogue.py`. Versions: {versions()}.",
        "",
        "## Primitives",
        "",
        "Every primitive of `jax.lax` that a forward pass of these layers needs, and what handles",
        "it in each splitting. *Exact* rules give the nearest point, *inexact* ones decrease the",
        "distance and are stationary when converged. *Wiring* carries no constraint: it says which",
        "entry of a node reads which value. *Data* does not follow the parameters in a solve.",
        "Calls (`jit`, `custom_jvp_call`, `remat`, …) are traced as if their body stood there.",
        "Factors that are functions of one value stand together, a quotient is the product with a",
        "reciprocal, and a choice such as that of `PReLU` is a sum of choices by one value.",
        "",
        "| primitive | `layer` | `neuron` |",
        "| --- | --- | --- |",
    ]
    table = handled(catalogue.CASES)
    for name, row in table.items():
        cells = [", ".join(sorted(row[splitting])) for splitting in SPLITTINGS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    further = sorted({primitive.name for primitive in SMOOTH} - set(table))
    lines += [
        "",
        "Functions of numbers that no layer needs have a numeric projection, as `tanh` has: "
        f"{', '.join(f'`{name}`' for name in further)}.",
        "",
        "`pjax.explain(loss_fn, params, x, y)` says which rule each operation of a function has.",
    ]
    lines += ["", "## Rules", "", "| rule | class | constraint |", "| --- | --- | --- |"]
    rules = {rule for case in catalogue.CASES for rule in find(case).rules}
    for rule in sorted({(type(r).__name__, r.exactness, _summary(r)) for r in rules}):
        lines.append(f"| {' | '.join(rule)} |")
    lines += _others()
    for library, title in ((catalogue.FLAX, "Flax NNX"), (catalogue.EQUINOX, "Equinox")):
        tried: dict[str, list[str]] = {}
        for case in catalogue.CASES:
            if case.library == library:
                tried.setdefault(case.layer, []).append(case.variant)
        refused = catalogue.NOT_SUPPORTED[library]
        lines += [
            "",
            f"## {title}",
            "",
            f"{len(tried)} layers and functions are supported, {len(refused)} are not. Each is",
            "tried with an input that moves, and its displacement in the stiff limit is compared",
            "with the gradient.",
            "",
            "| layer | supported | tried |",
            "| --- | --- | --- |",
        ]
        for layer in sorted([*tried, *refused], key=str.lower):
            if layer in refused:
                lines.append(f"| `{layer}` | no: {refused[layer]} | |")
            else:
                variants = ", ".join(variant or "plain" for variant in tried[layer])
                lines.append(f"| `{layer}` | yes | {variants} |")
        rest = ", ".join(
            f"`{name}` ({why})" for name, why in sorted(catalogue.NO_FORWARD_PASS[library].items())
        )
        lines += ["", f"Without a forward pass of numbers that parameters reach: {rest}."]
    return "\n".join(lines) + "\n"


def _others() -> list[str]:
    """What handles operations that no layer of these libraries needs."""
    lines = [
        "",
        "## Other operations",
        "",
        "Each way of use is tried between a layer and a loss by `tests/test_operations.py`: in the",
        "stiff limit its displacement is the gradient, and pure projection lowers the loss.",
    ]
    for group, (title, text) in OTHERS.items():
        tried = ", ".join(public_operations.GROUPS[group])
        lines += ["", f"### {title}", "", text, "", f"Tried: {tried}."]
    lines += [
        "",
        "### Losses",
        "",
        f"Tried: {', '.join(public_operations.LOSSES)}.",
        "",
        "### What is refused",
        "",
    ]
    lines += [
        "An operation without a rule is an error that names it and its line.",
        '`pjax.register_projection` gives it one, and `fallback="gauss-newton"` linearises it.',
        "Refused in any case: loops whose length data decide, `x.at[i].apply(f)`, products over",
        "segments of values that move, and operations with complex results that are not listed",
        "above, such as `jnp.linalg.eig`.",
    ]
    return lines


if __name__ == "__main__":
    PAGE.write_text(page())
