"""Runs: what they write, and that a run that was cut short goes on as if it had not been."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from run_helpers import TINY, assert_same_runs, events_of, metrics, prepare, start

from pjax.lab import checkpoints, cli, commands, config, runs
from pjax.lab.config import TrainConfig
from pjax.lab.data import load
from pjax.lab.errors import RunError, UsageError
from pjax.lab.recording import FIELDS, read_records
from pjax.lab.train import Training
from tests.selection import mostly_slow


class KilledError(Exception):
    """Ends a run between two statements, as a signal would."""


def kill_after(step: int):
    def on_step(training, records):
        if training.step == step:
            raise KilledError

    return on_step


@pytest.mark.parametrize(
    "method", mostly_slow(["adam", "displacement-adam", "cp", "projection"], ["displacement-adam"])
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole = start(tmp_path, method=method)
    runs.advance(*whole)
    cut = start(tmp_path, method=method)
    with pytest.raises(KilledError):
        runs.advance(*cut, on_step=kill_after(8))
    # The checkpoint is of step 6, in the middle of an epoch; the line of step 8 is behind it.
    assert metrics(cut[0])[-1]["step"] == 8
    begun = []
    result = runs.advance(*cut, on_start=lambda training: begun.append(training.step))
    assert begun == [6]
    assert result.finished
    assert_same_runs(whole[0], cut[0])


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    whole, cut = start(tmp_path, seeds=(3,)), start(tmp_path, seeds=(3,))
    runs.advance(*whole)
    with pytest.raises(KilledError):
        runs.advance(*cut, on_step=kill_after(1))
    # The kill came while the first checkpoint was written.
    (cut[0] / "checkpoints" / "00000000" / "manifest.json").unlink()
    told = []
    runs.advance(*cut, say=told.append)
    assert len(told) == 1
    assert "was not finished" in told[0]
    assert_same_runs(whole[0], cut[0])


def test_a_stop_saves_the_step_and_goes_on_from_it(tmp_path: Path) -> None:
    whole, cut = start(tmp_path), start(tmp_path)
    runs.advance(*whole)
    stops = iter([False] * 4 + [True])
    result = runs.advance(*cut, should_stop=lambda: next(stops))
    assert (result.step, result.finished) == (5, False)
    assert (cut[0] / "checkpoints" / "00000005").is_dir()
    with pytest.raises(RunError, match="not finished"):
        runs.finished_result(cut[0])
    runs.advance(*cut)
    assert_same_runs(whole[0], cut[0])


def test_the_last_checkpoints_are_kept_and_no_others(tmp_path: Path) -> None:
    cut = start(tmp_path, keep=2, checkpoint_every=1)
    seen = []

    def on_step(training, records):
        folder = cut[0] / "checkpoints"
        names = sorted(path.name for path in folder.iterdir())
        assert names == [f"{max(training.step - 1, 0):08d}", f"{training.step:08d}"]
        for name in names:
            checkpoints.load(folder / name)
        seen.append(training.step)

    runs.advance(*cut, on_step=on_step)
    assert seen == list(range(1, 11))


def test_what_a_run_writes(tmp_path: Path) -> None:
    path, settings, dataset, model = start(tmp_path, tensorboard=True)
    runs.advance(path, settings, dataset, model)
    assert runs.settings_of(path) == settings
    found = json.loads((path / "environment.json").read_text())
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"] == [device.device_kind for device in jax.devices()]
    lines = metrics(path)
    assert [(line["step"], line["seed"]) for line in lines] == [
        (step, seed) for step in (0, 4, 8, 10) for seed in (0, 1)
    ]
    assert lines[0]["loss"] is None
    assert lines[-1]["epoch"] == pytest.approx(10 * 256 / 1077)
    records = read_records(path)
    with open(path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == FIELDS
    for row, record in zip(table, records, strict=True):
        for name in FIELDS:
            value = float(row[name]) if row[name] else math.nan
            np.testing.assert_equal(value, float(getattr(record, name)))
    # TensorBoard's own numbers are those of the lines.
    sent = events_of(path)
    for record in records:
        tag = f"validation_accuracy/seed{record.seed}"
        assert sent[tag, record.step] == pytest.approx(record.validation_accuracy)
    assert len(sent) == 2 * (4 * 2 + 3)  # accuracies at all steps, losses but for the first


def test_loss_and_accuracies_in_the_metrics_are_what_they_say(tmp_path: Path) -> None:
    """Against a plain loop over the same batches."""
    from pjax.lab.data import batch_rows

    path, settings, dataset, model = start(tmp_path, seeds=(5,), method="sgd", schedule="constant")
    runs.advance(path, settings, dataset, model)
    params = model.init(jax.random.key(5))
    rows = batch_rows(len(dataset.train), 256, 5)
    losses = []
    for _ in range(10):
        chosen = next(rows)
        x, y = dataset.train.x[chosen], dataset.train.y[chosen]

        def loss(params, x=x, y=y):
            logits = jax.nn.log_softmax(model.apply(params, x))
            return -logits[np.arange(len(y)), y].mean()

        value, slope = jax.value_and_grad(loss)(params)
        losses.append(float(value))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope)
    by_step = {record.step: record for record in read_records(path)}
    assert by_step[4].loss == pytest.approx(np.mean(losses[:4]), rel=1e-4)
    assert by_step[10].loss == pytest.approx(np.mean(losses[8:]), rel=1e-4)

    def accuracy(x, y):
        return float(np.mean(np.argmax(model.apply(params, x), -1) == y))

    validation = accuracy(dataset.validation.x, dataset.validation.y)
    assert by_step[10].validation_accuracy == pytest.approx(validation, abs=0.004)
    train = accuracy(dataset.train.x[:360], dataset.train.y[:360])
    assert by_step[10].train_accuracy == pytest.approx(train, abs=0.004)


def training(settings: TrainConfig, **changes) -> Training:
    settings = dataclasses.replace(settings, **changes)
    dataset = load("digits")
    return config.make_training(settings, dataset, config.make_model(settings, dataset))


PURE = ("cp", "projection")


@pytest.mark.parametrize(
    ("method", "at_once"),
    [("adam", 0), ("adam", 2), *(pytest.param(m, 0, marks=pytest.mark.slow) for m in PURE)],
)
def test_seeds_side_by_side_are_the_seeds_one_by_one(method: str, at_once: int) -> None:
    """Sums round differently in the vectorised program: equal to 1e-4, not to the bit."""
    atol = 1e-5 if method == "adam" else 1e-4
    settings = dataclasses.replace(TINY, method=method, steps=5, measure_every=5)
    both = training(settings, seeds=(0, 1, 2), seeds_at_once=at_once)
    calls = []
    compiled = both._compiled
    both._compiled = lambda *given: calls.append(1) or compiled(*given)
    together = both.measure()
    while not both.finished:
        together += both.advance()
    assert len(calls) == 5  # not 15
    for number, seed in enumerate((0, 1, 2)) if method == "adam" else [(2, 2)]:
        one = training(settings, seeds=(seed,))
        alone = one.measure()
        while not one.finished:
            alone += one.advance()
        for name, value in one.params.items():
            np.testing.assert_allclose(both.params[name][number], value[0], rtol=1e-4, atol=atol)
        own = [record for record in together if record.seed == seed]
        for mine, other in zip(own, alone, strict=True):
            assert mine.step == other.step
            assert mine.validation_accuracy == pytest.approx(other.validation_accuracy, abs=0.006)
            np.testing.assert_allclose(mine.loss, other.loss, rtol=1e-4)
            np.testing.assert_allclose(mine.residual, other.residual, rtol=1e-3)


def test_a_program_for_many_seeds_is_no_longer_than_for_one() -> None:
    """What does not depend on the machine: the operations to dispatch."""

    def operations(seeds: int) -> int:
        text = training(TINY, seeds=tuple(range(seeds)))._compiled.as_text()
        return text.count(" = ")

    assert operations(8) < 1.3 * operations(1)


def test_seeds_go_in_groups_where_memory_is_short(monkeypatch) -> None:
    sizes = iter([False, False, True])
    monkeypatch.setattr("pjax.lab.train._fits_memory", lambda compiled: next(sizes))
    found = training(TINY, seeds=(0, 1, 2, 3, 4))
    assert found.seeds_at_once == 2
    found.advance()
    assert found.params["output.weight"].shape == (5, 6, 10)


def test_the_groups_of_the_first_start_go_on(tmp_path: Path, monkeypatch) -> None:
    """A later process may find less memory; other groups would round differently."""
    cut = start(tmp_path, seeds=(0, 1, 2))
    with pytest.raises(KilledError):
        runs.advance(*cut, on_step=kill_after(4))
    monkeypatch.setattr("pjax.lab.train._fits_memory", lambda compiled: False)
    sizes = []
    runs.advance(*cut, on_start=lambda training: sizes.append(training.seeds_at_once))
    assert sizes == [3]


def test_patience_stops_each_seed_by_itself(tmp_path: Path) -> None:
    changes = {"rate": 0.3, "schedule": "constant", "patience": 2, "steps": 200}
    cut = start(tmp_path, measure_every=1, checkpoint_every=50, **changes)
    result = runs.advance(*cut)
    records = read_records(cut[0])
    steps = []
    for row in result.rows:
        own = [record for record in records if record.seed == row["seed"]]
        accuracies = [record.validation_accuracy for record in own]
        assert row["stopped"] == "patience"
        assert row["best_step"] == int(np.argmax(accuracies))
        assert row["validation_accuracy"] == max(accuracies)
        # Two measurements without a better one, and none after them.
        assert own[-1].step == row["steps"] == row["best_step"] + 2
        steps.append(row["steps"])
    assert result.step == max(steps) < 200
    assert len(set(steps)) == 2


def test_a_seed_whose_loss_is_not_finite_stops(tmp_path: Path, capsys) -> None:
    arguments = ["--method", "sgd", "--rate", "1e30", "--hidden", "6", "--steps", "8"]
    assert cli.main(["train", *arguments, "--runs-dir", str(tmp_path), "--name", "x"]) == 0
    (row,) = runs.finished_result(tmp_path / "x").rows
    assert row["stopped"] == "not finite"
    assert row["steps"] < 8
    assert f"stopped at step {row['steps']}" in capsys.readouterr().out
    assert metrics(tmp_path / "x")[-1]["loss"] is None


def tiny_arguments(folder: Path, name: str, **changes: object) -> list[str]:
    settings = {"method": "adam", "hidden": 6, "batch-size": 256, "steps": 10, **changes}
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return ["train", *options, "--runs-dir", str(folder), "--name", name]


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    assert cli.main(tiny_arguments(tmp_path, "whole")) == 0
    original = Training.advance

    def pressed(self):
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Training, "advance", pressed)
    assert cli.main(tiny_arguments(tmp_path, "cut")) == 130
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) == before
    printed = capsys.readouterr().out
    assert f"pjax train --resume {tmp_path / 'cut'}" in printed
    assert "step 5" in printed
    found = checkpoints.newest(tmp_path / "cut" / "checkpoints")
    assert found is not None
    assert found.step == 5
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert "Going on from step 5" in capsys.readouterr().out
    assert_same_runs(tmp_path / "whole", tmp_path / "cut")
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert "Finished already" in capsys.readouterr().out


@pytest.fixture
def default_ctrl_c() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_ctrl_c")
def test_a_second_ctrl_c_stops_at_once_and_the_run_goes_on(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    original = Training.advance

    def pressed(self):
        if self.step == 4:
            first = signal.getsignal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            # A second signal that comes before Python has seen the first is none.
            while signal.getsignal(signal.SIGINT) is first:
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)  # Ctrl-C ends it
        return original(self)

    monkeypatch.setattr(Training, "advance", pressed)
    arguments = tiny_arguments(tmp_path, "cut", **{"checkpoint-every": 3})
    assert cli.main(arguments) == 130
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert captured.err == "pjax: interrupted.\n"
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert "Going on from step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kills", [pytest.param(2), pytest.param(10, marks=pytest.mark.slow, id="ten")]
)
def test_a_process_that_is_killed_at_random_moments_leaves_the_same_run(
    kills: int, tmp_path: Path
) -> None:
    steps = 15 * kills
    changes = {"steps": steps, "checkpoint-every": 1, "measure-every": 1}
    assert cli.main(tiny_arguments(tmp_path, "whole", **changes)) == 0
    folder = tmp_path / "cut"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    draw = random.Random(kills)
    command = tiny_arguments(tmp_path, "cut", **changes)
    reached = []
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "pjax", *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        begin = last_step(folder)
        # It runs by the time that it has gone a step further; then any moment can be the last.
        deadline = time.monotonic() + 240
        while last_step(folder) <= begin and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.6))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        reached.append(last_step(folder))
        command = ["train", "--resume", str(folder)]
    assert reached == sorted(reached)
    assert reached[-1] < steps
    assert cli.main(command) == 0
    assert_same_runs(tmp_path / "whole", folder)


def last_step(folder: Path) -> int:
    """The last step of which there is a line, as one who only looks on can tell."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max(json.loads(line)["step"] for line in lines[:-1])
    except (OSError, ValueError):
        return -1


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    path, *rest = start(tmp_path)
    with runs._alone(path), pytest.raises(RunError, match="another process"):
        runs.advance(path, *rest)


