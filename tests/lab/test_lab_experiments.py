"""Experiments as files: all that are shipped are sound, and each kind runs, goes on and reports."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from pjax.lab import baselines, cli, config, runs
from pjax.lab.errors import UsageError
from pjax.lab.experiments import definition, measures, running
from pjax.lab.train import Training
from tests.selection import mostly_slow

ACCURACY = """
title = "Widths at $5^ and $6"
shows = "two widths"
kind = "accuracy"
figure = "{figure}"

[settings]
hidden = [6]
batch_size = 256
steps = 8
measure_every = 4
seeds = [0, 1]
methods = ["sgd"]

[quick]
steps = 4
seeds = [0]
methods = ["adam"]
entries = ["wide"]

[[entries]]
name = "narrow"
x = 5
hidden = [5]
methods = ["sgd", "adam"]

[[entries]]
name = "wide"
x = 6
"""

MEASURED = {
    "cost": 'methods = ["sgd", "adam"]\nsteps = 3',
    "residual": 'methods = ["dr"]\nprojection_steps = 400\nsplitting = "neuron"',
    "sizes": 'methods = ["dr", "sgd"]\nprojection_steps = 2\nsplitting = "neuron"',
}


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def measured(folder: Path, kind: str, settings: str = "") -> Path:
    text = f'title = "T"\nshows = "S"\nkind = "{kind}"\n[settings]\nhidden = []\nbatch_size = 16\n'
    text += f'{settings or MEASURED[kind]}\n[[entries]]\nname = "one"\nx = 1\n'
    return write(folder, text)


def run(path: Path, folder: Path, *more: str) -> int:
    return cli.main(["experiment", "run", str(path), "--runs-dir", str(folder), *more])


def check_picture(path: Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """What trains, by method, and what is searched for; searches are not made, to be quick."""
    seen: list[str] = []
    init = Training.__init__

    def counted(self, method, *args, **settings):
        seen.append(method.name)
        init(self, method, *args, **settings)

    def counted_search(name, *args, **settings):
        seen.append(f"{name} rates")
        return [baselines.Candidate(0.1, 0, 0.5), baselines.Candidate(0.2, 0, 0.4)]

    monkeypatch.setattr(Training, "__init__", counted)
    monkeypatch.setattr(baselines, "search", counted_search)
    return seen


@pytest.mark.parametrize("name", definition.names())
@pytest.mark.parametrize("quick", [False, True])
def test_every_file_that_is_shipped_is_sound(name: str, quick: bool) -> None:
    one = definition.read(definition.find(name), quick)
    assert one.entries
    assert one.quick is quick
    assert 0 < one.minutes[1] < one.minutes[0]
    assert len(one.shows) <= 100
    full = definition.read(definition.find(name))
    assert {entry.name for entry in one.entries} <= {entry.name for entry in full.entries}
    for entry in one.entries:
        assert entry.settings.problem() is None
    if quick:  # It must be less.
        assert one.entries != full.entries


def test_the_paper_has_its_experiments() -> None:
    assert set(definition.names()) >= {
        "algorithms", "depth", "cost", "mlp", "cnn", "rnn", "residual", "sizes", "quantized"
    }  # fmt: skip


def test_list_shows_each_with_what_it_is(capsys) -> None:
    assert cli.main(["experiment", "list"]) == 0
    printed = capsys.readouterr().out
    for name in definition.names():
        assert name in printed
    assert "residual of one solve" in printed


def test_an_experiment_of_accuracies(tmp_path: Path, capsys, trained) -> None:
    path = write(tmp_path, ACCURACY.format(figure="against"))
    assert run(path, tmp_path) == 0
    assert trained == ["sgd rates", "sgd", "adam rates", "adam", "sgd rates", "sgd"]
    folder = tmp_path / "mine"
    check_picture(folder / running.FIGURE)
    results = json.loads((folder / running.RESULTS).read_text())
    assert results["complete"] is True
    assert [one["x"] for one in results["entries"]] == [5, 6]
    table = (folder / running.TABLE).read_text()
    tests = {
        (entry["name"], one["method"]): [seed["test_accuracy"] for seed in one["seeds"]]
        for entry in results["entries"]
        for one in entry["methods"]
    }
    assert list(tests) == [("narrow", "sgd"), ("narrow", "adam"), ("wide", "sgd")]
    for (entry, method), both in tests.items():
        assert f"| {entry} | {method} |" in table
        error = np.std(both, ddof=1) / 2**0.5
        assert f"| {100 * np.mean(both):.2f} ± {100 * error:.2f} |" in table
    paired = np.subtract(tests["narrow", "sgd"], tests["narrow", "adam"])
    difference = f"{100 * paired.mean():+.2f} ± {100 * np.std(paired, ddof=1) / 2**0.5:.2f}"
    assert f"| {difference} |" in table
    # All is there: nothing is trained, and the same is written.
    trained.clear()
    assert run(path, tmp_path) == 0
    assert trained == []
    assert json.loads((folder / running.RESULTS).read_text())["entries"] == results["entries"]
    assert (folder / running.TABLE).read_text() == table
    # It says what computed each part, not what wrote the table.
    (cell, *_) = folder.glob(f"{running.ENTRIES}/narrow/cells/sgd.seed*.json")
    cell.write_text(json.dumps(json.loads(cell.read_text()) | {"computer": "an abacus"}))
    assert run(path, tmp_path) == 0
    here, both = f", {runs.computer()}\n", f", an abacus and {runs.computer()}\n"
    assert here in table
    assert (folder / running.TABLE).read_text() == table.replace(here, both)
    # What was changed needs another folder.
    capsys.readouterr()
    write(tmp_path, ACCURACY.format(figure="rows").replace("steps = 8", "steps = 9"))
    assert run(path, tmp_path) == 1
    assert "is a comparison with steps 8, not 9" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on_and_nothing_is_trained_twice(
    tmp_path: Path, capsys, monkeypatch, trained
) -> None:
    path = write(tmp_path, ACCURACY.format(figure="curves"))
    advance = Training.advance

    def pressed(self):
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Training, "advance", pressed)
    assert run(path, tmp_path, "--quick") == 130
    name, folder = "mine-quick", tmp_path / "mine-quick"
    printed = capsys.readouterr().out
    assert f"Go on with: pjax experiment run {path} --quick --runs-dir {tmp_path}" in printed
    assert trained == ["adam rates", "adam"]
    assert json.loads((folder / running.RESULTS).read_text())["complete"] is False
    monkeypatch.setattr(Training, "advance", advance)
    for figure, left in (("curves", ["adam"]), ("rows", [])):
        write(tmp_path, ACCURACY.format(figure=figure))
        trained.clear()
        assert run(path, tmp_path, "--quick", "--name", name) == 0
        assert trained == left
        check_picture(folder / running.FIGURE)
    quick = json.loads((folder / running.RESULTS).read_text())
    assert [one["name"] for one in quick["entries"]] == ["wide"]
    assert quick["entries"][0]["config"]["steps"] == 4
    assert "--quick" in (folder / running.TABLE).read_text()


@pytest.mark.parametrize("kind", mostly_slow(MEASURED, ["sizes"]))
def test_a_measurement_is_made_once_and_written(tmp_path: Path, monkeypatch, kind: str) -> None:
    path, folder = measured(tmp_path, kind), tmp_path / "mine"
    original = measures.MEASURES[kind]

    def pressed(settings, dataset, model, tick):
        signal.raise_signal(signal.SIGINT)
        return original(settings, dataset, model, tick)

    monkeypatch.setitem(measures.MEASURES, kind, pressed)
    assert run(path, tmp_path) == 130
    assert json.loads((folder / running.RESULTS).read_text())["entries"] == []
    monkeypatch.setitem(measures.MEASURES, kind, original)
    assert run(path, tmp_path) == 0
    (entry,) = json.loads((folder / running.RESULTS).read_text())["entries"]
    check_picture(folder / running.FIGURE)
    table = (folder / running.TABLE).read_text()
    assert [row["method"] for row in entry["methods"]] == entry["config"]["methods"]
    assert all(f"| one | {row['method']} |" in table for row in entry["methods"])
    if kind == "cost":
        sgd, adam = entry["methods"]
        assert adam["relative"] == 1
        assert sgd["relative"] > 0
        assert all(one["milliseconds"] > 0 for one in entry["methods"])
    elif kind == "residual":
        # 16 rows of 64 pixels: a linear classifier satisfies all.
        for row in entry["methods"]:
            assert row["last"] < 1e-4 * row["first"]
            assert row["satisfied"] == 16
            assert row["verdict"] == "converging"
    else:
        dr, sgd = entry["methods"]
        assert dr["predicted_bytes"] == dr["allocated_bytes"] == 4 * dr["stored"]
        assert sgd["edge_variables"] is None
        assert 0 < sgd["temporary_bytes"] < dr["temporary_bytes"]

    def fail(*args):
        raise AssertionError("measured again")

    monkeypatch.setitem(measures.MEASURES, kind, fail)
    assert run(path, tmp_path) == 0
    cell = folder / running.ENTRIES / "one" / "cells" / running.MEASURE
    cell.write_text('{"rows": [{"method": 3}]}')
    monkeypatch.setitem(measures.MEASURES, kind, original)
    assert run(path, tmp_path) == 0
    assert json.loads(cell.read_text())["kind"] == kind


@pytest.mark.slow
def test_sizes_are_those_that_can_be_counted_by_hand(tmp_path: Path) -> None:
    settings = (
        'model = "cnn"\nchannels = [2]\nbatch_size = 3\nmethods = ["ap", "dr"]\n'
        'splitting = "neuron"\nprojection_steps = 2'
    )
    text = f'title = "T"\nshows = "S"\nkind = "sizes"\n[settings]\n{settings}\n'
    path = write(tmp_path, f'{text}[[entries]]\nname = "one"\nx = 1\n')
    assert run(path, tmp_path) == 0
    (entry,) = json.loads((tmp_path / "mine" / running.RESULTS).read_text())["entries"]
    ap, dr = entry["methods"]
    assert ap["edge_variables"] == dr["edge_variables"]
    assert ap["stored"] <= dr["stored"] <= dr["edge_variables"]
    # Of the dense layer alone, 4 · 4 · 2 inputs: a pair for each row, output and input.
    assert ap["edge_variables"] > 2 * 3 * 10 * 32


@pytest.mark.slow
def test_rows_that_no_classifier_separates_leave_a_residual(tmp_path: Path) -> None:
    settings = 'methods = ["ap"]\nprojection_steps = 400\nsplitting = "neuron"\nbatch_size = 1000'
    path = measured(tmp_path, "residual", settings.replace("batch_size = 1000", ""))
    text = path.read_text().replace("batch_size = 16", "batch_size = 1000")
    path.write_text(text)
    assert run(path, tmp_path) == 0
    (entry,) = json.loads((tmp_path / "mine" / running.RESULTS).read_text())["entries"]
    (row,) = entry["methods"]
    assert row["last"] > 1e-3 * row["first"]
    assert row["satisfied"] < 1000


def test_an_unknown_name_lists_the_names(capsys) -> None:
    assert cli.main(["experiment", "run", "dept"]) == 1
    error = capsys.readouterr().err
    assert "no experiment 'dept'. Did you mean depth?" in error
    assert all(name in error for name in definition.names())
    with pytest.raises(UsageError, match="no such file"):
        definition.find("missing.toml")


BASE = ACCURACY.format(figure="curves")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no settings"),
        ("title = ", "not valid TOML"),
        (BASE.replace('kind = "accuracy"', ""), "kind is missing"),
        (BASE.replace('"accuracy"', '"speed"'), "kind must be one of accuracy, cost"),
        (BASE.replace('"curves"', '"pie"'), "figure must be one of"),
        (BASE.replace("figure", "figures"), "no key 'figures'; did you mean figure?"),
        (
            BASE.replace('title = "Widths at $5^ and $6"', "title = 3"),
            "title must be a text on one line, got 3",
        ),
        (BASE.replace("hidden = [5]", "hiden = [5]"), "'narrow': there is no setting 'hiden'"),
        (BASE.replace("hidden = [5]", "hidden = [0]"), "entry 'narrow': hidden takes positive"),
        (BASE.replace("steps = 8", 'steps = "8"'), "entry 'narrow': steps must be an integer"),
        (BASE.replace("x = 5", 'x = "5"'), "x of entry 'narrow' must be a number"),
        (BASE.replace('"wide"', '"Narrow"'), "two entries have the same name"),
        (BASE.replace('name = "wide"', ""), "entry 2 needs a name"),
        (BASE.replace('name = "wide"', 'name = "../up"'), "must be the name of a folder"),
        (BASE.replace('["wide"]', '["thin"]'), "quick.entries must be a list of names"),
        (BASE.replace("[settings]", "[[settings]]"), "settings must be a table"),
        (BASE.split("[[entries]]")[0] + "[entries]\na = 1\n", "entries must be a list of tables"),
        (BASE.replace("x = 6", "").replace("curves", "against"), "entry 'wide' needs x, a number"),
        (BASE.replace('"accuracy"', '"residual"'), "must be of projection"),
        (BASE.replace('kind = "accuracy"', 'kind = "accuracy"\nminutes = 3'), "minutes must"),
        (BASE.replace("steps = 8", 'steps = 8\nmodel = "rnn"'), "model must be mlp or cnn"),
        (
            BASE.replace('["sgd", "adam"]', '["straight-through"]'),
            "methods straight-through needs the activation sign or four-level",
        ),
    ],
)
def test_a_bad_file_is_one_message_with_file_and_key(
    tmp_path: Path, capsys, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    assert run(path, tmp_path) == 1
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert message in error
    assert len(error.splitlines()) == 1
    assert len(error) < 500 + len(str(path))
    assert not (tmp_path / "mine").exists()


def test_the_entries_have_the_folder_of_data_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, BASE)
    one = definition.read(path, data_dir=tmp_path)
    assert {entry.settings.data_dir for entry in one.entries} == {tmp_path}
    assert config.to_table(one.entries[0].settings)["hidden"] == [5]
