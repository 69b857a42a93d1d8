"""From a function to a problem, for a look at its constraints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PyTree

from pjax.metrics import Metric
from pjax.metrics.defaults import default_metric
from pjax.options import Fallback, Fanout, Grouping, Splitting
from pjax.problem.find_layout import layout
from pjax.problem.problem import Problem
from pjax.trace import require_function, trace


def feasibility_problem(
    fn: Callable[..., Any],
    params: PyTree[Array],
    *args: Any,
    metric: Metric | None = None,
    fanout: Fanout = "exact",
    splitting: Splitting = "neuron",
    grouping: Grouping = "colours",
    reflecting: bool = False,
    fallback: Fallback | None = None,
) -> Problem:
    """Find edge values that satisfy every operation, every loss and every parameter of
    `fn(params, *args)`.

    **Arguments:**

    - `fn`: a JAX function that ends in a loss, or in means and weighted sums of losses.
    - `params`: the pytree of parameters; `args` are data, like anything that `fn` closes over.
    - `metric`: the weights of the distances. By default [`pjax.metrics.Uniform`][] for `"neuron"`
        splitting and [`pjax.metrics.Spectral`][] for `"layer"`.
    - `fanout`: `"exact"`: a node weighs its readers as the nearest point demands; `"paper"`: as
        if it had one reader, whatever their number.
    - `splitting`: `"neuron"`: one constraint per scalar product; `"layer"`: one per array
        operation, without copies.
    - `grouping`: `"colours"` (two groups, identities inserted) or `"levels"` (reverse topological).
    - `reflecting`: store copies in the form that reflecting algorithms need.
    - `fallback`: `"gauss-newton"` allows operations without a rule: each gets a numeric projection
        that linearises the operation itself. None: they are an error.

    **Returns:** a [`Problem`][].

    **Raises:** [`pjax.TraceError`][] if `fn` cannot become a graph, naming the operation and its
    source line.
    """
    require_function(fn, "fn")
    program, leaves, consts, _ = trace(lambda p: fn(p, *args), params)
    found = layout(
        program,
        metric=default_metric(splitting) if metric is None else metric,
        fanout=fanout,
        splitting=splitting,
        grouping=grouping,
        reflecting=reflecting,
        fallback=fallback,
    )
    return Problem(found, leaves, consts)
