"""The command line: which command is run; `pjax graph` is here, the others in their modules."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

import pjax
from pjax.lab import (
    commands,
    data_cli,
    demo,
    experiment_cli,
    explain_cli,
    plots,
    problem_plots,
    terminal,
)
from pjax.lab.config import Maybe
from pjax.lab.data import DataError, Dataset, DatasetName, load
from pjax.lab.errors import RunError, UsageError, shown
from pjax.lab.models import MLP
from pjax.options import Splitting


@dataclasses.dataclass(frozen=True)
class Graph:
    """Print nodes, colours, edge variables and bytes of the training problem; draw its graph."""

    dataset: DatasetName = "digits"
    """digits comes with scikit-learn; the others are read from files."""
    data_dir: Maybe[Path] = None
    """Folder with the files (default: $PJAX_DATA_DIR, then the cache; see pjax data list)."""
    hidden: tuple[int, ...] = (128,)
    """Width of each hidden layer."""
    skip: bool = False
    """Let the last layer read the outputs of all hidden layers."""
    batch_size: int = 128
    """Rows in a batch."""
    seed: int = 0
    """Seed of the split and the initial parameters."""
    splitting: Splitting = "neuron"
    """A constraint for each scalar product, or for each array operation."""
    detail: problem_plots.Detail = "auto"
    """Draw every node, or every layer (auto: layers beyond 40 nodes)."""
    output: Path = Path("graph.png")
    """The picture: .png, .svg or .pdf."""
    memory: Maybe[Path] = None
    """Draw the bytes of each node too, into this file."""


#: What there is, in the order in which it is of use.
COMMANDS: dict[str, type] = {
    "demo": demo.Demo,
    "train": commands.Train,
    "compare": commands.Compare,
    "evaluate": commands.Evaluate,
    "predict": commands.Predict,
    "report": commands.Report,
    "graph": Graph,
    "explain": explain_cli.Explain,
    "experiment": experiment_cli.Command,
    "data": data_cli.Data,
}


def overview() -> str:
    """What `pjax` alone prints: each command with the first line of its docstring."""
    width = max(map(len, COMMANDS))
    lines = [
        f"  {name:<{width}}  {(kind.__doc__ or '').splitlines()[0]}"
        for name, kind in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: pjax COMMAND [options]",
            "",
            "Train networks by projection: no learning rate.",
            "",
            *lines,
            "",
            "pjax COMMAND --help shows the options of a command, pjax --version the version.",
            "Start with: pjax demo",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    **Returns:** the exit status: 0, 1 after an error, 2 for a command that there is not, 130 after
    Ctrl-C (as shells have it). Wrong options raise `SystemExit` with status 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0
    if given[0] == "--version":
        print(f"pjax {pjax.__version__} (JAX {jax.__version__})")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, "--version", "--help"], 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"pjax: there is no command {shown(name)}: {hint}", file=sys.stderr)
        return 2
    try:
        kind = COMMANDS[name]
        options: dict[str, Any] = {}
        if kind is commands.Train:
            options["default"] = commands.from_file(rest, commands.Train)
        elif kind is commands.Compare:
            options["default"] = commands.from_file(rest, commands.Compare)
        # One command alone: what it says of a typo is about this command's options.
        try:
            command = tyro.cli(
                kind, prog=f"pjax {name}", args=rest, config=(tyro.conf.DisallowNone,), **options
            )
        except SystemExit as error:
            if error.code == 2:
                _tell_options(kind, rest)
            raise
        console = terminal.console()
        match command:
            case demo.Demo():
                return demo.run(command, console)
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


def _tell_options(kind: type, given: Sequence[str]) -> None:
    """After what tyro said, the options that were meant: it tells near misses only."""
    names = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)]
    names += [f"--no-{name[2:]}" for name in names] + ["--help"]
    for one in given:
        option = one.partition("=")[0].replace("_", "-")
        near = difflib.get_close_matches(option, names, 1)
        if option.startswith("--") and option not in names and near:
            print(f"pjax: {option}: did you mean {near[0]}?", file=sys.stderr)


def _prepare(options: Graph) -> tuple[Dataset, MLP]:
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


def _title(dataset: Dataset, options: Graph) -> str:
    widths = [dataset.num_features, *options.hidden, dataset.num_classes]
    skip = " with skips" if options.skip else ""
    return (
        f"{dataset.name}, {'-'.join(map(str, widths))}{skip}, "
        f"batches of {options.batch_size}, seed {options.seed}"
    )


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
