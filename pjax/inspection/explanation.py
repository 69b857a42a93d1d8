"""What pjax makes of a function, before anything is trained: nodes, moves of parameters, warnings.

```python
print(pjax.explain(loss_fn, params, x, y))
```
"""

from __future__ import annotations

import html
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pjax.backend import device
from pjax.graph import Graph, Node, bipartite, honoured, latent_nodes, unused
from pjax.options import Exactness, Splitting
from pjax.patterns import Computed
from pjax.problem import Formulation, Layout, make_layout, sizes
from pjax.program import Program, live, run
from pjax.projections.products.operation import Bilinear
from pjax.rules import Addend, LayerSum
from pjax.trace import require_function, trace
from pjax.training import find_units, readers

#: The class of a node's projection; *fallback*: of an operation without a rule.
Class = Exactness | Literal["fallback"]
#: How a parameter is moved: see `pjax.training.readers`; *threshold*: by what a `sign` or a
#: quantizer makes of it; *consensus*: in neuron splitting, by the mean of its copies.
Move = readers.Kind | Literal["threshold", "consensus"]
#: Why a parameter that could move does not.
_UNUSED = "the loss does not use it"
_RESTING = "it is only compared, an index, or behind a stop_gradient"


class NodeLine(NamedTuple):
    """One node of the graph, or several that differ in their parameters alone.

    **Attributes:**

    - `source`: the user's line, `file:line (function)`.
    - `operation`: what the node computes.
    - `rule`: the name of its rule, see [Operations](../operations.md).
    - `exactness`: `"exact"`, `"inexact"`, `"relaxed"` or `"fallback"`.
    - `parameters`: the parameters that it reads.
    - `inputs`, `output`: the shapes of its operands that move, and of what it makes; None for a
        loss.
    - `colour`: its set in alternating projections, `"A"` or `"B"`, or `"A B"`.
    - `bytes`: its share of the bytes of a state.
    - `work`: its share of the multiplications and additions of a forward pass and a sweep back: of
        a product one for its value and one for each operand that moves, of others the entries.
    - `nodes`: the indices of its nodes in the graph.
    """

    source: str
    operation: str
    rule: str
    exactness: Class
    parameters: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...] | None
    colour: str
    bytes: float
    work: float
    nodes: tuple[int, ...]


