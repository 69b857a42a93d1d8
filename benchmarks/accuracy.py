"""Scores of methods beside tuned baselines, paired by seed, on the rows of `accuracy_tasks`.

    python -m benchmarks.accuracy --data-dir DIR [--rows NAME ...] [--methods NAME ...]
        [--seeds 5] [--cache runs/accuracy] [--markdown FILE] [--cached] [--list]

A seed decides the initial parameters and the order of the batches; Adam, Muon, schedule-free
AdamW and every other method that needs a learning rate get theirs on each row anew, by validation
with a seed of its own. Every run is kept as one file in the cache, so a command that was killed
goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.accuracy_methods import ADAM, METHODS, Method, Settings
from benchmarks.accuracy_tasks import ROWS, Batch, Bound, Row, Task
from pjax.lab import terminal
from pjax.lab.data import DataError, batch_rows
from pjax.lab.runs import mean_and_error

#: The seed of the runs that choose a setting; none of the reported seeds.
TUNING_SEED = 1000
#: Rates are 1 and 3 times powers of ten: number 0 is 1, −1 is 0.3, −8 is 1e-4. These are tried
#: first, then further ones while the best is at an end, up to the limits.
FIRST_RATES = range(-8, -2)
LEAST_RATE, LARGEST_RATE = -14, 2


class Point(NamedTuple):
    """Validation after `batch` batches; `seconds` counts training only."""

    batch: int
    seconds: float
    score: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run, as it is cached: validation along the way, and the test at its end."""

    validation: tuple[Point, ...]
    test: float
    compile_seconds: float

    @property
    def seconds(self) -> float:
        return self.validation[-1].seconds

    def reached(self, score: float) -> Point | None:
        """The first validation that is at least `score`."""
        return next((point for point in self.validation if point.score >= score), None)

    def result(self, row: Row) -> float:
        """What the row reports; infinity for a score that was not reached, or a loss not finite."""
        if not row.reach:
            return self.test if row.part == "test" else self.validation[-1].score
        point = self.reached(row.reach)
        return point.batch if point else math.inf

    def preference(self, row: Row) -> tuple[float, float]:
        """What tuning maximises, on validation only."""
        end = self.validation[-1]
        if not row.reach:
            return row.sign * end.score, -end.loss
        point = self.reached(row.reach)
        return (-point.batch, point.score) if point else (-math.inf, end.score)


