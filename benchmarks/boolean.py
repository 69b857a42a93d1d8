"""Networks of ±1 values found exactly: `pjax.solve` beside a tuned straight-through estimator.

    python -m benchmarks.boolean [--rows NAME ...] [--methods NAME ...] [--starts 32]
        [--cache runs/boolean] [--markdown FILE] [--cached] [--list]
    python -m benchmarks.boolean --speed

A row is a task: widths of layers of thresholds, with a bias in each, rows to learn, others to test.
Each start of a method ends when the network is exact on all rows, or at the cap of steps; a step is
one of all rows. Projection has the same relaxation and adaptation everywhere, and a margin for each
task; "projection, margin" goes on until every neuron keeps 0.9 of it on all rows. The
straight-through estimator (Adam with cosine, squared hinge, `tanh'(ka)` in the place of the
derivative of a sign, hidden neurons of length 1) has its rate, `k` and the length of its cosine
tuned on each task, with starts of their own. Every cell is kept as a file, so a command that was
killed goes on where it was. `--speed` measures steps × rows × edges a second with 32 starts.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from rich import box
from rich.table import Table

import pjax
from pjax.lab import terminal

#: β and γ of projection, on every task.
RELAXATION, ADAPTATION = 0.3, 3e-3
RATES = (0.03, 0.1, 0.3, 1.0)
SLOPES = (0.25, 0.5, 1.0, 2.0)
PERIODS = (300, 1000, 3000)
TUNING_STARTS, TUNING_CAP = 8, 3000

Rows = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and the rows that it is to be exact on.

    **Arguments:**

    - `widths`: of the input and of each layer.
    - `rows`: how inputs and outputs of ±1 are made; those to learn, and others, which may be none.
    - `norm`: `σ`; the margin of a neuron with `m` weights, and squared length `m`, is `√(m/σ)`.
    - `cap`: of steps.
    """

    widths: tuple[int, ...]
    rows: Callable[[], tuple[Rows, Rows | None]]
    norm: float = 5.0
    cap: int = 10_000

    @property
    def edges(self) -> int:
        return sum((a + 1) * b for a, b in itertools.pairwise(self.widths))


def network(params: Sequence[Array], x: Array, norm: float) -> Array:
    """Layers of thresholds, each with −1 as another input."""
    for w in params:
        x = pjax.threshold(with_bias(x) @ w, margin=(w.shape[0] / norm) ** 0.5)
    return x


def with_bias(x: Array) -> Array:
    return jnp.concatenate([-jnp.ones((*x.shape[:-1], 1), x.dtype), x], axis=-1)


def spheres(params: Sequence[Array]) -> list[pjax.sets.Set]:
    """Of each weight those whose columns have length `√m`, with `m` their number of entries."""
    return [pjax.sets.Sphere(len(w) ** 0.5, axis=0) for w in params]


def init(task: Task) -> list[Array]:
    return [jnp.zeros((a + 1, b)) for a, b in itertools.pairwise(task.widths)]


# Tasks.


def bits(number: int, count: int) -> list[int]:
    return [2 * (number >> place & 1) - 1 for place in reversed(range(count))]


def multiplier(size: int) -> tuple[Rows, None]:
    """All products of two numbers of `size` bits."""
    pairs = list(itertools.product(range(2**size), repeat=2))
    x = [bits(a, size) + bits(b, size) for a, b in pairs]
    return (np.array(x), np.array([bits(a * b, 2 * size) for a, b in pairs])), None


def one_hot(size: int) -> tuple[Rows, None]:
    x = 2 * np.eye(size, dtype=int) - 1
    return (x, x), None


def codes(size: int) -> tuple[Rows, None]:
    """As many random rows as entries, all different, to be returned as they are."""
    rng = np.random.default_rng(size)
    while True:
        x = rng.choice([-1, 1], (size, size))
        if len(np.unique(x, axis=0)) == size:
            return (x, x), None


def automaton(cells: int, learned: int, rule: int = 30) -> tuple[Rows, Rows]:
    """A step of Wolfram's rule on a ring, of `learned` random states; the others test."""
    rng = np.random.default_rng(rule)
    states = rng.permutation(2**cells)[: learned + 1024]
    x = (states[:, None] >> np.arange(cells)) & 1
    left, right = np.roll(x, 1, axis=1), np.roll(x, -1, axis=1)
    x, y = 2 * x - 1, 2 * ((rule >> (4 * left + 2 * x + right)) & 1) - 1
    return (x[:learned], y[:learned]), (x[learned:], y[learned:])


