"""Comparisons: what is trained once stays, and what the table says is what the cells hold."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from pjax.lab import baselines, cli, comparison
from pjax.lab.config import CompareConfig, make_model
from pjax.lab.data import load
from pjax.lab.train import Training, train


def arguments(folder: Path, *changes: str) -> list[str]:
    tiny = ["--hidden", "6", "--batch-size", "256", "--steps", "8", "--measure-every", "4"]
    return ["compare", *tiny, "--runs-dir", str(folder), "--name", "c", *changes]


SGD = ("--methods", "sgd", "--seeds", "0", "1")


@pytest.fixture
def trained_cells(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """What trains: a method with its seeds, or the search for a rate."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    init, search = Training.__init__, baselines.search

    def counted(self, method, *args, seeds, **settings):
        seen.append((method.name, tuple(seeds)))
        init(self, method, *args, seeds=seeds, **settings)

    def counted_search(name, *args, seed, **settings):
        seen.append((f"{name} rates", (seed,)))
        return search(name, *args, seed=seed, **settings)

    monkeypatch.setattr(Training, "__init__", counted)
    monkeypatch.setattr(baselines, "search", counted_search)
    return seen


def test_a_comparison_trains_only_what_is_missing(tmp_path: Path, capsys, trained_cells) -> None:
    assert cli.main(arguments(tmp_path, *SGD)) == 0
    assert trained_cells == [("sgd rates", (1000,)), ("sgd", (0, 1))]
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    (line,) = results["methods"]
    tests = [seed["test_accuracy"] for seed in line["seeds"]]
    error = np.std(tests, ddof=1) / 2**0.5
    assert line["test_accuracy"] == pytest.approx(np.mean(tests))
    assert line["test_accuracy_error"] == pytest.approx(error)
    assert f"{100 * np.mean(tests):.2f} ± {100 * error:.2f} %" in printed
    assert results["config"]["steps"] == 8
    for name in ("accuracy.png", "residual.png"):
        assert (tmp_path / "c" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    trained_cells.clear()
    assert cli.main(arguments(tmp_path, *SGD)) == 0
    assert trained_cells == []
    # A further seed and a further method.
    more = ("--methods", "sgd", "adam", "--seeds", "0", "1", "2")
    assert cli.main(arguments(tmp_path, *more)) == 0
    assert trained_cells == [("sgd", (2,)), ("adam rates", (1000,)), ("adam", (0, 1, 2))]
    trained_cells.clear()
    # Damaged cells, each in its way.
    cells = tmp_path / "c" / "cells"
    cell = json.loads((cells / "adam.seed1.json").read_text())
    (cells / "adam.seed1.json").write_text(json.dumps({**cell, "test_accuracy": "high"}))
    (cells / "sgd.seed0.json").write_text(json.dumps({**cell, "seed": 0}))
    (cells / "sgd.seed2.json").write_bytes((cells / "sgd.seed2.json").read_bytes()[:200])
    (cells / "adam.tuning.json").write_text('{"candidates": [[1]]}')
    capsys.readouterr()
    assert cli.main(arguments(tmp_path, *more)) == 0
    assert trained_cells == [("sgd", (0, 2)), ("adam rates", (1000,)), ("adam", (1,))]
    # A long path breaks lines.
    assert " ".join(capsys.readouterr().out.split()).count("It is made anew.") == 4


def test_ctrl_c_leaves_whole_cells_and_the_same_command_goes_on(
    tmp_path: Path, capsys, monkeypatch, trained_cells
) -> None:
    original = Training.advance

    def pressed(self):
        if self.method.name == "adam" and self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Training, "advance", pressed)
    both = ("--methods", "sgd", "adam", "--seeds", "0")
    assert cli.main(arguments(tmp_path, *both)) == 130
    printed = capsys.readouterr().out
    assert "The same command goes on" in printed
    assert "sgd" in printed
    cells = {path.name for path in (tmp_path / "c" / "cells").iterdir()}
    assert cells == {"sgd.tuning.json", "sgd.seed0.json", "adam.tuning.json"}
    monkeypatch.setattr(Training, "advance", original)
    trained_cells.clear()
    assert cli.main(arguments(tmp_path, *both)) == 0
    assert trained_cells == [("adam", (0,))]