class Trainer:
    """Trains, one compiled program for each task and method."""

    def __init__(self, data_dir: str | None) -> None:
        self._data_dir = data_dir
        self._arrays: dict[tuple[str, str, int], tuple[Any, Any]] = {}
        self._programs: dict[tuple[Task, str, int], Any] = {}

    def train(
        self,
        task: Task,
        method: Method,
        settings: Settings,
        seed: int,
        on_chunk: Callable[[int, int], None] = lambda done, total: None,
    ) -> Run:
        """One run; `on_chunk` hears of the batches done and their total."""
        dataset = task.load(self._data_dir)
        of_rows = type(task).__name__, task.dataset, dataset.num_features
        if of_rows not in self._arrays:
            self._arrays[of_rows] = jax.tree.map(jnp.asarray, (dataset.train.x, dataset.train.y))
        train_x, train_y = self._arrays[of_rows]
        size = min(task.batch_size, len(train_x))
        per_epoch = len(train_x) // size
        total = task.num_batches(per_epoch)
        rows = np.stack(list(itertools.islice(batch_rows(len(train_x), size, seed), total)))
        params = task.init(dataset.num_features, dataset.num_classes, seed)
        loss = task.loss(method.kind)

        def batch_of(x: Any, y: Any, chosen: Any, number: Any) -> Batch:
            x, y = jax.tree.map(lambda leaf: leaf[chosen], (x, y))
            key = jax.random.fold_in(jax.random.key(0), jnp.uint32(number))
            return task.batch(x, y, dataset.num_classes, key)

        first = batch_of(train_x, train_y, rows[0], 0)
        state = jax.tree.map(jnp.asarray, method.init(loss, params, first))
        traced = {name: jnp.float32(value) for name, value in settings.items()}

        def advance(params: Any, state: Any, settings: Any, x: Any, y: Any, rows: Any, at: Any):
            def body(carry: Any, item: Any) -> Any:
                (params, state), (number, chosen) = carry, item
                batch = batch_of(x, y, chosen, number)
                progress = number / total
                return method.step(loss, params, state, *batch, progress, settings), None

            numbers = at + jnp.arange(len(rows), dtype=jnp.float32)
            if not task.in_loop:
                return body((params, state), (numbers[0], rows[0]))[0]
            return jax.lax.scan(body, (params, state), (numbers, rows))[0]

        every = task.measure_every or per_epoch
        seconds = compile_seconds = 0.0
        points = []
        for start in range(0, total, every):
            done = min(start + every, total)
            length = done - start if task.in_loop else 1
            for at in range(start, done, length):
                chunk = jnp.asarray(rows[at : at + length])
                given = (params, state, traced, train_x, train_y, chunk, jnp.float32(at))
                key = (task, method.name, length)
                if key not in self._programs:
                    begin = time.perf_counter()
                    self._programs[key] = jax.jit(advance).lower(*given).compile()
                    compile_seconds += time.perf_counter() - begin
                begin = time.perf_counter()
                params, state = jax.block_until_ready(self._programs[key](*given))
                seconds += time.perf_counter() - begin
            read = method.read(params, state)
            points.append(Point(done, seconds, *task.evaluate(read, dataset.validation)))
            on_chunk(done, total)
        test, _ = task.evaluate(method.read(params, state), dataset.test)
        return Run(tuple(points), test, compile_seconds)


