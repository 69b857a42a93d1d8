"""The accuracy benchmark: runs are kept, found again, and made anew only where they must be."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import pjax
from benchmarks import accuracy, accuracy_tasks
from benchmarks.accuracy_methods import ADAM, METHODS, Method, descend, matrices
from benchmarks.accuracy_tasks import Bound, ConvolutionalTask, LossTask, Row, Task, TextTask

TINY = Row("tiny", Task("digits", hidden=(8,), epochs=1, batch_size=256), (Bound("error"),))
#: Adam again, as a method to compare.
TWIN = descend("twin", "optax", jax.value_and_grad)


def _compare(cache: Path, *methods: Method, row: Row = TINY, seeds: int = 2, train: bool = True):
    console = Console(quiet=True)
    return accuracy.compare([row], methods or (ADAM,), seeds, cache, None, console, train)


def test_runs_are_kept_found_again_and_made_anew_if_damaged(tmp_path: Path) -> None:
    (nothing,), trained = _compare(tmp_path, train=False)
    assert (nothing.seeds, trained) == (0, 0)
    (first,), trained = _compare(tmp_path)
    files = sorted(tmp_path.rglob("*.json"))
    assert trained == len(files) >= 12 + 2
    assert not list(tmp_path.rglob("*.tmp"))
    assert first.settings is not None
    assert first.settings["rate"] > 1e-4

    (again,), trained = _compare(tmp_path)
    assert trained == 0
    assert again == first

    # A run that was killed while it wrote, and files that were damaged later.
    stray = files[0].with_name(f"{files[0].name}.1.tmp")
    stray.write_text('{"key"')
    whole = json.loads(files[1].read_text())
    files[0].unlink()
    files[1].write_text(json.dumps(whole)[:-20])
    files[2].write_text(json.dumps({**whole, "key": {}}))
    files[3].write_text(json.dumps({**json.loads(files[3].read_text()), "validation": [[1]]}))
    files[4].write_bytes(b"\xff")
    (mended,), trained = _compare(tmp_path)
    assert trained == 5
    assert (mended.mean, mended.settings) == (first.mean, first.settings)
    assert stray.read_text() == '{"key"'

    (more,), trained = _compare(tmp_path, seeds=3)
    assert (more.seeds, trained) == (3, 1)


def test_methods_are_paired_with_adam_and_judged(tmp_path: Path) -> None:
    (alone,), _ = _compare(tmp_path, TWIN)
    assert (alone.seeds, alone.holds) == (2, (None,))  # Adam is not in the cache
    assert math.isnan(alone.difference)
    (adam, twin), _ = _compare(tmp_path, ADAM, TWIN)
    assert (adam.holds, twin.holds, twin.difference) == ((), (True,), 0.0)
    assert twin.settings == adam.settings
    table = accuracy.markdown([adam, twin])
    assert "| tiny | twin | rate" in table
    assert table.count("| yes |") == 1


def test_a_row_asks_several_things_beside_several_methods(tmp_path: Path, monkeypatch) -> None:
    asked = (Bound("above"), Bound("above", 0.5), Bound("error", beside="other"))
    row = Row("tiny", TINY.task, asked)
    other = descend("other", "gradient", jax.value_and_grad)
    monkeypatch.setitem(METHODS, "other", other)
    twin = _compare(tmp_path, ADAM, TWIN, row=row)[0][1]
    assert twin.holds == (True, False, None)
    line = accuracy.cells(twin)
    assert line[-2:] == ["≥ Adam; ≥ Adam + 50 points; within 1 SE of Other", "yes; no; ?"]
    (twin, _), _ = _compare(tmp_path, TWIN, other, row=row)
    assert twin.holds == (True, False, True)


def test_smaller_scores_can_be_better(tmp_path: Path) -> None:
    small = {"smaller": True, "optax": (Bound("above"), Bound("above", 0.1))}
    row = Row("loss", LossTask("points", (4,), model="poisson", batches=3), **small)
    (adam, twin), _ = _compare(tmp_path, ADAM, TWIN, row=row)
    assert (twin.difference, twin.holds) == (0.0, (True, False))
    assert accuracy.cells(twin)[-2:] == ["≤ Adam; ≤ Adam − 0.1", "yes; no"]
    assert adam.settings is not None
    tried = [json.loads(path.read_text()) for path in tmp_path.rglob("*-seed1000-*.json")]
    best = min(run["validation"][-1][2] for run in tried)
    (chosen,) = {
        run["validation"][-1][2] for run in tried if run["key"]["settings"] == adam.settings
    }
    assert chosen == best

    points = (accuracy.Point(1, 1.0, math.inf, math.inf),)
    lost = accuracy.Run(points, test=math.inf, compile_seconds=0.0)
    kept = dataclasses.replace(lost, validation=(accuracy.Point(1, 1.0, 2.0, 2.0),), test=2.0)
    assert kept.preference(row) > lost.preference(row)
    cache = accuracy.Cache(tmp_path)
    cache.write(row.task, ADAM, {}, 0, lost)
    assert cache.read(row.task, ADAM, {}, 0) == lost


def test_a_method_says_what_is_tried_and_what_is_evaluated(tmp_path: Path) -> None:
    def step(loss_fn, params, state, x, y, progress, settings):
        return jax.tree.map(jnp.zeros_like, params), state

    kept = Method(
        "kept",
        "gradient",
        lambda loss_fn, params, batch: params,
        step,
        choices={"one": (1.0, 2.0), "two": (3.0,)},
        read=lambda params, state: state,
    )
    (summary,), trained = _compare(tmp_path, kept, seeds=1)
    assert summary.settings is not None
    assert list(summary.settings) == ["rate", "one", "two"]
    assert trained % 2 == 1  # two settings with each rate, and the seed
    assert accuracy.describe(kept, summary.settings).endswith("one 1, two 3")
    task = TINY.task
    dataset = task.load(None)
    first = task.init(dataset.num_features, dataset.num_classes, 0)
    assert summary.mean == task.evaluate(first, dataset.test)[0]


@pytest.mark.parametrize("name", ["muon", "schedule-free"])
def test_further_baselines_learn(name: str) -> None:
    task = Task("digits", hidden=(16,), epochs=4, batch_size=64)
    method = METHODS[name]
    settings = {"rate": 0.03, **{name: values[-1] for name, values in method.choices.items()}}
    assert accuracy.Trainer(None).train(task, method, settings, 0).test > 0.85


def test_muon_takes_what_are_matrices() -> None:
    convolutional = ConvolutionalTask("cifar10", channels=(2, 3)).init(192, 10, 0)
    taken = matrices(convolutional)["w"]
    assert [None if axes is None else axes.reduction_axis for axes in taken] == [
        (0, 1, 2),
        (0, 1, 2),
        None,
    ]
    text = TextTask("letters", (8,), model="transformer", context=4, blocks=2).init(4, 5, 0)
    named = {name for name, axes in matrices(text).items() if axes is not None}
    assert named == {"qkv", "out", "w1", "w2", "qkv_2", "out_2", "w1_2", "w2_2"}


def test_runs_of_before_are_found() -> None:
    """Settings that tasks got later are no part of what runs are found by, unless they are used."""
    before = {
        "dataset": "digits",
        "hidden": (128,),
        "skip": False,
        "batch_size": 256,
        "epochs": 10,
        "scale": 1.0,
        "measure_every": 0,
        "compute": "float32",
    }
    assert Task("digits").key() == before
    assert Task("digits", standardise=True).key() == {**before, "standardise": True}
    assert "blocks" not in TextTask("letters").key()
    path = accuracy.Cache(Path()).path(Task("digits"), ADAM, {"rate": 0.01, "cosine": 1.0}, 0)
    assert path.as_posix() == "digits-128/adam/rate0.01-cosine1-seed0-417ebacdc6.json"


def test_a_pure_method_keeps_its_settings_and_sees_the_progress(tmp_path: Path) -> None:
    row = Row("tiny", TINY.task, pure=(Bound("at least", 0.0),), reflecting_only=True)

    def step(loss_fn, params, state, x, y, progress, settings):
        assert x.shape == (256, 64)
        assert y.shape == (256, 10)
        count, last = state
        scaled = jax.tree.map(lambda leaf: leaf * settings["factor"], params)
        return scaled, (count + 1, last + progress * loss_fn(params, (x, y)))

    pure = Method("pure", "pure", lambda *_: (0, 0.0), step, settings={"factor": 0.5})
    assert _compare(tmp_path, pure, row=row) == ([], 0)
    pure = Method(**{**vars(pure), "reflecting": True})
    (summary,), trained = _compare(tmp_path, ADAM, pure, row=row)
    assert (trained, summary.settings, summary.holds) == (2, {"factor": 0.5}, (True,))
    pure = Method(**{**vars(pure), "description": "other"})
    assert _compare(tmp_path, pure, row=row)[1] == 2


def test_a_run_reports_when_it_reached_a_score() -> None:
    points = tuple(
        accuracy.Point(10 * i, i, s, 1.0 - s) for i, s in enumerate((0.5, 0.9, 0.8, 0.95), 1)
    )
    run = accuracy.Run(points, test=0.94, compile_seconds=0.0)
    reach = {at: Row("reach", TINY.task, reach=at) for at in (0.85, 0.99)}
    assert run.result(TINY) == 0.94
    assert run.result(reach[0.85]) == 20
    assert math.isinf(run.result(reach[0.99]))
    assert run.preference(reach[0.85]) > run.preference(reach[0.99])


@pytest.mark.parametrize(
    ("bound", "mean", "difference", "error", "holds"),
    [
        (Bound("error"), 0.97, -0.001, 0.001, True),
        (Bound("error"), 0.97, -0.0011, 0.001, False),
        (Bound("within", 0.002), 0.97, -0.0019, 0.0, True),
        (Bound("within", 0.002), 0.97, -0.0021, 0.0, False),
        (Bound("above"), 0.97, 0.0, 0.1, True),
        (Bound("above", 0.005), 0.97, 0.0049, 0.0, False),
        (Bound("above"), 0.97, math.nan, math.nan, False),
        (Bound("at least", 0.96), 0.96, math.nan, math.nan, True),
        (Bound("ratio", 1.05), 105.0, 5.0, 1.0, True),
        (Bound("ratio", 1.05), 106.0, 6.0, 1.0, False),
        (Bound("fewer"), 100.0, 0.0, 0.0, False),
        (Bound("within", 0.002), math.nan, math.nan, math.nan, False),
    ],
)
def test_bounds(bound: Bound, mean: float, difference: float, error: float, holds: bool) -> None:
    assert bound.holds(mean, 100.0, difference, error) is holds


def test_networks_and_scores() -> None:
    task = Task("higgs", hidden=(3, 4), skip=True)
    params = task.init(5, 2, seed=0)
    assert [leaf.shape for leaf in params["w"]] == [(5, 3), (3, 4), (7, 2)]
    assert all(not leaf.any() for leaf in params["b"])
    x, y = jax.random.normal(jax.random.key(0), (6, 5)), jax.nn.one_hot(np.arange(6) % 2, 2)
    losses = [task.loss(kind)(params, (x, y)) for kind in ("gradient", "optax")]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    logits, labels = np.array([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0]]), np.array([0, 1, 0])
    assert accuracy_tasks.score(task, logits, labels) == 1.0
    assert accuracy_tasks.score(Task("digits"), logits, labels) == 2 / 3
    assert accuracy_tasks.score(task, logits + np.inf, labels) == 0.5
    assert accuracy_tasks.score(Task("digits"), logits + np.inf, labels) == 0.0
    pixels = Task("mnist", standardise=True, scale=2.0).inputs(jnp.array([0.1307, 0.4388]))
    np.testing.assert_allclose(pixels, [0, 2], atol=1e-6)


def test_rates_and_the_command(capsys, tmp_path: Path) -> None:
    rates = [accuracy.rate_of(number) for number in accuracy.FIRST_RATES]
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert accuracy.main(["--list"]) == 0
    assert "mnist-1x128-97" in capsys.readouterr().out
    available = [name for name, method in METHODS.items() if method.available]
    assert "adam" in available
    assert ("displacement-adam" in available) == hasattr(pjax, "value_and_displacement")
    output = tmp_path / "table.md"
    arguments = ["--cached", "--cache", str(tmp_path), "--markdown", str(output)]
    assert accuracy.main(arguments) == 0
    assert "mnist-1x128-97" in output.read_text()
