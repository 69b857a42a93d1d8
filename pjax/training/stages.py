"""One stage of a network that is cut into stages: what it makes of a batch, and what it is asked.

The stage behind asks for something: of an output `Y` that was made of inputs `X` some batches ago,
a request `R` says that `Y + R` would have been better. That is a *target*, and it is met from the
weights of today. With `f(X)` what they make of the same inputs, the force on the output is

    R − κ (f(X) − Y)

so that what the moves in between have done already is not asked for again. The solve for the
parameters is that of `pjax.optim.Projection`; the force on `X` becomes the request of the stage
before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pjax.options import Fallback
from pjax.problem import Layout, Problem, layout
from pjax.program import leaves_of, squared_error
from pjax.projections.spectrum import inverse
from pjax.trace import trace
from pjax.training import requests
from pjax.training.memory import Memory
from pjax.training.projection import formulation
from pjax.training.readers import Units, find_units
from pjax.training.requests import GROWTH, Requests


@dataclass(frozen=True)
class Stage:
    """A stage, and how it is asked.

    **Attributes:**

    - `fn`: `fn(params, x)` is its output.
    - `loss`: of the last stage: `loss(output, labels)`; else None.
    - `first`: nothing is before it that could be asked.
    - `requests`: of its parameters.
    - `share`: of the size of its inputs, what it asks the stage before to move them by.
    - `size`: a factor on its moves.
    - `ramp`: over so many batches this factor grows from 0.
    - `correction`: κ, how far its own moves count as done.
    """

    fn: Callable[..., Any]
    loss: Callable[..., Any] | None
    first: bool
    requests: Requests
    share: float
    size: float = 1.0
    ramp: float = 1.0
    correction: float = 0.0
    fallback: Fallback | None = None


class Kept(NamedTuple):
    """What a stage keeps from batch to batch.

    **Attributes:**

    - `count`: how many batches it was asked by.
    - `memory`, `vectors`: see [`pjax.optim.ProjectionState`][].
    - `force`: the largest mean force on its inputs so far.
    - `first`: how large its inputs were in the first batch.
    """

    count: Array
    memory: Memory
    vectors: tuple[Any, ...]
    force: Array
    first: Array


class Asked(NamedTuple):
    """What a stage is asked for one batch: `output + request`, from the inputs `x`."""

    x: Any
    output: Array
    request: Array


class Labelled(NamedTuple):
    """What the last stage is asked for one batch: a small loss."""

    x: Any
    labels: Any


class Solved(NamedTuple):
    """What comes of it.

    **Attributes:**

    - `params`: moved.
    - `request`: to the stage before; None from the first one.
    - `loss`: of the last stage before its move; else 0.
    - `sound`: whether all of it is finite.
    """

    params: Any
    kept: Kept
    request: Array | None
    loss: Array
    sound: Array


@functools.partial(jax.jit, static_argnums=0)
def forward(fn: Callable[..., Any], params: Any, x: Any) -> Any:
    """The output of a stage."""
    return fn(params, x)


def count_layers(stage: Stage, params: Any, asked: Asked | Labelled) -> int:
    """How many layers a stage has."""
    found, _, _ = _traced(stage, params, asked)
    return _units(found, not stage.first).layers


@functools.partial(jax.jit, static_argnums=0)
def start(stage: Stage, params: Any, asked: Asked | Labelled) -> Kept:
    """What a stage keeps before the first batch."""
    found, leaves, consts = _traced(stage, params, asked)
    problem = Problem(found, leaves, consts)
    memory = requests.empty(problem, _units(found, not stage.first), stage.requests)
    zero = jnp.zeros((), memory.force.dtype)
    return Kept(jnp.zeros((), jnp.int32), memory, tuple(problem.vectors), zero, zero)


@functools.partial(jax.jit, static_argnums=0)
def solve(
    stage: Stage, params: Any, kept: Kept, asked: Asked | Labelled, relaxation: Any
) -> Solved:
    """A stage after one batch has asked it."""
    found, leaves, consts = _traced(stage, params, asked)
    problem = Problem(found, leaves, consts, kept.vectors)
    units = _units(found, not stage.first)
    state = problem.sweep(layer_forces=True)
    moved, _, memory = requests.moves(
        problem, units, state, state.forces, kept.memory, kept.count, stage.requests
    )
    apart = leaves_of(params)
    moves = problem.leaf_moves(moved)[: len(apart.arrays)]
    size = relaxation
    if stage.size != 1 or stage.ramp > 1:
        size = size * stage.size * jnp.minimum(1, (kept.count + 1) / stage.ramp)
    new = [
        leaf if move is None else (leaf + size * move).astype(jnp.result_type(leaf))
        for leaf, move in zip(apart.arrays, moves, strict=True)
    ]
    kept = Kept(kept.count + 1, memory, tuple(problem.vectors), kept.force, kept.first)
    request = None
    if not stage.first:
        force = problem.parameter_forces(state)[-1]
        assert force is not None
        kept, request = _request(stage, kept, asked.x, force)
    loss = problem.loss if stage.loss is not None else jnp.zeros(())
    numbers = [loss, *(jnp.sum(leaf) for leaf in new)]
    if request is not None:
        numbers.append(jnp.sum(request))
    sound = jnp.all(jnp.isfinite(jnp.stack([jnp.asarray(n, jnp.float32) for n in numbers])))
    return Solved(apart.tree(new), kept, request, loss, sound)


def _request(stage: Stage, kept: Kept, x: Array, force: Array) -> tuple[Kept, Array]:
    """A force on inputs as a request: a share of their size, and less as forces fade."""
    loudness, size = (
        jnp.sqrt(jnp.mean(jnp.square(a))).astype(kept.force.dtype) for a in (force, x)
    )
    largest = jnp.maximum(stage.requests.forget * kept.force, loudness)
    first = jnp.where(kept.count == 1, size, kept.first)
    scale = stage.share * first ** (1 - GROWTH) * size**GROWTH * inverse(largest)
    return kept._replace(force=largest, first=first), (scale * force).astype(x.dtype)


def _traced(
    stage: Stage, params: Any, asked: Asked | Labelled
) -> tuple[Layout, list[Any], list[Any]]:
    """The layout of a stage's problem. Its last parameter is a move of the inputs, 0: the force on
    it is that on them.
    """

    def loss(params: Any) -> Array:
        params, *moves = params
        x = asked.x if stage.first else asked.x + moves[0]
        output = stage.fn(params, x)
        if isinstance(asked, Labelled):
            assert stage.loss is not None
            return stage.loss(output, asked.labels)
        return jnp.sum(squared_error(output, target))

    if isinstance(asked, Asked):
        target = asked.output + asked.request
        if stage.correction != 1:
            target = target + (1 - stage.correction) * (stage.fn(params, asked.x) - asked.output)
    given = (params,) if stage.first else (params, jnp.zeros_like(asked.x))
    program, leaves, consts, _ = trace(loss, given, scalar=True)
    return layout(program, formulation(stage.fallback)), leaves, consts


def _units(found: Layout, moves_inputs: bool) -> Units:
    """What is solved for: all parameters but the move of the inputs."""
    graph = found.graph
    every = find_units(graph)
    if not moves_inputs:
        return every
    last = len(graph.program.leaves) - 1
    units = [unit for unit in every.units if graph.nodes[unit.node].output != last]
    numbers = {layer: n for n, layer in enumerate(dict.fromkeys(unit.layer for unit in units))}
    return Units(tuple(replace(u, layer=numbers[u.layer]) for u in units), len(numbers))


__all__ = [
    "Asked", "Kept", "Labelled", "Solved", "Stage", "count_layers", "forward", "solve",
    "start",
]  # fmt: skip