class Cache:
    """One JSON file for each run, found by task, method, settings and seed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, task: Task, method: Method, settings: Settings, seed: int) -> Path:
        key = json.dumps(_key(task, method, settings, seed), sort_keys=True)
        number = hashlib.sha256(key.encode()).hexdigest()[:10]
        values = "-".join(f"{name}{value:g}" for name, value in settings.items())
        name = f"{values or 'fixed'}-seed{seed}-{number}.json"
        return self._folder / task.label / method.name / name

    def read(self, task: Task, method: Method, settings: Settings, seed: int) -> Run | None:
        """The run, or nothing if it is not there or its file is damaged."""
        try:
            content = json.loads(self.path(task, method, settings, seed).read_text("utf-8"))
            if content["key"] != _key(task, method, settings, seed):
                return None
            points = tuple(
                Point(int(batch), float(seconds), _or_infinite(score), _or_infinite(loss))
                for batch, seconds, score, loss in content["validation"]
            )
            run = Run(points, _or_infinite(content["test"]), float(content["compile_seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return run if points else None

    def write(self, task: Task, method: Method, settings: Settings, seed: int, run: Run) -> None:
        """Keeps the run: the file is there whole or not at all."""
        path = self.path(task, method, settings, seed)
        content = {
            "key": _key(task, method, settings, seed),
            "validation": [
                [*point[:2], *map(_or_none, (point.score, point.loss))] for point in run.validation
            ],
            "test": _or_none(run.test),
            "compile_seconds": run.compile_seconds,
            "made_with": f"jax {jax.__version__} on {jax.devices()[0].device_kind}",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content), "utf-8")
        os.replace(temporary, path)


def _key(task: Task, method: Method, settings: Settings, seed: int) -> dict[str, Any]:
    made = {
        "task": task.key(),
        "method": [method.name, method.kind, method.description],
        "settings": {name: float(value) for name, value in settings.items()},
        "seed": seed,
    }
    return json.loads(json.dumps(made))  # tuples become lists, as in the file


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


@dataclasses.dataclass
class Comparison:
    """The runs of rows and methods, from the cache or trained.

    **Arguments:**

    - `cache`, `trainer`: where runs are kept and made; without a trainer, only what is cached
      counts.
    - `console`, `progress`: where it says what it does.
    """

    cache: Cache
    trainer: Trainer | None
    console: Console
    progress: Progress
    trained: int = 0
    _chosen: dict[tuple[str, str], Settings] = dataclasses.field(default_factory=dict)

    def run(self, row: Row, method: Method, settings: Settings, seed: int) -> Run | None:
        """The run with these settings; nothing if it is not cached and must not be trained."""
        found = self.cache.read(row.task, method, settings, seed)
        if found is not None or self.trainer is None:
            return found
        label = f"{row.name}, {method.name}, {describe(method, settings)}, " + (
            "tuning" if seed == TUNING_SEED else f"seed {seed}"
        )
        bar = self.progress.add_task(label, total=None)
        begin = time.perf_counter()
        found = self.trainer.train(
            row.task,
            method,
            settings,
            seed,
            lambda done, total: self.progress.update(bar, completed=done, total=total),
        )
        self.progress.remove_task(bar)
        self.cache.write(row.task, method, settings, seed, found)
        self.trained += 1
        end = found.validation[-1]
        self.console.print(
            f"{time.strftime('%H:%M:%S')} {label}: validation {end.score:.4f}, "
            f"{time.perf_counter() - begin:.1f} s ({found.seconds:.1f} s training)",
            highlight=False,
        )
        return found

    def choose(self, row: Row, method: Method) -> Settings | None:
        """The method's settings on this row; nothing if some of the search is not cached."""
        if not method.tuned:
            return method.settings
        if (row.name, method.name) in self._chosen:
            return self._chosen[row.name, method.name]
        numbers = list(FIRST_RATES)
        names = list(method.choices)
        preferences: dict[tuple[float, ...], tuple[float, float]] = {}

        def settings(number: float, *values: float) -> Settings:
            return {"rate": rate_of(int(number)), **dict(zip(names, values, strict=True))}

        while True:
            for key in itertools.product(numbers, *method.choices.values()):
                if key not in preferences:
                    run = self.run(row, method, settings(*key), TUNING_SEED)
                    if run is None:
                        return None
                    preferences[key] = run.preference(row)
            best, *values = max(sorted(preferences), key=lambda key: preferences[key])
            if best == numbers[0] and best > LEAST_RATE:
                numbers.insert(0, int(best) - 1)
            elif best == numbers[-1] and best < LARGEST_RATE:
                numbers.append(int(best) + 1)
            else:
                break
        return self._chosen.setdefault((row.name, method.name), settings(best, *values))

    def runs(self, row: Row, method: Method, seeds: Sequence[int]) -> dict[int, Run]:
        """The reported runs that there are, by seed."""
        settings = self.choose(row, method)
        if settings is None:
            return {}
        found = {seed: self.run(row, method, settings, seed) for seed in seeds}
        return {seed: run for seed, run in found.items() if run is not None}


def rate_of(number: int) -> float:
    """The rate with this number, see `FIRST_RATES`."""
    return float(f"{(1, 3)[number % 2]}e{number // 2}")


def describe(method: Method, settings: Settings) -> str:
    """Settings in a few words."""
    if method.tuned:
        words = [f"rate {settings['rate']:g}"]
        if "cosine" in settings:
            words.append("cosine" if settings["cosine"] else "constant")
        further = settings.keys() - {"rate", "cosine"}
        return ", ".join([*words, *(f"{name} {settings[name]:g}" for name in sorted(further))])
    words = [f"{name} {value:g}" for name, value in settings.items()]
    return ", ".join([*words, method.description] if method.description else words) or "fixed"


