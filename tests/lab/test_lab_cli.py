"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import signal
import struct
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pjax
from pjax.lab import cli, commands, comparison, config, plots, problem_plots, terminal
from pjax.lab import demo as demo_module
from pjax.lab.comparison import Cell, Line
from pjax.lab.train import Record

SMALL = ["--hidden", "8", "--batch-size", "32"]


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def demo(tmp_path: Path, *arguments: str) -> int:
    return cli.main(["demo", *SMALL, *arguments, "--runs-dir", str(tmp_path / "deep")])


def test_demo_prints_a_table_and_writes_results_and_plots(tmp_path: Path, capsys) -> None:
    methods = ["projection", "adam", "ap"]
    assert demo(tmp_path, "--steps", "6", "--seeds", "0", "1", "--methods", *methods) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "deep" / "demo"
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["hidden"] == [8]
    assert results["command"].startswith("pjax demo --hidden 8 --methods projection adam ap")
    assert [line["method"] for line in results["methods"]] == methods
    for line in results["methods"]:
        assert [cell["seed"] for cell in line["seeds"]] == [0, 1]
        assert [record["step"] for record in line["seeds"][0]["records"]] == list(range(7))
        assert f"{100 * line['test_accuracy']:.2f}" in printed
    projection, adam, ap = results["methods"]
    assert projection["description"] == "no learning rate"
    assert ap["description"] == "neuron, 50 steps per batch"
    # What Adam was tuned over can be read, and the best on validation rows was taken.
    tried = results["tuning"]["adam"]
    rate, decay, _ = max(tried, key=lambda one: one[2])
    assert len(tried) >= 12
    assert adam["description"] == f"rate {rate:g}, {'cosine' if decay else 'constant'}"
    rows = [line for line in printed.splitlines() if " %" in line]
    assert "projection (recommended)" in rows[0]
    assert "Adam, tuned" in rows[1]
    assert "alternating projections" in rows[2]
    assert "projection has no learning rate" in printed
    for name in ("accuracy.png", "residual.png"):
        assert min(png_size(folder / name)) > 300


def test_a_demo_replaces_a_demo_and_nothing_else(tmp_path: Path, capsys) -> None:
    for steps in ("2", "3"):
        assert demo(tmp_path, "--steps", steps, "--methods", "sgd", "--seeds", "0") == 0
    folder = tmp_path / "deep" / "demo"
    assert json.loads((folder / "results.json").read_text())["config"]["steps"] == 3
    (folder / "results.json").write_text('{"command": "pjax compare"}')
    capsys.readouterr()
    assert demo(tmp_path, "--steps", "2", "--methods", "sgd") == 1
    assert "is no demo: give another --name" in capsys.readouterr().err
    assert (folder / "results.json").read_text() == '{"command": "pjax compare"}'


def test_a_demo_of_defaults_is_one_that_can_be_repeated(tmp_path: Path) -> None:
    """Its command names what differs from the defaults, and the same seeds give the same."""
    accuracies = []
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        given = ["--methods", "projection", "--steps", "3", "--seeds", seed, "--name", name]
        assert demo(tmp_path, *given) == 0
        results = json.loads((tmp_path / "deep" / name / "results.json").read_text())
        (line,) = results["methods"]
        accuracies.append([one["validation_accuracy"] for one in line["seeds"][0]["records"]])
    assert accuracies[0] == accuracies[1] != accuracies[2]
    assert "--seeds 4 --name other" in results["command"]


def test_the_batch_at_which_an_accuracy_is_reached() -> None:
    def cell(seed: int, *accuracies: float) -> Cell:
        records = tuple(
            Record(step=10 * number, seconds=4.0 * number, validation_accuracy=one, residual=0.0)
            for number, one in enumerate(accuracies)
        )
        return Cell("adam", "", seed, 2, 0, 20, "", 0.0, 0.0, 8.0, 0.0, None, records)

    line = Line("adam", "", (cell(0, 0.1, 0.8, 0.9), cell(1, 0.1, 0.6, 0.9)))
    assert demo_module.reached(line, 0.7) == (10, 2.0)
    assert demo_module.reached(line, 0.71) == (20, 4.0)
    assert demo_module.reached(line, 0.91) is None


def test_ctrl_c_reports_on_methods_that_are_trained(tmp_path: Path, capsys, monkeypatch) -> None:
    original = comparison._train

    def interrupted(folder, settings, dataset, model, on_step, should_stop):
        def press(label, done, total):
            on_step(label, done, total)
            if settings.method == "projection" and done == 4:
                signal.raise_signal(signal.SIGINT)

        return original(folder, settings, dataset, model, press, should_stop)

    monkeypatch.setattr(comparison, "_train", interrupted)
    before = signal.getsignal(signal.SIGINT)
    given = ["--steps", "40", "--seeds", "0", "--methods", "dr", "projection", "adam"]
    assert demo(tmp_path, *given) == 130
    assert signal.getsignal(signal.SIGINT) == before
    printed = capsys.readouterr().out
    assert "Stopped: methods that were not trained to their end are left out." in printed
    folder = tmp_path / "deep" / "demo"
    (line,) = json.loads((folder / "results.json").read_text())["methods"]
    assert line["method"] == "dr"
    png_size(folder / "accuracy.png")


def test_pjax_alone_shows_what_there_is(capsys) -> None:
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: pjax COMMAND")
    for name in cli.COMMANDS:
        assert f"\n  {name} " in printed
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"pjax {pjax.__version__} ")