def circuit(width: int, depth: int, learned: int) -> tuple[Rows, Rows]:
    """Layers of gates: And or Or of two values, or a copy of one, each negated half of the time.

    The same gates for any number of rows.
    """
    gates, inputs = np.random.default_rng(width), np.random.default_rng(width + 1)
    x = inputs.choice([-1, 1], (learned + 1024, width))
    values = x
    for _ in range(depth):
        first, second = (
            values[:, gates.integers(0, width, width)] * gates.choice([-1, 1], width)
            for _ in range(2)
        )
        low, high = np.minimum(first, second), np.maximum(first, second)
        joined = np.where(gates.random(width) < 0.5, low, high)
        values = np.where(gates.random(width) < 0.5, joined, first)
    return (x[:learned], values[:learned]), (x[learned:], values[learned:])


TASKS: dict[str, Task] = {
    "multiplier 2x2": Task((4, 4, 4, 4), lambda: multiplier(2)),
    "autoencoder 8-3-8": Task((8, 3, 8), lambda: one_hot(8)),
    "autoencoder 8-8-3-8-8": Task((8, 8, 3, 8, 8), lambda: codes(8)),
    "autoencoder 16-16-4-16-16": Task((16, 16, 4, 16, 16), lambda: codes(16), 3.0, 30_000),
    "multiplier 3x3": Task((6, 10, 10, 10, 6), lambda: multiplier(3), 3.0, 30_000),
    **{
        f"rule 30, 8 cells, {n} rows": Task(
            (8, 16, 16, 8), lambda n=n: automaton(8, n), 3.0, 30_000
        )
        for n in (32, 64, 128)
    },
    **{
        f"circuit 16x3, {n} rows": Task((16,) * 4, lambda n=n: circuit(16, 3, n), 3.0)
        for n in (32, 64, 128, 256)
    },
}


class Found(NamedTuple):
    """What a method made of the starts of a task.

    **Attributes:**

    - `steps`: after how many each start was exact; 0 where it was not.
    - `right`: the share of outputs of other rows that each exact start has right, if there are any.
    - `margin`: the least `|w·x|/√m` over the rows, of exact starts, neurons of rows of length `√m`.
    - `settings`: those tuned.
    """

    steps: list[int]
    right: list[float]
    margin: list[float]
    seconds: float
    settings: dict[str, float]


def judged(task: Task, params: Any, exact: np.ndarray) -> tuple[list[float], list[float]]:
    """The share of right outputs on other rows, and the least margin, of each exact network."""
    (x, _), others = task.rows()
    right, margins = [], []
    for start in np.flatnonzero(exact):
        weights = [np.asarray(w[start], np.float64) for w in params]
        weights = [w * np.sqrt(len(w) / np.sum(w**2, axis=0)) for w in weights]
        margins.append(least_margin(weights, x))
        if others is not None:
            outputs = forward(weights, others[0])[-1] > 0
            right.append(float(np.mean(outputs == (others[1] > 0))))
    return right, margins