def test_evaluate_measures_what_the_run_reported(tmp_path: Path, capsys) -> None:
    path, *rest = start(tmp_path, method="sgd", rate=0.5)
    result = runs.advance(path, *rest)
    assert cli.main(["evaluate", str(path)]) == 0
    printed = capsys.readouterr().out
    for row in result.rows:
        assert f"{row['test_accuracy']:.2%}" in printed
        assert f"{row['validation_accuracy']:.2%}" in printed


def test_predict_gives_the_class_of_each_row(tmp_path: Path, capsys) -> None:
    path, settings, dataset, model = start(tmp_path, method="sgd", rate=0.5)
    runs.advance(path, settings, dataset, model)
    rows = dataset.test.x[:7]
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "images.npy", rows.reshape(7, 8, 8))
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",")
    run = runs.trained(path)
    logits = {seed: model.apply(run.of_seed(seed), rows) for seed in (0, 1)}
    best = int(np.argmax(run.validation_accuracy))
    for name, options, seed in (
        ("rows.npy", [], best),
        ("images.npy", ["--seed", "1"], 1),
        ("rows.csv", ["--seed", "0"], 0),
    ):
        out = tmp_path / "predicted.csv"
        arguments = ["predict", str(path), "--input", str(tmp_path / name), *options]
        assert cli.main([*arguments, "--output", str(out)]) == 0
        with open(out, newline="") as file:
            found = list(csv.DictReader(file))
        assert [int(row["row"]) for row in found] == list(range(1, 8))
        assert [int(row["class"]) for row in found] == list(np.argmax(logits[seed], -1))
        chances = np.max(jax.nn.softmax(logits[seed], -1), -1)
        np.testing.assert_allclose([float(row["probability"]) for row in found], chances, atol=1e-4)
    capsys.readouterr()
    assert cli.main(["predict", str(path), "--input", str(tmp_path / "rows.npy")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("row,class,probability\n1,")
    assert printed.err == ""


def test_predict_warns_of_rows_far_outside_the_training_rows(tmp_path: Path, capsys) -> None:
    path, settings, dataset, model = start(tmp_path, method="sgd", seeds=(0,))
    runs.advance(path, settings, dataset, model)
    low, high = json.loads((path / "data.json").read_text())["range"]
    assert (low, high) == (float(dataset.train.x.min()), float(dataset.train.x.max()))
    rows = np.tile((low + high) / 2, (6, dataset.num_features)).astype(np.float32)
    rows[1, 3] = high + 0.9 * (high - low)
    rows[2, 3], rows[4, 0] = 255, low - 1.1 * (high - low)
    np.save(tmp_path / "rows.npy", rows)
    assert cli.main(["predict", str(path), "--input", str(tmp_path / "rows.npy")]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 7
    assert "rows.npy: 2 of 6 rows hold values far outside those of the training rows" in printed.err
    assert f"from {low:g} to {high:g}; row 3 holds 255." in printed.err
    # A run whose description does not tell the range warns of nothing.
    content = json.loads((path / "data.json").read_text())
    del content["range"]
    (path / "data.json").write_text(json.dumps(content))
    assert cli.main(["predict", str(path), "--input", str(tmp_path / "rows.npy")]) == 0
    assert capsys.readouterr().err == ""


def test_options_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('method = "sgd"\nsteps = 7\nhidden = [5, 4]\n')
    found = commands.from_file(["train", "--config", str(file)], commands.Train)
    assert (found.method, found.steps, found.hidden) == ("sgd", 7, (5, 4))
    arguments = ["train", f"--config={file}", "--steps", "2", "--batch-size", "64"]
    assert cli.main([*arguments, "--runs-dir", str(tmp_path), "--name", "x"]) == 0
    settings = runs.settings_of(tmp_path / "x")
    assert (settings.method, settings.steps, settings.hidden) == ("sgd", 2, (5, 4))


@pytest.mark.parametrize("path", [None, Path("some/where")])
def test_a_configuration_survives_its_file(path: Path | None, tmp_path: Path) -> None:
    settings = TrainConfig(
        data_dir=path, method="sgd", rate=0.1, seeds=(4, 2), hidden=(), measure_every=None
    )
    (tmp_path / "x.toml").write_text(config.to_toml(settings))
    assert config.read(tmp_path / "x.toml", TrainConfig, complete=True) == settings


def test_a_convolutional_network_of_every_activation_trains(tmp_path: Path) -> None:
    x = load("digits").test.x[:3]
    for activation in ("relu", "tanh", "sigmoid", "gelu", "silu", "sign"):
        settings = TrainConfig(model="cnn", channels=(2, 3), activation=activation)
        model = config.make_model(settings, load("digits"))
        params = model.init(jax.random.key(0))
        assert {name: value.shape for name, value in params.items() if "kernel" in name} == {
            "kernel.0": (3, 3, 1, 2),
            "kernel.1": (3, 3, 2, 3),
        }
        hidden = x.reshape(3, 8, 8, 1)
        function = {"sign": np.sign, "tanh": np.tanh}.get(activation) or getattr(jax.nn, activation)
        for number in (0, 1):
            kernel = params[f"kernel.{number}"]
            padded = np.pad(hidden, ((0, 0), (0, 1), (0, 1), (0, 0)))
            size = hidden.shape[1] // 2
            found = np.zeros((3, size, size, kernel.shape[-1]))
            for row in range(size):
                for column in range(size):
                    patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                    found[:, row, column] = np.einsum("nabc,abcd->nd", patch, kernel)
            hidden = np.asarray(function(found))
        expected = hidden.reshape(3, -1) @ params["output.weight"]
        np.testing.assert_allclose(model.apply(params, x), expected, rtol=1e-3, atol=1e-4)
    path, *rest = prepare(
        dataclasses.replace(TINY, model="cnn", channels=(2,), method="sgd", steps=2), tmp_path
    )
    assert runs.advance(path, *rest).finished


def test_a_run_cannot_be_named_like_another(tmp_path: Path) -> None:
    dataset = load("digits")
    first = runs.create(TINY, dataset, tmp_path)
    second = runs.create(TINY, dataset, tmp_path)
    assert (first.name, second.name) == ("digits-mlp-adam", "digits-mlp-adam-2")
    with pytest.raises(UsageError, match="--resume"):
        runs.create(TINY, dataset, tmp_path, "digits-mlp-adam")
    for name in ("..", "a/b", ".hidden", "a\nb"):
        with pytest.raises(UsageError, match="--name"):
            runs.create(TINY, dataset, tmp_path, name)