def test_cells_hold_the_best_setting_and_what_training_alone_gives(tmp_path: Path) -> None:
    assert cli.main(arguments(tmp_path, *SGD)) == 0
    folder = tmp_path / "c"
    candidates = json.loads((folder / "cells" / "sgd.tuning.json").read_text())["candidates"]
    best = max(candidates, key=lambda one: one[2])
    dataset = load("digits")
    settings = CompareConfig(
        hidden=(6,), batch_size=256, steps=8, measure_every=4, methods=("sgd",), seeds=(0, 1)
    )
    (line,) = comparison.summarise(folder, settings)
    assert line.description == baselines.Descent("sgd", best[0], best[1], 10).description
    run = train(
        baselines.Descent("sgd", best[0], best[1], 10),
        make_model(settings, dataset),
        dataset,
        steps=8,
        batch_size=256,
        seed=1,
        measure_every=4,
    )
    cell = line.cells[1]
    assert cell.best_step == run.best_step
    assert cell.test_accuracy == pytest.approx(run.test_accuracy, abs=0.006)
    # The best rate is inside of what was tried: else the search would have gone on.
    rates = sorted({rate for rate, _, _ in candidates})
    assert rates[0] < best[0] < rates[-1]


def test_muon_and_schedule_free_are_tuned_as_others(tmp_path: Path, capsys, trained_cells) -> None:
    both = ("--methods", "muon", "schedule-free", "--seeds", "0")
    assert cli.main(arguments(tmp_path, *both, "--steps", "20")) == 0
    assert trained_cells == [
        ("muon rates", (1000,)),
        ("muon", (0,)),
        ("schedule-free rates", (1000,)),
        ("schedule-free", (0,)),
    ]
    folder = tmp_path / "c"
    found = {
        name: json.loads((folder / "cells" / f"{name}.tuning.json").read_text())["candidates"]
        for name in ("muon", "schedule-free")
    }
    assert {decay for _, decay, _ in found["muon"]} == {0, 20}
    assert {decay for _, decay, _ in found["schedule-free"]} == {0}
    muon, free = json.loads((folder / "results.json").read_text())["methods"]
    rate, decay, _ = max(found["muon"], key=lambda one: one[2])
    assert muon["description"] == f"rate {rate:g}, {'cosine' if decay else 'constant'}"
    rate, _, _ = max(found["schedule-free"], key=lambda one: one[2])
    assert free["description"] == f"rate {rate:g}, warm-up 2"
    assert min(muon["test_accuracy"], free["test_accuracy"]) > 0.3


@pytest.mark.parametrize(("best", "tried"), [(0.1, 6), (3.0, 8), (1e-2, 7)])
def test_a_search_goes_on_beyond_an_end_that_is_best(best, tried, monkeypatch) -> None:
    raced = []

    def race(name, model, dataset, candidates, *rest):
        raced.extend(candidates)
        # The further from `best`, the worse; beyond the upper end it is better still.
        return np.array(
            [-abs(np.log(rate / (best * 3.2 if best == 3 else best))) for rate, *_ in candidates]
        )

    monkeypatch.setattr(baselines, "_race", race)
    dataset = load("digits")
    settings = {"steps": 5, "batch_size": 8, "seed": 0, "measure_every": 5}
    model = make_model(CompareConfig(hidden=(6,)), dataset)
    found = baselines.search("sgd", model, dataset, extend=True, **settings)
    assert len({rate for rate, *_ in raced}) == tried
    assert len(raced) == len(set(raced)) == len(found)
    plain = baselines.search("sgd", model, dataset, **settings)
    assert {one.rate for one in plain} == set(baselines.RATES["sgd"])


def test_a_search_goes_below_rates_that_all_diverge(monkeypatch) -> None:
    def race(name, model, dataset, candidates, *rest):
        return np.array([0.04 if rate > 1e-3 else 0.5 for rate, *_ in candidates])

    monkeypatch.setattr(baselines, "_race", race)
    dataset = load("digits")
    model = make_model(CompareConfig(hidden=(6,)), dataset)
    found = baselines.search(
        "sgd", model, dataset, extend=True, steps=5, batch_size=8, seed=0, measure_every=5
    )
    assert baselines.best_of("sgd", found, 10).rate < 1e-3


def test_another_comparison_needs_another_name(tmp_path: Path, capsys) -> None:
    assert cli.main(arguments(tmp_path, *SGD)) == 0
    capsys.readouterr()
    assert cli.main(arguments(tmp_path, *SGD, "--steps", "9")) == 1
    error = capsys.readouterr().err
    assert "is a comparison with steps 8, not 9" in error
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").touch()
    assert cli.main([*arguments(tmp_path, *SGD), "--name", "d"]) == 1
    assert "is no comparison" in capsys.readouterr().err