def forward(weights: Sequence[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """`w·x` of every layer, in NumPy."""
    found = []
    for w in weights:
        found.append(np.hstack([-np.ones((len(x), 1)), x]) @ w)
        x = np.where(found[-1] > 0, 1, -1)
    return found


def least_margin(weights: Sequence[np.ndarray], x: np.ndarray) -> float:
    sums = forward(weights, x)
    return float(min(np.abs(s).min() / len(w) ** 0.5 for s, w in zip(sums, weights, strict=True)))


# Projection.


#: The share of the margin that "projection, margin" asks of every neuron on every row.
KEPT = 0.9


def projection(task: Task, starts: int, seed: int, keep: bool = False) -> Found:
    """Until the network is exact; with `keep`, until it keeps its margin too."""
    (x, y), _ = task.rows()
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def loss(params: Any, x: Array, y: Array) -> Array:
        return jnp.mean(pjax.squared_error(network(params, x, task.norm), y))

    def keeps(params: Any) -> Array:
        kept, values = jnp.ones((), bool), x
        for w in params:
            sums = with_bias(values) @ w
            kept &= jnp.min(jnp.abs(sums)) >= KEPT * (w.shape[0] / task.norm) ** 0.5
            values = pjax.threshold(sums)
        return kept & (loss(params, x, y) == 0)

    begin = time.perf_counter()
    params = init(task)
    found = pjax.solve(
        loss, params, x, y, sets=spheres(params), starts=starts, steps=task.cap, enough=starts,
        stop=keeps if keep else None, relaxation=RELAXATION, adaptation=ADAPTATION,
        key=jax.random.key(seed), every=20,
    )  # fmt: skip
    exact, steps = np.asarray(found.exact), np.asarray(found.steps)
    seconds = time.perf_counter() - begin
    return Found(
        np.where(exact, steps, 0).tolist(), *judged(task, found.params, exact), seconds, {}
    )


# Straight-through.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sign_with_slope(a: Array, slope: float) -> Array:
    return jnp.where(a > 0, 1, -1).astype(a.dtype)


@sign_with_slope.defjvp
def _(slope, primals, tangents):
    (a,), (da,) = primals, tangents
    return sign_with_slope(a, slope), slope * (1 - jnp.tanh(slope * a) ** 2) * da


def outputs_through(params: Sequence[Array], x: Array, slope: Any) -> Array:
    """The last layer's sums. Columns of hidden layers have length 1, those of the last are free."""
    *hidden, last = params
    for w in hidden:
        length = jnp.linalg.norm(w, axis=0, keepdims=True) + 1e-12
        x = sign_with_slope(with_bias(x) @ (w / length), slope)
    return with_bias(x) @ last / last.shape[0] ** 0.5


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_through(
    widths: tuple[int, ...],
    cap: int,
    slope: float,
    rates: Array,
    period: Array,
    key: Array,
    x: Array,
    y: Array,
) -> tuple[Any, Array]:
    """For each start its weights when first exact, or last, and the step; 0 if never.

    The rate goes down by a cosine over `period` steps, then the start begins anew, at a random
    point.
    """
    shapes = [(a + 1, b) for a, b in itertools.pairwise(widths)]
    adam = optax.scale_by_adam()

    def one(key: Array, rate: Array) -> Any:
        def drawn(key: Array) -> Any:
            keys = jax.random.split(key, len(shapes))
            return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]

        def loss(params: Any) -> Array:
            return jnp.mean(jnp.maximum(1 - y * outputs_through(params, x, slope), 0) ** 2)

        def step(carry: Any, number: Array) -> Any:
            params, state, kept, exact_at = carry
            fresh = drawn(jax.random.fold_in(key, number))
            begins = number % period == 0
            params = jax.tree.map(lambda a, b: jnp.where(begins, a, b), fresh, params)
            state = jax.tree.map(lambda a: jnp.where(begins, jnp.zeros_like(a), a), state)
            updates, state = adam.update(jax.grad(loss)(params), state)
            size = rate * 0.5 * (1 + jnp.cos(jnp.pi * (number % period) / period))
            params = jax.tree.map(lambda p, u: p - size * u, params, updates)
            right = jnp.all((outputs_through(params, x, slope) > 0) == (y > 0))
            first = right & (exact_at == 0)
            kept = jax.tree.map(lambda a, b: jnp.where(exact_at == 0, a, b), params, kept)
            return (params, state, kept, jnp.where(first, number + 1, exact_at)), None

        params = drawn(key)
        carry = (params, adam.init(params), params, jnp.zeros((), jnp.int32))
        (_, _, kept, exact_at), _ = jax.lax.scan(step, carry, jnp.arange(cap))
        return kept, exact_at

    return jax.vmap(one)(jax.random.split(key, len(rates)), rates)


def straight_through(task: Task, starts: int, seed: int) -> Found:
    (x, y), _ = task.rows()
    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def run(count: int, settings: dict[str, float], cap: int, key: int) -> tuple[Any, np.ndarray]:
        params, steps = train_through(
            task.widths, cap, settings["slope"], jnp.full(count, settings["rate"]),
            jnp.asarray(settings["period"]), jax.random.key(key), *data,
        )  # fmt: skip
        return params, np.asarray(steps)

    def preference(settings: dict[str, float]) -> tuple[float, float]:
        """Most exact starts, then fewest steps with those that failed at the cap."""
        cap = min(task.cap, TUNING_CAP)
        steps = run(TUNING_STARTS, settings, cap, 1000 + seed)[1]
        return float(np.mean(steps > 0)), -float(np.mean(np.where(steps > 0, steps, cap)))

    tried = [
        {"rate": rate, "slope": slope, "period": float(period)}
        for rate, slope, period in itertools.product(RATES, SLOPES, PERIODS)
    ]
    settings = max(tried, key=preference)
    begin = time.perf_counter()
    params, steps = run(starts, settings, task.cap, seed)
    seconds = time.perf_counter() - begin
    return Found(steps.tolist(), *judged(task, params, steps > 0), seconds, settings)


METHODS: dict[str, Callable[[Task, int, int], Found]] = {
    "straight-through": straight_through,
    "projection": projection,
    "projection, margin": functools.partial(projection, keep=True),
}


# The table.

COLUMNS = (
    "task", "method", "exact starts", "steps", "other rows", "margin", "cap", "setting",
)  # fmt: skip


def cells(name: str, method: str, found: Found) -> list[str]:
    """The texts of a line, one for each column."""
    exact = [step for step in found.steps if step]

    def percent(values: Sequence[float]) -> str:
        return f"{100 * statistics.fmean(values):.1f} %" if values else "–"

    settings = ", ".join(f"{key} {value:g}" for key, value in found.settings.items())
    return [
        name, method, f"{len(exact)} of {len(found.steps)}",
        f"{statistics.fmean(exact):.0f}" if exact else "–",
        percent(found.right) if TASKS[name].rows()[1] is not None else "",
        f"{statistics.fmean(found.margin):.2f}" if exact else "–",
        f"{TASKS[name].cap}", settings or f"σ {TASKS[name].norm:g}",
    ]  # fmt: skip


def markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell_file(cache: Path, name: str, method: str, starts: int) -> Path:
    task = TASKS[name]
    own = (
        (RELAXATION, ADAPTATION, task.norm)
        if method != "straight-through"
        else (RATES, SLOPES, PERIODS)
    )
    key = repr((name, task.widths, task.cap, starts, own))
    number = hashlib.sha256(key.encode()).hexdigest()[:10]
    label = f"{name}-{method}".replace(" ", "-").replace(",", "")
    return cache / f"{label}-{number}.json"


def cell(cache: Path, name: str, method: str, starts: int, cached: bool) -> Found | None:
    """What is in the cache; else it is made, unless `cached`."""
    path = cell_file(cache, name, method, starts)
    if path.exists():
        return Found(**json.loads(path.read_text("utf-8")))
    if cached:
        return None
    found = METHODS[method](TASKS[name], starts, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(found._asdict()), "utf-8")
    unfinished.replace(path)
    return found


def speed(names: Sequence[str], starts: int = 32, steps: int = 500, rounds: int = 3) -> None:
    """Prints millions of steps × rows × edges a second, the best of rounds, without compiling."""
    for name in names:
        task = dataclasses.replace(TASKS[name], cap=steps)
        rows = len(task.rows()[0][0])
        projection(task, starts, 0)
        found = min(projection(task, starts, 0).seconds for _ in range(rounds))
        print(f"{name}: {steps * starts * rows * task.edges / found / 1e6:.0f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.boolean", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for option, choices in (("--rows", TASKS), ("--methods", METHODS)):
        parser.add_argument(
            option, nargs="+", choices=choices, default=list(choices), metavar="NAME"
        )
    parser.add_argument("--starts", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=Path("runs") / "boolean")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--cached", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--list", action="store_true", help="name the rows and methods")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args(arguments)
    console = terminal.console(160)
    if options.list:
        console.print("rows:", *TASKS, sep="\n  ", highlight=False)
        console.print("methods:", *METHODS, sep="\n  ", highlight=False)
        return 0
    if options.speed:
        speed(options.rows)
        return 0
    lines = []
    try:
        for name, method in itertools.product(options.rows, options.methods):
            found = cell(options.cache, name, method, options.starts, options.cached)
            if found is not None:
                lines.append(cells(name, method, found))
                print(*lines[-1], sep=" | ", file=sys.stderr)
    except KeyboardInterrupt:
        print("benchmarks.boolean: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for line in lines:
        table.add_row(*line)
    console.print(table, highlight=False)
    if options.markdown:
        options.markdown.write_text(markdown(lines), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