def applies(row: Row, method: Method) -> bool:
    """Whether the method takes part in the row."""
    if method.rows and row.name not in method.rows:
        return False
    return not row.reflecting_only or (method.kind == "pure" and method.reflecting)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A line of the table: means over seeds, with their standard errors.

    `difference` is the method's mean minus Adam's over the seeds that both have, `holds` whether
    each of the row's bounds does (`None` where runs are missing), `seconds` the mean training time,
    until the score is reached where a row asks for that.
    """

    row: Row
    method: Method
    settings: Settings | None
    seeds: int
    mean: float
    error: float
    difference: float
    difference_error: float
    seconds: float
    missed: int
    holds: tuple[bool | None, ...]


def summarise(
    comparison: Comparison, row: Row, method: Method, baseline: Comparison, seeds: Sequence[int]
) -> Summary:
    """The line of a method on a row; `baseline` knows the runs of Adam and of other baselines."""
    runs = comparison.runs(row, method, seeds)
    results = {seed: run.result(row) for seed, run in runs.items()}
    mean, error = mean_and_error(list(results.values()))

    def results_of(name: str) -> dict[int, float]:
        if name == method.name or row.reflecting_only:
            return {}
        return {
            seed: run.result(row) for seed, run in baseline.runs(row, METHODS[name], seeds).items()
        }

    def holds(bound: Bound) -> bool | None:
        base = results_of(bound.beside) if bound.paired else {}
        if len(results) < len(seeds) or (bound.paired and len(base) < len(seeds)):
            return None
        better = [row.sign * (results[seed] - base[seed]) for seed in sorted(base)]
        beside = statistics.fmean(base.values()) if base else math.nan
        return bound.holds(mean, beside, *mean_and_error(better))

    base = results_of(ADAM.name)
    common = sorted(results.keys() & base.keys())
    difference, difference_error = mean_and_error([results[seed] - base[seed] for seed in common])
    ends = [run.reached(row.reach) if row.reach else run.validation[-1] for run in runs.values()]
    seconds = [end.seconds if end else math.inf for end in ends]
    return Summary(
        row,
        method,
        comparison.choose(row, method) if runs else None,
        len(results),
        mean,
        error,
        difference,
        difference_error,
        statistics.fmean(seconds) if seconds else math.nan,
        sum(math.isinf(result) for result in results.values()),
        tuple(holds(bound) for bound in row.bounds(method.kind)),
    )


def compare(
    rows: Sequence[Row],
    methods: Sequence[Method],
    seeds: int,
    cache: Path,
    data_dir: str | None,
    console: Console,
    train: bool = True,
) -> tuple[list[Summary], int]:
    """The lines of the table, and how many runs were trained for them.

    All rows get their first seed before any gets its second. Adam is the baseline of every row, and
    bounds name others; unless they are among `methods`, their runs are taken from the cache if they
    are there.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    trainer = Trainer(data_dir) if train else None
    comparison = Comparison(Cache(cache), trainer, console, progress)
    baseline = Comparison(Cache(cache), None, console, progress)
    pairs = [(row, method) for row in rows for method in methods if applies(row, method)]
    with progress:
        for seed in range(seeds if train else 0):
            for row, method in pairs:
                comparison.runs(row, method, [seed])
    summaries = [
        summarise(comparison, row, method, baseline, range(seeds)) for row, method in pairs
    ]
    return summaries, comparison.trained


COLUMNS = ("row", "method", "setting", "seeds", "result", "− Adam", "train s", "asked", "holds")


