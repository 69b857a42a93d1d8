"""The command line; `pjax demo` and `pjax graph` are here, the others in `commands`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import pjax
from pjax.graph import Splitting
from pjax.lab import (
    baselines,
    commands,
    data_cli,
    experiment_cli,
    explain_cli,
    plots,
    problem_plots,
    terminal,
)
from pjax.lab.config import OPTIMIZERS
from pjax.lab.data import DataError, Dataset, DatasetName, load
from pjax.lab.errors import RunError, UsageError
from pjax.lab.models import MLP
from pjax.lab.recording import plain as plain_record
from pjax.lab.train import Method, Projection, Record, Run, train

DemoMethod = Literal["ap", "cp", "dr", "adam", "sgd"]


@dataclasses.dataclass(frozen=True)
class Network:
    """A data set and a multilayer perceptron."""

    dataset: DatasetName = "digits"
    """digits comes with scikit-learn; the others are read from files."""
    data_dir: Path | None = None
    """Folder with the files (default: $PJAX_DATA_DIR, then the cache; see pjax data list)."""
    hidden: tuple[int, ...] = (128,)
    """Width of each hidden layer."""
    skip: bool = False
    """Let the last layer read the outputs of all hidden layers."""
    batch_size: int = 128
    """Rows in a batch."""
    seed: int = 0
    """Seed of the splits, the initial parameters and the batches."""


@dataclasses.dataclass(frozen=True)
class Demo(Network):
    """Train a network by projection and by tuned gradient methods; print a table, draw plots."""

    method: tuple[DemoMethod, ...] = ("ap", "cp", "dr", "adam", "sgd")
    """Which methods, in this order."""
    steps: int = 200
    """Batches for each method."""
    projection_steps: int = 50
    """Steps of the projection algorithm on each batch."""
    output_dir: Path = Path("runs/demo")
    """Folder for results.json and the plots."""


@dataclasses.dataclass(frozen=True)
class Graph(Network):
    """Print nodes, colours, edge variables and bytes of the training problem; draw its graph."""

    splitting: Splitting = "neuron"
    """A constraint for each scalar product, or for each array operation."""
    detail: problem_plots.Detail = "auto"
    """Draw every node, or every layer (auto: layers beyond 40 nodes)."""
    output: Path = Path("graph.png")
    """The picture: .png, .svg or .pdf."""
    memory: Path | None = None
    """Draw the bytes of each node too, into this file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    **Returns:** the exit status: 0, 1 after an error, 130 after Ctrl-C (as shells have it).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = tyro.cli(
            Annotated[Demo, tyro.conf.subcommand("demo")]
            | Annotated[Graph, tyro.conf.subcommand("graph")]
            | Annotated[explain_cli.Explain, tyro.conf.subcommand("explain")]
            | Annotated[
                commands.Train,
                tyro.conf.subcommand("train", default=commands.from_file(given, commands.Train)),
            ]
            | Annotated[
                commands.Compare,
                tyro.conf.subcommand(
                    "compare", default=commands.from_file(given, commands.Compare)
                ),
            ]
            | Annotated[commands.Evaluate, tyro.conf.subcommand("evaluate")]
            | Annotated[commands.Predict, tyro.conf.subcommand("predict")]
            | Annotated[commands.Report, tyro.conf.subcommand("report")]
            | Annotated[experiment_cli.Command, tyro.conf.subcommand("experiment")]
            | Annotated[data_cli.Data, tyro.conf.subcommand("data")],  # pyright: ignore[reportArgumentType]
            prog="pjax",
            description="Train networks by projecting onto constraints.",
            args=given,
        )
        console = terminal.console()
        match command:
            case Demo():
                return demo(command, *_prepare(command), console)
            case Graph():
                return graph(command, *_prepare(command), console)
            case explain_cli.Explain():
                return explain_cli.run(command)
            case commands.Train():
                return commands.train(command, console)
            case commands.Compare():
                return commands.compare(command, console)
            case commands.Evaluate():
                return commands.evaluate(command, console)
            case commands.Predict():
                return commands.predict(command, console)
            case commands.Report():
                return commands.write_report(command, console)
            case experiment_cli.Command():
                return experiment_cli.run(command, console)
            case data_cli.Data():
                return data_cli.run(command, console)
            case _:
                raise AssertionError(command)
    except (DataError, UsageError, RunError) as error:
        print(f"pjax: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"pjax: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 1
    except pjax.TraceError as error:
        print(f"pjax: this network cannot be trained so: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        print(f"pjax: {str(error).splitlines()[0][:500]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pjax: interrupted.", file=sys.stderr)
        return 130


def _prepare(options: Network) -> tuple[Dataset, MLP]:
    if any(width < 1 for width in options.hidden):
        raise UsageError(f"--hidden takes positive widths, got {options.hidden}.")
    if options.seed < 0:
        raise UsageError(f"--seed must not be negative, got {options.seed}.")
    dataset = load(options.dataset, options.data_dir, options.seed)
    if not 1 <= options.batch_size <= len(dataset.train):
        raise UsageError(
            f"--batch-size must be from 1 to {len(dataset.train)} (training rows), "
            f"got {options.batch_size}."
        )
    model = MLP(dataset.num_features, dataset.num_classes, options.hidden, options.skip)
    return dataset, model


def demo(options: Demo, dataset: Dataset, model: MLP, console: Console) -> int:
    """Trains with each method in turn, then writes the table, `results.json` and the plots."""
    if options.steps < 1 or options.projection_steps < 1:
        raise UsageError("--steps and --projection-steps must be positive.")
    methods = tuple(dict.fromkeys(options.method))
    if not methods:
        raise UsageError("--method needs at least one method.")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    title = _title(dataset, options)
    console.print(f"[bold]{title}[/bold]")
    runs: list[Run] = []
    with terminal.interruptible() as should_stop, terminal.progress(console) as progress:
        for name in methods:
            if should_stop():
                break
            runs.append(_run(name, options, dataset, model, progress, should_stop))
        interrupted = should_stop()
    if runs:
        console.print(_results_table(runs))
        _write_results(options, runs)
        plots.plot_accuracy(runs, options.output_dir / "accuracy.png", title)
        plots.plot_residual(runs, options.output_dir / "residual.png", title)
        console.print(f"Wrote results.json, accuracy.png and residual.png to {options.output_dir}.")
    if interrupted:
        console.print("Interrupted: the table and the plots show what was there.")
    return 130 if interrupted else 0


def graph(options: Graph, dataset: Dataset, model: MLP, console: Console) -> int:
    """Prints the nodes of one batch's problem and draws its coloured graph."""
    for path in (options.output, options.memory):
        if path is not None and path.suffix not in (".png", ".svg", ".pdf"):
            raise UsageError(f"{path}: the name of a picture must end in .png, .svg or .pdf.")
    x = jnp.asarray(dataset.train.x[: options.batch_size])
    labels = jax.nn.one_hot(dataset.train.y[: options.batch_size], dataset.num_classes)
    problem = pjax.feasibility_problem(
        lambda params: pjax.cross_entropy(model.apply(params, x), labels),
        model.init(jax.random.key(options.seed)),
        splitting=options.splitting,
    )
    console.print(f"[bold]{_title(dataset, options)}[/bold]")
    console.print(_graph_table(problem))
    plots.save(problem_plots.draw_graph(problem.graph, options.detail), options.output)
    console.print(f"Drew the graph: {options.output}")
    if options.memory is not None:
        title = f"batches of {options.batch_size}"
        plots.save(problem_plots.memory_by_node(problem.sizes(), title), options.memory)
        console.print(f"Drew the memory: {options.memory}")
    return 0


def _run(
    name: DemoMethod,
    options: Demo,
    dataset: Dataset,
    model: MLP,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> Run:
    task = progress.add_task(name, total=options.steps, status="")
    settings: dict[str, Any] = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "measure_every": max(1, options.steps // 20),
        "should_stop": should_stop,
    }
    method: Method
    if name in OPTIMIZERS:
        optimizer = OPTIMIZERS[name](steps_per_update=options.projection_steps)
        description = f"{options.projection_steps} steps per batch"
        method = Projection(name, description, optimizer, dataset.num_classes)
    else:
        progress.update(task, status="tuning the rate: 6 rates, constant and cosine")
        method = baselines.tune(
            name,  # pyright: ignore[reportArgumentType]
            model,
            dataset,
            on_step=lambda step: progress.update(task, completed=step),
            **settings,
        )
    progress.update(task, completed=0, status="compiling")

    def on_step(step: int, record: Record) -> None:
        status = f"validation {record.validation_accuracy:.1%}"
        if math.isfinite(record.residual):
            status += f", residual {record.residual:.2g}"
        progress.update(task, completed=step, status=status)

    return train(method, model, dataset, on_step=on_step, **settings)


def _title(dataset: Dataset, options: Network) -> str:
    widths = [dataset.num_features, *options.hidden, dataset.num_classes]
    skip = " with skips" if options.skip else ""
    return (
        f"{dataset.name}, {'-'.join(map(str, widths))}{skip}, "
        f"batches of {options.batch_size}, seed {options.seed}"
    )


def _results_table(runs: Sequence[Run]) -> Table:
    table = terminal.table("test: accuracy of the parameters with the best validation accuracy")
    for heading in ("method", "settings"):
        table.add_column(heading, no_wrap=True)
    for heading in ("test", "batches", "train", "compile", "state"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.method,
            run.description,
            f"{run.test_accuracy:.2%}",
            f"{run.steps}",
            f"{run.seconds:.2f} s",
            f"{run.compile_seconds:.1f} s",
            "unknown" if run.state_bytes is None else terminal.in_bytes(run.state_bytes),
        )
    return table


def _write_results(options: Demo, runs: Sequence[Run]) -> None:
    def plain(run: Run) -> dict[str, Any]:
        fields = {
            field.name: getattr(run, field.name)
            for field in dataclasses.fields(run)
            if field.name not in ("params", "records")
        }
        return {**fields, "records": [plain_record(record) for record in run.records]}

    settings = {
        name: os.fspath(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }
    results = {
        "pjax": pjax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "settings": settings,
        "runs": [plain(run) for run in runs],
    }
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def _graph_table(problem: pjax.Problem) -> Table:
    sizes = problem.sizes()
    table = terminal.table(
        "class: of the node's projection; variables: edge variables, every copy counted; "
        "bytes: what alternating and cyclic projections store"
    )
    table.add_column("node", justify="right")
    for heading in ("name", "set", "class"):
        table.add_column(heading, overflow="fold")
    for heading in ("variables", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    colours = {"A": "[blue]A[/blue]", "B": "[yellow]B[/yellow]"}
    for node, size in zip(problem.graph.nodes, sizes.nodes, strict=True):
        table.add_row(
            str(node.index),
            problem_plots.label(node.name),
            colours[node.colour],
            size.exactness,
            f"{size.edge_variables:,}",
            terminal.in_bytes(size.bytes),
        )
    table.add_section()
    table.add_row(
        None, "in all", None, None, f"{sizes.edge_variables:,}", terminal.in_bytes(sizes.bytes)
    )
    return table
