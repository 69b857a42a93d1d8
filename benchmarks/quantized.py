"""Networks of signs and quantizers: projection beside a tuned straight-through estimator.

    python -m benchmarks.quantized --data-dir DIR [--rows NAME ...] [--methods NAME ...]
        [--seeds 3] [--cache runs/quantized] [--markdown FILE] [--cached] [--list]

MNIST, batches of 256, two epochs. A straight-through estimator and Adam get their rate and window
on each row anew, by validation with a seed of its own; projection has the same settings on every
row. The test rows are looked at once, at the end of each reported run. Every run is kept as one
file in the cache, so a command that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from rich import box
from rich.progress import Progress
from rich.table import Table

import pjax
from benchmarks.accuracy import (
    TUNING_SEED,
    Cache,
    Comparison,
    Trainer,
    print_names,
    table_parser,
)
from benchmarks.accuracy_methods import Method, Settings, displacement, pure
from benchmarks.accuracy_tasks import Kind, Loss, Params, Row, Task
from pjax.lab import terminal
from pjax.lab.data import DataError
from pjax.lab.runs import mean_and_error

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Half of the width over which a straight-through estimator lets gradients pass, in units of a
#: sign's output or of half the range of a quantizer. Further ones are tried at either end.
WINDOWS = (0.5, 1.0, 2.0)
LEAST_WINDOW, LARGEST_WINDOW = 0.25, 4.0

Activation = Literal["sign", "four"]


@dataclasses.dataclass(frozen=True)
class QuantizedTask(Task):
    """A network of signs or quantizers on MNIST.

    **Arguments:**

    - `activation`: `"sign"`, or `"four"` levels from −1 to 1.
    - `weight_levels`: the weights of every layer, `s` times one of so many levels from −1.5 to 1.5
      with `s` the standard deviation of the initial ones; 0: they are real numbers.
    - `channels`: of strided 3x3 convolutions in front of the dense layers.
    """

    activation: Activation = "sign"
    weight_levels: int = 0
    channels: tuple[int, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        return (*self.channels, *self.hidden)

    @property
    def in_loop(self) -> bool:
        # XLA on a CPU runs a convolution in a loop several times slower.
        return not self.channels or jax.default_backend() != "cpu"

    def init(self, num_features: int, num_classes: int, seed: int) -> Params:
        side = round(num_features**0.5)
        shapes: list[tuple[int, ...]] = [
            (3, 3, *pair) for pair in itertools.pairwise((1, *self.channels))
        ]
        if self.channels:
            num_features = self.channels[-1] * (-(-side // 2 ** len(self.channels))) ** 2
        shapes += [*itertools.pairwise((num_features, *self.hidden, num_classes))]
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        he = jax.nn.initializers.he_normal()
        return {
            "w": [he(key, shape) for key, shape in zip(keys, shapes, strict=True)],
            "b": [jnp.zeros(shape[-1]) for shape in shapes],
        }

    def network(self, params: Params, x: Array, window: Any = None) -> Array:
        """The logits; with a window, the gradient is that of a straight-through estimator."""
        *layers, (last_weight, last_bias) = zip(params["w"], params["b"], strict=True)
        if self.channels:
            side = round(x.shape[-1] ** 0.5)
            x = x.reshape(len(x), side, side, 1)
        for weight, bias in layers:
            if weight.ndim == 4:
                x = jax.lax.conv_general_dilated(
                    x, self._stored(weight, window), (2, 2), "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )  # fmt: skip
            else:
                x = x.reshape(len(x), -1) @ self._stored(weight, window)
            x = self._activate(x + bias, window)
        return x.reshape(len(x), -1) @ self._stored(last_weight, window) + last_bias

    def _activate(self, x: Array, window: Any) -> Array:
        y = jnp.sign(x) if self.activation == "sign" else pjax.quantize(x, 4, -1.0, 1.0)
        return y if window is None else straight_through(x, y, window)

    def _stored(self, weight: Array, window: Any) -> Array:
        """The weight that a layer reads."""
        if not self.weight_levels:
            return weight
        fan_in = weight.size // weight.shape[-1]
        unit = (2 / fan_in) ** 0.5
        stored = pjax.quantize(weight, self.weight_levels, -1.5 * unit, 1.5 * unit)
        return stored if window is None else straight_through(weight, stored, window * 1.5 * unit)

    def loss(self, kind: Kind) -> Loss:
        """The mean cross-entropy; of a gradient method the batch ends with the window."""
        if kind == "gradient":
            return lambda params, batch: jnp.mean(
                optax.softmax_cross_entropy(self.network(params, batch[0], batch[2]), batch[1])  # pyright: ignore
            )
        return lambda params, batch: jnp.mean(
            pjax.cross_entropy(self.network(params, batch[0]), batch[1])
        )


def straight_through(x: Array, y: Array, window: Any) -> Array:
    """`y`, with the derivative of `x` where `|x| < window` and 0 elsewhere."""
    through = jnp.where(jnp.abs(x) < window, x, jax.lax.stop_gradient(x))
    return through + jax.lax.stop_gradient(y - through)


def _task(hidden: int, **options: Any) -> QuantizedTask:
    return QuantizedTask("mnist", hidden * (128,), epochs=2, **options)


#: Every row of the table, by name.
ROWS: dict[str, Row] = {
    name: Row(name, task)
    for name, task in {
        "sign-1x128": _task(1),
        "sign-2x128": _task(2),
        "sign-4x128": _task(4),
        "four-level": _task(1, activation="four"),
        "two-bit": _task(1, activation="four", weight_levels=4),
        "sign-cnn": _task(0, channels=(16, 32)),
    }.items()
}


def _straight_through() -> Method:
    def init(loss_fn: Loss, params: Params, batch: tuple[Array, Array]) -> Any:
        return optax.scale_by_adam().init(params)  # pyright: ignore[reportArgumentType]

    def step(loss_fn, params, state, x, y, progress, settings):
        found = jax.grad(loss_fn)(params, (x, y, settings["window"]))
        updates, state = optax.scale_by_adam().update(found, state, params)  # pyright: ignore
        rate = settings["rate"] * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jax.tree.map(lambda leaf, move: leaf - rate * move, params, updates), state

    return Method("straight-through", "gradient", init, step, description="Adam, cosine")


#: Every method, by name, in the order of the table.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _straight_through(),
        pure("projection"),
        displacement("displacement-adam"),
    )
}


class Search(Comparison):
    """The runs, with rates and windows tuned by validation."""

    def choose(self, row: Row, method: Method) -> Settings | None:
        if not method.tuned:
            return method.settings
        if (row.name, method.name) in self._chosen:
            return self._chosen[row.name, method.name]
        rates, windows = list(RATES), list(WINDOWS if method.kind == "gradient" else (1.0,))
        while True:
            preferences: dict[tuple[float, float], tuple[float, float]] = {}
            for rate, window in itertools.product(rates, windows):
                settings = self._settings(method, rate, window)
                run = self.run(row, method, settings, TUNING_SEED)
                if run is None:
                    return None
                preferences[rate, window] = run.preference(row)
            rate, window = max(sorted(preferences), key=lambda key: preferences[key])
            if len(windows) == 1 or window not in (windows[0], windows[-1]):
                break
            further = window / 2 if window == windows[0] else window * 2
            if not LEAST_WINDOW <= further <= LARGEST_WINDOW:
                break
            windows = sorted({*windows, further})
        settings = self._settings(method, rate, window)
        return self._chosen.setdefault((row.name, method.name), settings)

    def _settings(self, method: Method, rate: float, window: float) -> Settings:
        settings = {"rate": rate, "cosine": 1.0}
        return settings | ({"window": window} if method.kind == "gradient" else {})


class Line(NamedTuple):
    """A line of the table; `difference` is to the straight-through estimator, paired by seed."""

    row: str
    method: str
    settings: Settings | None
    seeds: int
    validation: tuple[float, float]
    test: tuple[float, float]
    difference: tuple[float, float]
    seconds: float


def line(search: Search, row: Row, method: Method, seeds: Sequence[int]) -> Line:
    """The line of a method on a row."""
    runs = search.runs(row, method, seeds)
    base = search.runs(row, METHODS["straight-through"], seeds)
    return Line(
        row.name,
        method.name,
        search.choose(row, method) if runs else None,
        len(runs),
        mean_and_error([run.validation[-1].score for run in runs.values()]),
        mean_and_error([run.test for run in runs.values()]),
        mean_and_error([runs[seed].test - base[seed].test for seed in runs.keys() & base.keys()]),
        statistics.fmean(run.seconds for run in runs.values()) if runs else float("nan"),
    )


COLUMNS = ("row", "method", "setting", "seeds", "validation", "test", "− straight-through", "s")


def cells(found: Line) -> list[str]:
    """The texts of a line, one for each column."""

    def percent(pair: tuple[float, float], sign: str = "") -> str:
        mean, error = pair
        if mean != mean:
            return "–"
        text = f"{100 * mean:{sign}.2f}"
        return text if error != error else f"{text} ± {100 * error:.2f}"

    settings = ", ".join(
        f"{name} {value:g}" for name, value in (found.settings or {}).items() if name != "cosine"
    )
    own = found.method == "straight-through"
    return [
        found.row,
        found.method,
        settings or "–",
        str(found.seeds),
        percent(found.validation),
        percent(found.test),
        "" if own else percent(found.difference, "+"),
        f"{found.seconds:.1f}",
    ]


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def compare(
    rows: Sequence[Row],
    methods: Sequence[Method],
    seeds: int,
    search: Search,
) -> list[Line]:
    """The lines of the table; every row gets its first seed before any gets its second."""
    with search.progress:
        for seed in range(seeds if search.trainer else 0):
            for row, method in itertools.product(rows, methods):
                search.runs(row, method, [seed])
    cached = dataclasses.replace(search, trainer=None)
    return [line(cached, row, method, range(seeds)) for row in rows for method in methods]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, 1 after an error, 130 after Ctrl-C."""
    parser = table_parser("quantized", "Signs and quantizers.", ROWS, METHODS, seeds=3)
    options = parser.parse_args(arguments)
    console = terminal.console(140)
    if options.list:
        return print_names(console, ROWS, METHODS)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    trainer = None if options.cached else Trainer(options.data_dir)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    search = Search(Cache(options.cache), trainer, console, progress)
    rows = [ROWS[name] for name in options.rows]
    methods = [METHODS[name] for name in options.methods]
    try:
        lines = compare(rows, methods, options.seeds, search)
    except DataError as error:
        print(f"benchmarks.quantized: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.quantized: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for found in lines:
        table.add_row(*cells(found))
    console.print(table, highlight=False)
    console.print("In percent, means over seeds ± standard errors; s: seconds of training.")
    if options.markdown:
        options.markdown.write_text(markdown(lines), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
