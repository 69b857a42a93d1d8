"""Programs in which the same equations repeat become loops: compile time that does not grow with
depth or length.

The steps of a recurrent network and equal layers in a row give the same equations again and again,
in the forward pass, in the weights and in the projections. [`rolled`][] traces a function, finds
such repeats in its jaxpr, and evaluates each as one `jax.lax.scan` over the stacked operands. It
computes what the function computes, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pjax.backend import compat, device
from pjax.compile.loops import Part, Values, evaluate_equations
from pjax.compile.repeats import Run, find_runs, is_chain, live_equations, unchained

#: Programs of fewer equations stay as they are: they compile within seconds, and each step of a
#: loop copies what it reads of stacked arrays.
MIN_EQUATIONS = 8_000
#: A run is rolled from so many repeats on; where each block reads the one before, if that saves so
#: many equations.
MIN_REPEATS = 24
#: Blocks side by side pay sooner where kernels are launched: so many equations and repeats.
MIN_LAUNCHES = 2_000
MIN_REPEATS_LAUNCHED = 8


def rolled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with equations that repeat as loops.

    **Arguments:**

    - `function`: from pytrees of arrays to a pytree of arrays; traced once for each call.
    """

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten(args)

        def flat(*leaves: Any) -> Any:
            return function(*jax.tree_util.tree_unflatten(tree, leaves))

        compiled = jax.jit(flat)
        traced = compiled.trace(*leaves)
        jaxpr, consts = compat.open_jaxpr(traced.jaxpr)
        equations = live_equations(jaxpr)
        runs = find_runs(equations, MIN_REPEATS) if len(equations) >= MIN_EQUATIONS else []
        if not runs:
            return compiled(*leaves)  # as it is, without a second trace
        if len(jaxpr.invars) > len(leaves):  # values that `function` closes over
            jaxpr, consts = compat.open_jaxpr(jax.make_jaxpr(flat)(*leaves))
            runs = find_runs(live_equations(jaxpr), MIN_REPEATS)
        values = Values(dict(zip(jaxpr.constvars, consts, strict=True)), MIN_REPEATS)
        values.known.update(zip(jaxpr.invars, leaves, strict=True))
        evaluate_equations(jaxpr, runs, values)
        outputs = [values.read(atom) for atom in jaxpr.outvars]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(traced.out_info), outputs)

    return run


def rolled_scan(step: Callable[[Any], tuple[Any, Any]], state: Any, length: int) -> tuple[Any, Any]:
    """`jax.lax.scan` of a step, with equations that repeat in it as loops.

    What the blocks of a run hand on to the next step stays in one array from step to step: blocks
    side by side then cost a few operations, however many they are.

    **Arguments:**

    - `step`: from a state to `(state, row)`; traced once.
    - `state`: a pytree of arrays.
    - `length`: how many steps.

    **Returns:** the last state, and the rows.
    """
    leaves, tree = jax.tree_util.tree_flatten(state)

    def flat(*leaves: Any) -> tuple[list[Any], Any]:
        new, row = step(jax.tree_util.tree_unflatten(tree, leaves))
        return jax.tree_util.tree_leaves(new), row

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    jaxpr, consts = compat.open_jaxpr(closed)
    equations = live_equations(jaxpr)
    runs, least = _side_by_side(equations)
    results, rows = jaxpr.outvars[: len(leaves)], jaxpr.outvars[len(leaves) :]
    row_tree = jax.tree_util.tree_structure(shapes[1])

    def evaluated(held: Sequence[Sequence[int]], singles: dict[int, Any], wholes: Any) -> Values:
        values = Values(dict(zip(jaxpr.constvars, consts, strict=True)), least)
        values.known.update((jaxpr.invars[i], value) for i, value in singles.items())
        for numbers, whole in zip(held, wholes, strict=True):
            parts = ((jaxpr.invars[i], Part(whole, k)) for k, i in enumerate(numbers))
            values.parts.update(parts)
        evaluate_equations(jaxpr, runs, values)
        return values

    held: list[list[int]] = []
    if runs:

        def probe(*leaves: Any) -> None:
            values = evaluated([], dict(enumerate(leaves)), [])
            held.extend(_held_together(results, values.parts, least))

        jax.eval_shape(probe, *leaves)
    together = {i for numbers in held for i in numbers}

    def body(carry: tuple[dict[int, Any], list[Any]], _: None) -> tuple[Any, Any]:
        values = evaluated(held, *carry)
        singles = {i: values.read(results[i]) for i in carry[0]}
        wholes = []
        for numbers in held:
            whole, backward = values.stacked([results[i] for i in numbers])
            wholes.append(jnp.flip(whole, 0) if backward else whole)
        row = [values.read(atom) for atom in rows]
        return (singles, wholes), jax.tree_util.tree_unflatten(row_tree, row)

    singles = {i: leaf for i, leaf in enumerate(leaves) if i not in together}
    wholes = [jnp.stack([leaves[i] for i in numbers]) for numbers in held]
    (singles, wholes), found = jax.lax.scan(body, (singles, wholes), None, length=length)
    for numbers, whole in zip(held, wholes, strict=True):
        singles.update((i, whole[k]) for k, i in enumerate(numbers))
    return jax.tree_util.tree_unflatten(tree, [singles[i] for i in range(len(leaves))]), found


def _side_by_side(equations: Sequence[Any]) -> tuple[list[Run], int]:
    """The runs of a step that is done many times, and the least number of repeats of any."""
    launches, large = device.launches_kernels(), len(equations) >= MIN_EQUATIONS
    least = MIN_REPEATS_LAUNCHED if launches else MIN_REPEATS
    if not large and not (launches and len(equations) >= MIN_LAUNCHES):
        return [], least
    runs = [unchained(equations, run, least) for run in find_runs(equations, least)]
    # Blocks that wait for each other are no faster as a loop: it only compiles sooner.
    return [
        run for run in runs if not is_chain(run.sources) or (large and run.repeats >= MIN_REPEATS)
    ], least


def _held_together(results: Sequence[Any], parts: dict[Any, Part], least: int) -> list[list[int]]:
    """Which results, by number and in order, are the entries of one array, next to each other."""
    numbers: dict[int, dict[int, int]] = {}
    for number, atom in enumerate(results):
        part = None if isinstance(atom, compat.Literal) else parts.get(atom)
        if part is not None:
            numbers.setdefault(id(part.whole), {}).setdefault(part.index, number)
    found = []
    for entries in numbers.values():
        stretch: list[int] = []
        for index in sorted(entries):
            if index - 1 not in entries:
                stretch = []
                found.append(stretch)
            stretch.append(entries[index])
    return [stretch for stretch in found if len(stretch) >= least // 2]
