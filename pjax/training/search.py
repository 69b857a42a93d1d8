"""Exact solutions: many random starts of one divided problem, until the network itself is exact."""

from __future__ import annotations

import functools
import hashlib
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from pjax.problem import Copies, DividedProblem, Formulation, Layout, layout
from pjax.program import Program, leaves_of, read
from pjax.sets import Set
from pjax.solvers import reflect
from pjax.trace import require_function, trace
from pjax.training.checks import NonFiniteError
from pjax.training.within import sets_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Solutions:
    """What `solve` found: the exact networks first, those found first before others.

    **Attributes:**

    - `params`: as the `params` of `solve`, with an axis of starts in front of each array.
    - `exact`: whether the network with these parameters satisfies `stop`.
    - `steps`: after how many steps that was so; for others how many were taken.
    - `loss`: the function's value for these parameters.
    - `gap`: the root of the mean squared distance between the two sets, per constraint, at the end.
    - `start`: which start it was: its settings are those in this place of the arrays given.
    """

    params: PyTree[Array]
    exact: Bool[Array, " starts"]
    steps: Int[Array, " starts"]
    loss: Float[Array, " starts"]
    gap: Float[Array, " starts"]
    start: Int[Array, " starts"]

    @property
    def best(self) -> PyTree[Array]:
        """The parameters of the first: of an exact network if any is."""
        return jax.tree.map(lambda array: array[0], self.params)


class SearchProgress(NamedTuple):
    """How far a search is, for its `progress`.

    **Attributes:**

    - `step`: how many steps each start has taken.
    - `exact`: how many starts are exact.
    - `gap`, `loss`: of each start; see [`Solutions`][pjax.Solutions].
    """

    step: int
    exact: int
    gap: np.ndarray
    loss: np.ndarray


class _Search(NamedTuple):
    """The state of all starts, with an axis of them in front."""

    copies: Copies
    weights: tuple[Array, ...]
    params: list[Array]
    steps: Array
    loss: Array
    gap: Array
    step: Array


