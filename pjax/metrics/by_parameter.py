"""Settings for parameters by their paths, and their checks."""

from __future__ import annotations

import math
from typing import Any

import jax

from pjax.graph import Graph

#: `(path, value)` for each leaf of a prefix of the parameter pytree.
ByPath = tuple[tuple[str, Any], ...]


def by_path(name: str, given: Any, check: Any) -> ByPath:
    """A number, or a pytree prefix of numbers, as pairs of a path and a number."""
    if isinstance(given, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in given
    ):
        return given  # made before: `dataclasses.replace` hands it over
    leaves, _ = jax.tree_util.tree_flatten_with_path(given)
    pairs = tuple((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    for path, value in pairs:
        check(name + path, value)
    return pairs


def check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def check_stiffness(name: str, value: Any) -> None:
    if value == "stiff":
        return
    if not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f'`{name}` must be "stiff" or a positive finite number, got {value!r}.')


def check_iterations(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number, at least 1, got {value!r}.")


def by_parameter(name: str, pairs: ByPath, graph: Graph) -> list[tuple[Any, ...]]:
    """For each slot the values of the parameters that it depends on; `()` for an activation.

    **Raises:** `ValueError` for a path that is no prefix of a parameter's, and for a parameter that
    none is a prefix of.
    """
    leaves = graph.program.leaves
    for path, _ in pairs:
        if not any(_is_prefix(path, leaf.path) for leaf in leaves):
            known = ", ".join(f"`{leaf.path}`" for leaf in leaves[:8])
            raise ValueError(
                f"`{name}{path}` names no parameter: the parameters are {known}"
                f"{', …' if len(leaves) > 8 else ''}."
            )
    value_of: dict[int, Any] = {}
    for node in graph.parameters:
        assert node.output is not None
        path = leaves[node.output].path
        given = [value for prefix, value in pairs if _is_prefix(prefix, path)]
        if not given:
            raise ValueError(
                f"`{name}` has no entry for the parameter `{path}`: give a number for all, or a "
                "prefix of the parameter pytree that covers each."
            )
        value_of[node.index] = (given[0],)
    below: dict[int, tuple[Any, ...]] = dict(value_of)

    def values(node: int) -> tuple[Any, ...]:
        if node not in below:
            found = [v for i in graph.nodes[node].slots for p in graph.slots[i].producers
                     for v in values(p)]  # fmt: skip
            below[node] = tuple(dict.fromkeys(found))
        return below[node]

    return [
        tuple(dict.fromkeys(v for p in slot.producers for v in values(p)))
        if slot.kind == "weight"
        else ()
        for slot in graph.slots
    ]


def _is_prefix(prefix: str, path: str) -> bool:
    # Paths are made of `['key']`, `[0]` and `.name`: a prefix ends where one of these begins.
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "[", ".")