def cells(summary: Summary) -> list[str]:
    """The texts of a line, one for each column."""
    row, method = summary.row, summary.method
    percent = not row.reach and not row.task.uses_auc and not row.smaller
    unit = 100 if percent else 1
    digits = 2 if percent else 0 if row.reach else 4

    def number(mean: float, error: float, sign: str = "") -> str:
        if math.isnan(mean):
            return "–"
        if math.isinf(mean):
            return "never" if mean > 0 else "sooner"
        text = f"{unit * mean:{sign}.{digits}f}"
        return text if math.isnan(error) else f"{text} ± {unit * error:.{max(digits, 1)}f}"

    result = number(summary.mean, summary.error)
    if percent and summary.seeds:
        result += " %"
    elif row.reach and summary.seeds and not summary.missed:
        result += " batches"
    if summary.missed:
        what = "not reached by" if row.reach else "not finite for"
        result = f"{what} {summary.missed} of {summary.seeds}"
    asked = [bound.describe(percent, row.smaller) for bound in row.bounds(method.kind)]
    return [
        row.name,
        method.name,
        describe(method, summary.settings) if summary.settings is not None else "–",
        str(summary.seeds),
        result,
        number(summary.difference, summary.difference_error, "+"),
        "–" if not math.isfinite(summary.seconds) else f"{summary.seconds:.1f}",
        "; ".join(asked),
        "; ".join({None: "?", True: "yes", False: "no"}[held] for held in summary.holds)
        if any(held is not None for held in summary.holds)
        else "",
    ]


def notes(summaries: Sequence[Summary]) -> list[str]:
    """What must be known to read the table."""
    rows = {summary.row.name: summary.row for summary in summaries}
    lines = [f"{row.name}: {row.note}." for row in rows.values() if row.note]
    return [
        "Means over seeds ± standard errors; − Adam: paired, in points, AUC, batches or loss.",
        "Train s: mean training time, without compiling and measuring, on this machine.",
        *lines,
    ]


def markdown(summaries: Sequence[Summary]) -> str:
    """The table in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(cells(summary) for summary in summaries)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"- {note}" for note in notes(summaries)), ""])


def show(summaries: Sequence[Summary], console: Console) -> None:
    """Prints the table."""
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for before, summary in zip([None, *summaries], summaries, strict=False):
        if before is not None and before.row != summary.row:
            table.add_section()
        table.add_row(*cells(summary))
    console.print(table, highlight=False)
    for note in notes(summaries):
        console.print(note, highlight=False)


def table_parser(
    name: str,
    description: str,
    rows: Mapping[str, Any],
    methods: Mapping[str, Any],
    seeds: int,
) -> argparse.ArgumentParser:
    """The options of a command that fills a table, cell by cell in `runs/NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--data-dir", default=os.environ.get("PJAX_DATA_DIR"))
    for option, choices in (("--rows", rows), ("--methods", methods)):
        parser.add_argument(
            option, nargs="+", choices=choices, default=list(choices), metavar="NAME"
        )
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--cache", type=Path, default=Path("runs") / name)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--cached", action="store_true", help="train nothing, show what is there")
    parser.add_argument("--list", action="store_true", help="name the rows and methods")
    return parser


def print_names(console: Console, rows: Iterable[str], methods: Iterable[str]) -> int:
    """What `--list` prints."""
    console.print("rows:", *rows, sep="\n  ", highlight=False)
    console.print("methods:", *methods, sep="\n  ", highlight=False)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0, 1 after an error, 130 after Ctrl-C."""
    parser = table_parser("accuracy", "Scores beside tuned baselines'.", ROWS, METHODS, seeds=5)
    options = parser.parse_args(arguments)
    console = terminal.console(160)
    if options.list:
        return print_names(console, ROWS, METHODS)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    methods = [METHODS[name] for name in options.methods]
    for method in methods:
        if not method.available:
            console.print(f"{method.name} is left out: there is no pjax.{method.requires}.")
    methods = [method for method in methods if method.available]
    rows = [ROWS[name] for name in options.rows]
    try:
        summaries, _ = compare(
            rows,
            methods,
            options.seeds,
            options.cache,
            options.data_dir,
            console,
            train=not options.cached,
        )
        show(summaries, console)
        if options.markdown:
            options.markdown.write_text(markdown(summaries), "utf-8")
    except DataError as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.accuracy: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