def solve(
    fn: Callable[..., Array],
    params: PyTree[Array],
    *args: Any,
    sets: PyTree[Set | None] = None,
    starts: int = 32,
    steps: int = 10_000,
    stop: Callable[[PyTree[Array]], Any] | None = None,
    enough: int = 1,
    relaxation: ArrayLike = 0.3,
    adaptation: ArrayLike = 3e-3,
    spread: float = 1.0,
    key: Array | None = None,
    every: int = 50,
    progress: Callable[[SearchProgress], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Solutions:
    """Looks for parameters that satisfy `fn(params, *args)` exactly, from many random starts.

    All operations of the network are one set `A`, each with operands and an output of its own; that
    these agree, that parameters lie in `sets` and that predictions are labels is the other, `B`.
    Each start goes by reflect-reflect-relax, which is the relaxed Douglas-Rachford step

        z ← z + β (P_B(2 P_A(z) − z) − P_A(z)),

    from values that are drawn anew; `params` only say what shapes there are. The weight `g` of each
    constraint in `P_B` follows its share of the squared gap between the two projections,
    `g ← g + γ (gap/mean gap − g)`: what is far from satisfied holds on to its values.

    The gap need not vanish: a start is exact when the network itself is, with the parameters of
    `P_B`.

    **Arguments:**

    - `fn`: a JAX function that ends in `pjax.squared_error` or `pjax.margin_loss` of predictions,
        or in means and sums of such; `args` are its data, all rows at once.
    - `params`: a pytree of arrays.
    - `sets`: where parameters lie: a prefix of that tree with sets of `pjax.sets`, or None for no
        set. The weights of a [`pjax.threshold`][] need a
        sphere, or its margin means nothing.
    - `starts`: how many; all are computed side by side.
    - `steps`: at most so many, of each start.
    - `stop`: of the parameters of one network, whether it is exact; by default whether
        `fn(params, *args)` is 0.
    - `enough`: with so many exact networks the search ends.
    - `relaxation`, `adaptation`: β in (0, 2) and γ in [0, 1), one number or one for each start.
    - `spread`: values are drawn evenly from `[−spread, spread]`.
    - `key`: of the random numbers; the same one gives the same starts.
    - `every`: after so many steps networks are tested.
    - `progress`: called then, with a [`SearchProgress`][pjax.SearchProgress].
    - `checkpoint`: a file, written every half a minute and when interrupted. Where there is one,
        the search goes on from it, bit for bit as if it had not stopped.

    **Returns:** [`Solutions`][pjax.Solutions].

    **Raises:** [`pjax.TraceError`][] for a function that cannot be divided; `ValueError` for
    arguments out of range and for a checkpoint of another search; [`pjax.NonFiniteError`][] where
    values are not finite any more.

    Sources: V. Elser and M. Krishan Lal, arXiv 2602.17493; S. Gravel and V. Elser, *Divide and
    concur* (2008).
    """
    require_function(fn, "fn")
    _check_counts(starts=starts, steps=steps, enough=enough, every=every)
    settings = _settings(starts, relaxation=relaxation, adaptation=adaptation)
    program, leaves, consts, _ = trace(lambda p: fn(p, *args), params)
    found = layout(program, Formulation(grouping="levels", reflecting=True))
    apart = leaves_of(params)
    of_leaves = sets_of(sets, params, apart)
    # Outside of compiled code, so that what is wrong has a name and a value.
    DividedProblem(found, leaves, consts, of_leaves)
    tree = apart.tree
    test = None if stop is None else (lambda found: stop(tree(found)))
    if key is None:
        key = jax.random.key(0)
    data = (leaves, consts, of_leaves)
    state = _begin(found, starts, spread, key, *data)
    file = None if checkpoint is None else _Checkpoint(
        Path(checkpoint), program, (data, settings, jax.random.key_data(key)), spread
    )  # fmt: skip
    if file is not None:
        state = file.read(state)
    run = functools.partial(_advance, found, test)
    try:
        while int(state.step) < steps:
            if int(np.sum(np.asarray(state.steps) > 0)) >= enough:
                break
            state = run(min(every, steps - int(state.step)), *data, settings, state)
            _require_finite(state)
            if file is not None:
                file.write_sometimes(state)
            if progress is not None:
                exact = int(np.sum(np.asarray(state.steps) > 0))
                now = np.asarray(state.gap), np.asarray(state.loss)
                progress(SearchProgress(int(state.step), exact, *now))
    except KeyboardInterrupt:
        if file is not None:
            file.write(state)
        raise
    if file is not None:
        file.write(state)
    return _solutions(state, tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
    found: Layout, starts: int, spread: float, key: Array, leaves: Any, consts: Any, sets: Any
) -> _Search:
    problem = DividedProblem(found, leaves, consts, sets)
    copies = jax.vmap(lambda k: problem.random(k, spread))(jax.random.split(key, starts))

    def repeated(array: Any) -> Array:
        return jnp.broadcast_to(array, (starts, *jnp.shape(array)))

    infinite = jnp.full(starts, jnp.inf, jnp.result_type(problem.loss))
    return _Search(
        copies, tuple(map(repeated, problem.even_weights())), list(map(repeated, leaves)),
        jnp.zeros(starts, jnp.int32), infinite, infinite, jnp.zeros((), jnp.int32),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(
    found: Layout,
    stop: Callable[..., Any] | None,
    steps: int,
    leaves: Any,
    consts: Any,
    sets: Any,
    settings: dict[str, Array],
    state: _Search,
) -> _Search:
    """`steps` steps of every start; what has become exact keeps the parameters that it had then."""
    problem = DividedProblem(found, leaves, consts, sets)
    program = found.graph.program

    def one(copies: Copies, weights: Any, relaxation: Array, adaptation: Array) -> Any:
        def step(carry: Any, _: Any) -> Any:
            copies, weights, _ = carry
            moved = reflect(problem.weighted(weights), 0, 1, copies, relaxation)
            gaps = problem.gaps(moved.after, moved.before)
            mean = sum(map(jnp.sum, gaps)) / sum(gap.size for gap in gaps)
            share = 1 / jnp.where(mean > 0, mean, 1)
            weights = tuple(
                weight + adaptation * (jnp.where(mean > 0, gap * share, 1) - weight)
                for weight, gap in zip(weights, gaps, strict=True)
            )
            return (moved.state, weights, jnp.sqrt(mean)), None

        zero = jnp.zeros((), problem.loss.dtype)
        (copies, weights, gap), _ = jax.lax.scan(step, (copies, weights, zero), length=steps)
        now = problem.weighted(weights)
        shadow = now.project(0, copies)
        _, agreed = now.agree(jax.tree.map(lambda a, z: 2 * a - z, shadow, copies))
        moved = now.parameters(agreed)
        loss = jnp.asarray(read(program.evaluate(moved, consts), program.outputs[0]))
        exact = loss == 0 if stop is None else jnp.asarray(stop(moved), bool)
        return copies, weights, moved, gap, jnp.sum(loss), exact

    copies, weights, params, gap, loss, exact = jax.vmap(one)(
        state.copies, state.weights, settings["relaxation"], settings["adaptation"]
    )
    before = state.steps > 0

    def kept(old: Array, new: Array) -> Array:
        return jnp.where(before.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

    step = state.step + steps
    return _Search(
        copies, weights, [kept(a, b) for a, b in zip(state.params, params, strict=True)],
        jnp.where(before, state.steps, jnp.where(exact, step, 0)),
        kept(state.loss, loss), gap, step,
    )  # fmt: skip


def _solutions(state: _Search, tree: Callable[..., Any]) -> Solutions:
    steps, loss = np.asarray(state.steps), np.asarray(state.loss)
    exact = steps > 0
    order = np.lexsort((loss, np.where(exact, steps, 0), ~exact))
    taken = np.where(exact, steps, int(state.step))
    return Solutions(
        params=tree([array[order] for array in state.params]),
        exact=jnp.asarray(exact[order]),
        steps=jnp.asarray(taken[order]),
        loss=state.loss[order],
        gap=state.gap[order],
        start=jnp.asarray(order.astype(np.int32)),
    )


def _require_finite(state: _Search) -> None:
    bad = np.flatnonzero(~np.isfinite(np.asarray(state.gap)))
    if bad.size:
        raise NonFiniteError(
            f"The values of start {bad[0]} are not finite after {int(state.step)} steps "
            f"({bad.size} of all starts). Take a smaller `relaxation`."
        )


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"`{name}` must be a whole number, at least 1, got {count!r}.")


def _settings(starts: int, **given: ArrayLike) -> dict[str, Array]:
    found = {}
    for name, value in given.items():
        array = np.asarray(value, np.float32)
        if array.shape not in ((), (starts,)):
            raise ValueError(
                f"`{name}` must be one number or one for each of {starts} starts, got an array of "
                f"shape {array.shape}."
            )
        inside = (array > 0) & (array < 2) if name == "relaxation" else (array >= 0) & (array < 1)
        if not np.all(inside):
            bounds = "(0, 2)" if name == "relaxation" else "[0, 1)"
            raise ValueError(f"`{name}` must be in {bounds}, got {value}.")
        found[name] = jnp.broadcast_to(array, (starts,))
    return found


class _Checkpoint:
    """A file with the state of a search, and what it is a search for."""

    def __init__(self, path: Path, program: Program, arrays: Any, spread: float):
        self.path = path
        digest = hashlib.sha256(repr((spread, jax.tree.structure(arrays))).encode())
        for equation in program.equations:
            digest.update(
                repr((equation.name, [program.avals[v] for v in equation.outputs])).encode()
            )
        for array in map(np.asarray, jax.tree.leaves(arrays)):
            digest.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
        self.digest = digest.hexdigest()
        self.written = 0.0

    def read(self, state: _Search) -> _Search:
        """The state in the file; `state` if there is none."""
        if not self.path.exists():
            return state
        leaves, structure = jax.tree.flatten(state)
        try:
            with self.path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                digest, arrays = str(file["search"]), [file[str(i)] for i in range(len(leaves))]
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`checkpoint`: {self.path} is no file of a search, or damaged ({error}). Remove "
                "it, or name another."
            ) from error
        if digest != self.digest:
            raise ValueError(
                f"`checkpoint`: {self.path} is of a search with another function, data, key or "
                "settings. Remove it, or name another."
            )
        return jax.tree.unflatten(structure, [jnp.asarray(array) for array in arrays])

    def write(self, state: _Search) -> None:
        arrays: dict[str, Any] = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.savez(file, search=np.asarray(self.digest), **arrays)
        os.replace(unfinished, self.path)
        self.written = time.monotonic()

    def write_sometimes(self, state: _Search) -> None:
        if time.monotonic() - self.written >= _SECONDS:
            self.write(state)


#: Between two writes of a checkpoint.
_SECONDS = 30.0