def test_help_spells_methods_out_and_shows_each_default_once(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert "{None}" not in printed
        assert "default: None" not in printed
        for text in printed.split("--"):
            assert text.count("(default") <= 1
        if name == "train":
            words = " ".join(printed.replace("│", " ").split()).lower()
            for key, text in config.NAMES.items():
                assert key in words
                assert text.lower() in words or key in ("schedule-free", "straight-through")


def test_one_name_for_one_thing_in_all_commands() -> None:
    """An option of one name has one type; folders of files are `data_dir`, of runs `runs_dir`."""
    seen: dict[str, Any] = {}
    for kind in (demo_module.Demo, cli.Graph, commands.Train, commands.Compare, commands.Report):
        for name, hint in typing.get_type_hints(kind).items():
            if name not in ("dataset", "methods", "run", "output"):
                assert seen.setdefault(name, hint) == hint, name


def test_a_typo_is_told_by_this_command(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--stpes", "3"])
    assert caught.value.code == 2
    told = "".join(capsys.readouterr())
    assert "--steps" in told
    assert "pjax train --help" in told
    for other in ("demo", "compare"):
        assert other not in told


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["report", "--otu", "x"], "--output"),
        (["predict", "run", "--imput=x"], "--input"),
        (["train", "--no-standardize"], "--no-standardise"),
        (["compare", "--batchsize", "3"], "--batch-size"),
    ],
)
def test_a_typo_is_answered_with_the_option_that_was_meant(given, meant, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(given)
    option = given[-2] if given[-1] in ("x", "3") else given[-1].partition("=")[0]
    assert capsys.readouterr().err.endswith(f"pjax: {option}: did you mean {meant}?\n")


def test_a_command_that_there_is_not_is_told_the_nearest(capsys) -> None:
    assert cli.main(["grph"]) == 2
    assert capsys.readouterr().err == "pjax: there is no command 'grph': did you mean graph?\n"
    assert cli.main(["--versoin"]) == 2
    assert capsys.readouterr().err.endswith("did you mean --version?\n")


def test_graph_lists_every_node_and_draws_it(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "graph.png"
    arguments = ["graph", "--hidden", "8", "8", "--skip", "--batch-size", "32"]
    assert cli.main([*arguments, "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    for word in ("dense.0.weight", "relu.1.bias", "output.weight", "sum_relu", "cross_entropy"):
        assert word in printed
    assert ".py:" not in printed  # all lines are the library's own
    # Every scalar product has its own copies: 2 per multiplication, 1 where the input is data.
    rows, features, hidden, classes = 32, 64, 8, 10
    for variables in (
        rows * features * hidden,
        2 * rows * hidden * hidden,
        2 * rows * 2 * hidden * classes,
    ):
        assert f"{variables:,}" in printed
    assert min(png_size(picture)) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--hidden", "8", "0"], "--hidden"),
        (["demo", "--batch-size", "5000"], "--batch-size must be from 1 to 1077"),
        (["demo", "--seeds", "-1"], "--seeds"),
        (["demo", "--name", "a/b"], "--name"),
        (["demo", "--dataset", "mnist", "--data-dir", "/nowhere"], "/nowhere: no such folder"),
        (["demo", "--runs-dir", "/dev/null/x"], "cannot create the folder"),
        (["train", "--runs-dir", "/dev/null/x"], "cannot create the folder"),
        (["compare", "--runs-dir", "/dev/null/x"], "cannot create the folder"),
        (["graph", "--batch-size", "0"], "--batch-size"),
        (["graph", "--output", "/dev/null/graph.png"], "/dev/null"),
    ],
)
def test_wrong_options_give_one_line(arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("pjax: ")
    assert message in error
    assert error.count("\n") == 1


def test_unknown_options_end_with_a_usage_error(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", "--method", "newton"])
    assert caught.value.code == 2


def test_bytes_are_written_with_a_unit() -> None:
    assert [terminal.in_bytes(n) for n in (0, 999, 1000, 123_456, 5_000_000, 7 * 10**9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "123 kB",
        "5 MB",
        "7 GB",
    ]


def test_layout_runs_left_to_right_and_no_two_nodes_meet() -> None:
    edges = [(0, 2), (1, 2), (2, 3), (4, 5), (3, 5), (2, 5)]
    places = problem_plots._layout(range(6), edges)
    assert all(places[start][0] < places[end][0] for start, end in edges)
    assert len(set(places.values())) == 6
    assert places[4][0] == places[5][0] - 1  # a parameter stands next to its reader


def test_a_deep_graph_can_be_drawn(tmp_path: Path) -> None:
    nodes = [SimpleNamespace(index=i, name=f"n{i}", colour="AB"[i % 2]) for i in range(60)]
    figure = problem_plots._draw_nodes(nodes, [(i, i + 1) for i in range(59)])
    plots.save(figure, tmp_path / "graph.png")
    width, height = png_size(tmp_path / "graph.png")
    assert width > 10 * height


def test_a_run_that_measured_nothing_can_be_drawn(tmp_path: Path) -> None:
    nothing = np.full((1, 1), np.nan)
    start = plots.Curve("sgd", np.zeros(1), np.zeros(1), np.full((1, 1), 0.1), nothing)
    plots.plot_residual_curves([start], tmp_path / "residual.png", "nothing yet")
    plots.plot_curves([start], tmp_path / "accuracy.png", "nothing yet")
    png_size(tmp_path / "residual.png")
    png_size(tmp_path / "accuracy.png")


def test_figures_say_methods_in_words_below_the_curves(monkeypatch, tmp_path: Path) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    steps, values = np.arange(3.0), np.array([[0.1, 0.5, 0.9]])
    curves = [plots.Curve(name, steps, steps, values, values) for name in config.NAMES]
    plots.plot_curves(curves, tmp_path / "accuracy.png", "all")
    (figure,) = saved
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*config.NAMES.values()]
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours == [plots.COLOURS[name] for name in config.NAMES]
    assert len(set(colours)) == len(config.NAMES)