class ParameterLine(NamedTuple):
    """One parameter.

    **Attributes:**

    - `name`: its path in the pytree.
    - `shape`, `dtype`: of the array.
    - `moves`: how it is moved; empty if it is not.
    - `readers`: how many nodes read it.
    - `matrix`: of a product, rows × columns, behind the number of blocks if it is batched.
    - `reason`: why it does not move, else empty.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    moves: tuple[Move, ...]
    readers: int
    matrix: tuple[int, ...]
    reason: str


class DataLine(NamedTuple):
    """An array that rests: an argument after the parameters, or one that the function closes over.

    **Attributes:**

    - `name`: of the argument; empty for a captured array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What [`pjax.explain`][] found; its text is a table of it.

    **Attributes:**

    - `splitting`: `"layer"` or `"neuron"`.
    - `nodes`, `parameters`, `data`: their lines.
    - `identities`: how many identity nodes the two colours need.
    - `warnings`: what may not be meant, in words.
    """

    splitting: Splitting
    nodes: tuple[NodeLine, ...]
    parameters: tuple[ParameterLine, ...]
    data: tuple[DataLine, ...]
    identities: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        parts = [self._title()]
        for heading, rows in self._tables():
            parts.append("\n".join(_aligned([heading, *rows])))
        parts += [f"Warning: {warning}" for warning in self.warnings] or ["No warnings."]
        return "\n\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        parts = [f"<p>{html.escape(self._title())}</p>"]
        for heading, rows in self._tables():
            body = "".join(row(cells, "td") for cells in rows)
            parts.append(f"<table>{row(heading, 'th')}{body}</table>")
        parts += [f"<p><b>Warning:</b> {html.escape(warning)}</p>" for warning in self.warnings]
        return "\n".join(parts)

    def _title(self) -> str:
        count = sum(len(line.nodes) for line in self.nodes)
        moving = [p for p in self.parameters if p.moves]
        numbers = sum(math.prod(p.shape) for p in moving)
        return (
            f"{count} nodes in {self.splitting} splitting; {len(moving)} of "
            f"{len(self.parameters)} parameters move ({numbers:,} numbers); {self.identities} "
            "identities between the colours"
        )

    def _tables(self) -> list[tuple[Sequence[str], list[Sequence[str]]]]:
        nodes = [
            (
                _place(line.source),
                line.operation + (f" ×{len(line.nodes)}" if len(line.nodes) > 1 else ""),
                line.rule,
                line.exactness,
                ", ".join(_together(line.parameters)),
                f"{', '.join(map(_shape, line.inputs))} → {_shape(line.output)}",
                line.colour,
                f"{line.bytes:.1%}",
                f"{line.work:.1%}",
            )
            for line in self.nodes
        ]
        parameters: dict[Any, list[str]] = {}
        for line in self.parameters:
            parameters.setdefault((re.sub(r"\d+", "*", line.name), line[1:]), []).append(line.name)
        rows = [
            (
                ", ".join(_together(names)) + (f" ×{len(names)}" if len(names) > 1 else ""),
                _shape(shape),
                dtype,
                f"none: {reason}" if reason else _move(moves, matrix),
                str(count),
            )
            for (_, (shape, dtype, moves, count, matrix, reason)), names in parameters.items()
        ]
        tables: list[tuple[Sequence[str], list[Sequence[str]]]] = [
            (
                ("line", "operation", "rule", "class", "parameters", "shapes", "set", "bytes",
                 "work"),
                [*nodes],
            ),
            (("parameter", "shape", "type", "move", "readers"), [*rows]),
        ]  # fmt: skip
        if self.data:
            found: dict[DataLine, int] = {}
            for line in self.data:
                found[line] = found.get(line, 0) + 1
            rest = [
                (
                    (line.name or "(captured)") + (f" ×{count}" if count > 1 else ""),
                    _shape(line.shape),
                    line.dtype,
                )
                for line, count in found.items()
            ]
            tables.append((("data", "shape", "type"), [*rest]))
        return tables


def explain(
    fn: Callable[..., Any],
    params: PyTree[Array],
    *args: Any,
    splitting: Splitting = "layer",
    has_aux: bool = False,
    **kwargs: Any,
) -> Explanation:
    """What becomes of `fn(params, *args, **kwargs)`: its nodes with their rules, how each parameter
    is moved, what is data, and what may not be meant. Nothing is solved or trained.

    ```python
    print(pjax.explain(loss_fn, params, x, y))
    ```

    An operation without a rule does not end it: its node has the class `"fallback"`, and a warning
    says what it needs.

    **Arguments:**

    - `fn`, `params`, `args`, `kwargs`: as for [`pjax.value_and_displacement`][].
    - `splitting`: `"layer"`, of displacements and `pjax.optim.Projection`, or `"neuron"`, of the
        paper's optimisers.
    - `has_aux`: `fn` returns `(loss, aux)`.

    **Returns:** an [`Explanation`][pjax.inspection.explanation.Explanation]; printed it is tables.

    **Raises:** [`pjax.TraceError`][] if `fn` does not end in a loss, or has an operation that no
    numeric projection can stand for.
    """
    require_function(fn, "fn")
    # NumPy arrays become arrays first, so that they are known again among the captured ones.
    args, kwargs = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) and x.ndim else x, (args, kwargs)
    )
    program, _, consts, _ = trace(lambda p: fn(p, *args, **kwargs), params, has_aux)
    formulation = Formulation(splitting=splitting, grouping="levels", fallback="gauss-newton")
    layout = make_layout(program, formulation)
    graph = layout.graph
    coloured = bipartite(graph)
    rows = _parameter_lines(graph, splitting)
    return Explanation(
        splitting=splitting,
        nodes=_node_lines(layout, coloured),
        parameters=rows,
        data=_data_lines(program, consts, _named(fn, args, kwargs)),
        identities=len(coloured.nodes) - len(graph.nodes),
        warnings=tuple(_warnings(graph, rows, consts)),
    )


def _node_lines(layout: Layout, coloured: Graph) -> tuple[NodeLine, ...]:
    graph, found = layout.graph, sizes(layout)
    work = {node.index: _work(graph, node) for node in graph.nodes if node.kind != "parameter"}
    total, bytes_ = max(sum(work.values()), 1), max(found.bytes, 1)
    merged: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.kind != "parameter":
            merged.setdefault((node.source, *_described(graph, node)), []).append(node)
    return tuple(
        NodeLine(
            source,
            operation,
            rule,
            exactness,
            tuple(dict.fromkeys(name for node in nodes for name in _parameters(graph, node))),
            inputs,
            output,
            " ".join(sorted({coloured.nodes[node.index].colour for node in nodes})),
            sum(found.nodes[node.index].bytes for node in nodes) / bytes_,
            sum(work[node.index] for node in nodes) / total,
            tuple(node.index for node in nodes),
        )
        for (source, operation, rule, exactness, inputs, output), nodes in merged.items()
    )


def _described(graph: Graph, node: Node) -> tuple[Any, ...]:
    return (
        node.name,
        type(node.rule).__name__,
        "fallback" if node.fallback else node.rule.exactness,
        tuple(graph.slots[i].shape for i in node.slots),
        None if node.kind == "loss" else graph.program.shape(_output(node)),
    )


def _output(node: Node) -> int:
    assert node.output is not None
    return node.output


def _parameters(graph: Graph, node: Node) -> list[str]:
    producers = [p for i in node.slots for p in graph.slots[i].producers]
    return [graph.nodes[p].name for p in producers if graph.nodes[p].kind == "parameter"]


def _work(graph: Graph, node: Node) -> int:
    """Multiplications and additions of a forward pass and a sweep back through a node."""
    program = graph.program
    shapes = [graph.slots[i].shape for i in node.slots]
    size = sum(map(math.prod, shapes))
    if node.kind != "loss":
        size += math.prod(program.shape(_output(node)))
    operation = getattr(node.rule, "operation", None)
    if isinstance(operation, Bilinear):
        return size + _products(operation) * (1 + len(shapes))
    if isinstance(node.rule, LayerSum):
        terms = [term for term in node.rule.terms if not isinstance(term, Addend)]
        size += sum(_products(t.operation) * (1 + t.left + t.right) for t in terms)
    return size


def _products(operation: Bilinear) -> int:
    return 2 * math.prod(operation.output_shape) * operation.slice_length


def _parameter_lines(graph: Graph, splitting: Splitting) -> tuple[ParameterLine, ...]:
    found: dict[int, tuple[tuple[Move, ...], tuple[int, ...]]] = {}
    read = graph.readers()
    nodes = {_output(node): node.index for node in graph.parameters}
    if splitting == "neuron":
        found = dict.fromkeys(nodes.values(), (("consensus",), ()))
    else:
        # What a threshold makes of parameters is solved for, and moves them.
        latent = latent_nodes(graph)
        for index in nodes.values():
            if any(graph.slots[i].node in latent for i in read[index]):
                found[index] = ("threshold",), ()
        for unit in find_units(graph).units:
            if unit.latent:
                continue
            moves: tuple[Move, ...] = tuple(dict.fromkeys(r.kind for r in unit.readers))
            matrix = unit.matrix
            form = () if matrix is None else (*matrix.blocks, matrix.rows, matrix.columns)
            also, _ = found.get(unit.node, ((), ()))
            found[unit.node] = (*moves, *also), form
    lines = []
    missing = {leaf.path: decides for leaf, decides in unused(graph)}
    for number, leaf in enumerate(graph.program.leaves):
        index = nodes.get(number, -1)
        moves, matrix = found.get(index, ((), ()))
        reason = ""
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            reason = "no floating-point array, so data"
        elif not leaf.trainable:
            reason = "no entries"
        elif leaf.path in missing:
            reason = _RESTING if missing[leaf.path] else _UNUSED
        elif not moves:
            reason = _RESTING
        name = leaf.path or "params"
        count = len(read.get(index, ()))
        lines.append(ParameterLine(name, leaf.shape, str(leaf.dtype), moves, count, matrix, reason))
    return tuple(lines)


def _named(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[int, str]:
    """The name of each array among the arguments, by its identity."""
    try:
        kinds = inspect.signature(fn).parameters.values()
        names = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    except (TypeError, ValueError):
        names = []
    names = [names[n] if n < len(names) else f"args[{n - 1}]" for n in range(1, len(args) + 1)]
    given = {**dict(zip(names, args, strict=True)), **kwargs}
    return {
        id(leaf): name + jax.tree_util.keystr(path)
        for name, arg in given.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(arg)[0]
    }


def _data_lines(
    program: Program, consts: Sequence[Any], names: Mapping[int, str]
) -> tuple[DataLine, ...]:
    return tuple(
        DataLine(names.get(id(const), ""), tuple(np.shape(const)), str(const.dtype))
        for const in consts
    )


def _warnings(
    graph: Graph, parameters: Sequence[ParameterLine], consts: Sequence[Any]
) -> Iterable[str]:
    resting = [p for p in parameters if p.reason in (_UNUSED, _RESTING)]
    for reason in dict.fromkeys(p.reason for p in resting):
        names = _together([p.name for p in resting if p.reason == reason])
        yield f"No move for {', '.join(names)}: {reason}."
    yield from map(honoured, graph.program.custom_rules)
    for node in graph.nodes:
        if node.fallback:
            yield (
                f"`{node.name}` ({node.source}) has no rule: give "
                '`fallback="gauss-newton"`, or register one with `pjax.register_projection`.'
            )
    for node in _silent(graph, consts):
        yield (
            f"The loss `{node.name}` ({node.source}) counts 0 in the result: it asks for nothing."
        )


def _silent(graph: Graph, consts: Sequence[Any]) -> list[Node]:
    """The losses of which every row counts 0, by their coefficients and the data; no constraint.

    What the network computes is not evaluated: any number stands for it.
    """
    program = graph.program
    wanted = [term.coefficient for term in graph.terms if type(term.coefficient) is int]
    data = dict(enumerate(consts, len(program.leaves)))
    computed = set(range(len(program.leaves)))
    needed = []
    for equation in live(program.equations, wanted):
        if computed.isdisjoint(equation.inputs) or isinstance(equation.primitive, Computed):
            needed.append(equation)
        else:
            computed.update(equation.outputs)
    read = {a for e in needed for a in e.inputs if isinstance(a, int)}

    def evaluate(data: Mapping[int, Any]) -> list[Any]:
        values = {a: _any_number(program, a) for a in read & computed} | dict(data)
        run(needed, values)
        return [values[number] for number in wanted]

    found = iter(
        device.run_once(evaluate, {a: x for a, x in data.items() if a in read}) if wanted else []
    )
    counts = [next(found) if type(t.coefficient) is int else t.coefficient for t in graph.terms]
    losses = zip(graph.losses, counts, strict=True)
    return [n for n, c in losses if c is not None and not np.any(np.asarray(c))]


def _any_number(program: Program, atom: int) -> Any:
    dtype = program.dtype(atom)
    number = 0.37 if jnp.issubdtype(dtype, jnp.floating) else 1
    return jnp.full(program.shape(atom), number, dtype)


# Text.


def label(name: str) -> str:
    """A node's or parameter's name as a person writes it: `['dense1.weight']` is `dense1.weight`.

    `['blocks'][0]['scale'].value` is `blocks.0.scale`.
    """
    parts = re.findall(r"[^\[\]'\"]+", name.removesuffix(".value"))
    return ".".join(part.strip(".") for part in parts) or name


def _together(names: Sequence[str]) -> list[str]:
    """Names as a person writes them; those that differ in numbers alone are one: `w.0…3`."""
    groups: dict[str, list[list[int]]] = {}
    for name in map(label, names):
        numbers = [int(n) for n in re.findall(r"\d+", name)]
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(numbers)
    found = []
    for pattern, rows in groups.items():
        parts = pattern.split("#")
        text = parts[0]
        for part, column in zip(parts[1:], zip(*rows, strict=True), strict=True):
            low, high = min(column), max(column)
            text += (f"{low}" if low == high else f"{low}…{high}") + part
        found.append(text)
    return found


def _place(source: str) -> str:
    """`file:line` without folders."""
    return os.path.basename(source.split(" (")[0]) or "–"


def _shape(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "loss"
    return "×".join(map(str, shape)) or "number"


def _move(moves: Sequence[Move], matrix: tuple[int, ...]) -> str:
    text = ", ".join(moves)
    return f"{text} {_shape(matrix)}" if matrix else text


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("─" * width for width in widths), *lines[1:]]
