"""The command line: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import signal
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from pjax.lab import cli, plots, problem_plots, terminal
from pjax.lab.train import Record, Run

SMALL = ["--hidden", "8", "--batch-size", "32", "--projection-steps", "3"]


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_demo_prints_a_table_and_writes_results_and_plots(tmp_path: Path, capsys) -> None:
    out = tmp_path / "deep" / "folder"
    arguments = ["demo", *SMALL, "--steps", "6", "--method", "ap", "sgd", "--output-dir", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["hidden"] == [8]
    projected, gradient = results["runs"]
    assert (projected["method"], gradient["method"]) == ("ap", "sgd")
    for run in (projected, gradient):
        assert [record["step"] for record in run["records"]] == list(range(7))
        assert f"{run['test_accuracy']:.2%}" in printed
        assert run["state_bytes"] > 0
    assert projected["records"][-1]["residual"] > 0
    assert gradient["records"][-1]["residual"] is None
    assert gradient["description"].startswith("rate ")
    for name in ("accuracy.png", "residual.png"):
        assert min(png_size(out / name)) > 300


def test_the_same_seed_gives_the_same_results(tmp_path: Path) -> None:
    accuracies = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        out = tmp_path / name
        arguments = ["demo", *SMALL, "--method", "sgd", "--steps", "3", "--seed", str(seed)]
        assert cli.main([*arguments, "--output-dir", str(out)]) == 0
        (run,) = json.loads((out / "results.json").read_text())["runs"]
        accuracies.append([record["validation_accuracy"] for record in run["records"]])
    assert accuracies[0] == accuracies[1] != accuracies[2]


def test_ctrl_c_finishes_the_step_and_reports(tmp_path: Path, capsys, monkeypatch) -> None:
    original = cli.train

    def interrupted_train(*args, on_step, **settings):
        def press(step, record):
            on_step(step, record)
            if step == 4:
                signal.raise_signal(signal.SIGINT)

        return original(*args, on_step=press, **settings)

    monkeypatch.setattr(cli, "train", interrupted_train)
    before = signal.getsignal(signal.SIGINT)
    arguments = ["demo", *SMALL, "--steps", "200", "--method", "sgd", "adam"]
    assert cli.main([*arguments, "--output-dir", str(tmp_path)]) == 130
    assert signal.getsignal(signal.SIGINT) == before
    printed = capsys.readouterr().out
    assert "Interrupted" in printed
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["interrupted"]
    assert run["method"] == "sgd"
    assert f"{run['test_accuracy']:.2%}" in printed
    png_size(tmp_path / "accuracy.png")


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
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--dataset", "mnist", "--data-dir", "/nowhere"], "/nowhere: no such folder"),
        (["graph", "--batch-size", "0"], "--batch-size"),
        (["graph", "--output", "/dev/null/graph.png"], "/dev/null"),
    ],
)
def test_wrong_options_give_one_line(arguments, message, capsys) -> None:
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
    start = Record(0, 0.0, 0.1, float("nan"))
    run = Run("sgd", "rate 1", [start], 0, 0.1, 1.0, None, True, {})
    plots.plot_residual([run], tmp_path / "residual.png", "nothing yet")
    plots.plot_accuracy([run], tmp_path / "accuracy.png", "nothing yet")
    png_size(tmp_path / "residual.png")
    png_size(tmp_path / "accuracy.png")
