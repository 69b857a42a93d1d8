"""Further tasks of the laboratory: standardised images, two classes, a text, few levels."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax import nn
from pjax.lab import baselines, cli, config, models
from pjax.lab.baselines import Descent
from pjax.lab.config import CompareConfig, TrainConfig
from pjax.lab.data import DataError, Dataset, Split, Text, load
from pjax.lab.train import Accuracy, Training

TINY = ("--hidden", "6", "--batch-size", "256", "--steps", "8", "--measure-every", "4")


class Scores(nn.Module):
    """The first two features of a row, times a parameter."""

    def __init__(self) -> None:
        self.scale = nn.Parameter((1,), jax.nn.initializers.ones)

    def __call__(self, x):
        return x[:, :2] * self.scale


def test_auc_is_the_share_of_pairs_in_order() -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 4, (60, 2)).astype(np.float32)  # with ties
    y = random.integers(0, 2, 60).astype(np.int32)
    model = Scores()
    params = {"scale": jnp.array([[1.0], [-2.0]])}
    found = Accuracy(model, chunk=25).auc(params, Split(x, y))
    difference = x[:, 1] - x[:, 0]
    pairs = difference[y == 1][:, None] - difference[y == 0][None]
    share = np.mean((pairs > 0) + 0.5 * (pairs == 0))
    np.testing.assert_allclose(found, [share, 1 - share])
    broken = {"scale": jnp.array([[jnp.nan]])}
    assert Accuracy(model).auc(broken, Split(x, y)).tolist() == [0.5]
    assert Accuracy(model).auc(params, Split(x, np.zeros_like(y))).tolist() == [0.5, 0.5]


def test_two_classes_are_measured_by_auc_too(tmp_path: Path, monkeypatch, capsys) -> None:
    rows = load("digits")

    parts = [
        Split(part.x, (part.y > 4).astype(np.int32))
        for part in (rows.train, rows.validation, rows.test)
    ]

    def two(settings) -> Dataset:
        return Dataset("digits", *parts, num_classes=2)

    monkeypatch.setattr(config, "load_data", two)
    given = ("train", *TINY, "--method", "adam", "--seeds", "0", "1")
    assert cli.main([*given, "--runs-dir", str(tmp_path), "--name", "r"]) == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    printed = capsys.readouterr().out
    assert "test AUC" in printed
    for row in result["seeds"]:
        assert 0.4 < row["test_auc"] <= 1
        assert f"{row['test_auc']:.4f}" in printed
    assert cli.main(["evaluate", str(tmp_path / "r")]) == 0
    assert f"{result['seeds'][1]['test_auc']:.4f}" in capsys.readouterr().out


def test_what_was_standardised_in_training_is_in_prediction(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "r"
    given = ("train", *TINY, "--method", "adam", "--standardise")
    assert cli.main([*given, "--runs-dir", str(tmp_path), "--name", "r"]) == 0
    dataset = load("digits")
    data = json.loads((folder / "data.json").read_text())
    assert data["moments"][0] == pytest.approx([dataset.train.x.mean()], rel=1e-5)
    assert data["moments"][1] == pytest.approx([dataset.train.x.std()], rel=1e-5)
    np.save(tmp_path / "rows.npy", dataset.test.x)
    output = tmp_path / "predicted.csv"
    assert (
        cli.main(
            ["predict", str(folder), "--input", str(tmp_path / "rows.npy"), "--output", str(output)]
        )
        == 0
    )
    with open(output) as file:
        predicted = [int(row["class"]) for row in csv.DictReader(file)]
    (row,) = json.loads((folder / "result.json").read_text())["seeds"]
    assert np.mean(np.array(predicted) == dataset.test.y) == pytest.approx(row["test_accuracy"])
    # Without its moments the run cannot be used.
    del data["moments"]
    (folder / "data.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert cli.main(["predict", str(folder), "--input", str(tmp_path / "rows.npy")]) == 1
    assert "data.json: damaged" in capsys.readouterr().err


def text() -> Text:
    tokens = np.tile(np.array([2, 0, 1, 3, 1], np.int32), 40)
    return Text("text", "abcd", tokens[:120], tokens[120:160], tokens[160:])


def test_rows_of_a_text_are_windows_side_by_side() -> None:
    found = text().dataset(6)
    assert found.num_classes == 4
    assert found.shape == (6,)
    assert len(found.train) == 19  # 120 tokens: each window needs one more.
    np.testing.assert_array_equal(found.train.x.ravel(), text().train[: 19 * 6])
    np.testing.assert_array_equal(found.train.y.ravel(), text().train[1 : 19 * 6 + 1])
    with pytest.raises(DataError, match="windows of 41 tokens"):
        text().dataset(40)


@pytest.mark.parametrize("skip", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_recurrent_network_is_its_formula(skip: bool) -> None:
    model = models.RNN(4, (5,), skip)
    params = model.init(jax.random.key(0))
    params = {name: value + 0.1 for name, value in params.items()}
    tokens = np.array([[0, 1, 3, 2], [2, 2, 1, 0]])
    found = jax.jit(model.apply)(params, tokens.astype(np.float32))
    state = np.zeros((2, 5))
    for place in range(4):
        read = np.concatenate([params["embedding.weight"][tokens[:, place]], state], axis=1)
        inner = np.maximum(read @ params["cell.dense.0.weight"] + params["cell.relu.0.bias"], 0)
        state = inner @ params["cell.output.weight"] + (state if skip else 0)
        expected = state @ params["output.weight"]
        np.testing.assert_allclose(found[:, place], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "displacement-adam"])
def test_a_recurrent_network_learns_a_text(name) -> None:
    dataset = text().dataset(6)
    training = Training(
        Descent(name, 0.03, 0, 4),
        models.RNN(4, (8,), skip=True),
        dataset,
        steps=60,
        batch_size=10,
        seeds=(0,),
        measure_every=60,
    )
    (start,) = training.measure()
    while not training.finished:
        records = training.advance()
    # Two of five characters have two followers each; the state knows which.
    assert start.validation_accuracy < 0.7 < 0.9 < records[-1].validation_accuracy
    assert training.test()[0] > 0.9
    assert training.test_auc() == [None]


def test_a_straight_through_estimator_passes_gradients_within_its_window() -> None:
    x = jnp.array([-3.0, -0.4, 0.2, 0.9, 2.0])

    def total(x, window):
        return jnp.sum(jnp.arange(5.0) * models.straight_through(x, jnp.sign(x), window))

    np.testing.assert_array_equal(models.straight_through(x, jnp.sign(x), 1.0), jnp.sign(x))
    np.testing.assert_allclose(jax.grad(total)(x, 0.5), [0, 1, 2, 0, 0])
    np.testing.assert_allclose(jax.grad(total)(x, 2.5), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(jax.grad(total)(x, None), 0)


def test_layers_read_levels_of_their_weights() -> None:
    model = models.MLP(8, 3, (4,), activation="four-level", weight_levels=4)
    params = model.init(jax.random.key(0))
    layer = models.QuantizedLinear(8, 4, 4)
    read = np.asarray(layer.apply({"weight": params["dense.0.weight"]}, np.eye(8, dtype="f4")))
    largest = 1.5 * (2 / 8) ** 0.5
    levels = np.linspace(-largest, largest, 4)
    assert np.abs(read[..., None] - levels).min(axis=-1).max() < 1e-6
    assert len(np.unique(read.round(5))) > 1
    out = model.apply(params, np.ones((2, 8), np.float32))
    assert out.shape == (2, 3)
    # Without a window no gradient reaches the weights, with one it does.
    for window, reached in ((None, False), (1.0, True)):
        found = jax.grad(lambda p, w=window: jnp.sum(model.apply(p, jnp.ones((2, 8)), window=w)))(
            params
        )
        assert bool(jnp.any(found["dense.0.weight"] != 0)) is reached


@pytest.mark.slow
def test_windows_are_tuned_with_rates_and_kept(tmp_path: Path, monkeypatch) -> None:
    given = ["compare", *TINY, "--activation", "sign", "--methods", "straight-through"]
    given += ["--seeds", "0", "--runs-dir", str(tmp_path), "--name", "c"]
    assert cli.main(given) == 0
    path = tmp_path / "c" / "cells" / "straight-through.tuning.json"
    candidates = json.loads(path.read_text())["candidates"]
    windows = baselines.WINDOWS["straight-through"]
    assert len(candidates) == 2 * len({one[0] for one in candidates}) * len(windows)
    best = max(candidates, key=lambda one: one[2])
    (line,) = json.loads((tmp_path / "c" / "results.json").read_text())["methods"]
    assert line["description"].startswith(f"rate {best[0]:g}, window {best[3]:g}, ")
    monkeypatch.setattr(baselines, "search", lambda *args, **settings: pytest.fail("searched"))
    assert cli.main(given) == 0


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"dataset": "tinyshakespeare"}, "model", "must be rnn for the text"),
        ({"model": "rnn"}, "model", "must be mlp or cnn for digits"),
        (
            {"dataset": "tinyshakespeare", "model": "rnn", "standardise": True},
            "standardise",
            "no meaning for the text",
        ),
        ({"dataset": "tinyshakespeare", "model": "rnn", "hidden": ()}, "hidden", "one width"),
        ({"weight_levels": 1}, "weight_levels", "at least 2"),
        ({"weight_levels": 4, "model": "cnn"}, "weight_levels", "with model mlp"),
        ({"window": 2.0}, "window", "no meaning for projection"),
        ({"method": "straight-through"}, "method", "needs the activation sign or four-level"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, name: str, message: str) -> None:
    found = TrainConfig(**settings).problem()
    assert found is not None
    assert found[0] == name
    assert message in found[1]
    with pytest.raises(config.UsageError, match=f"--{name.replace('_', '-')} "):
        config.check(TrainConfig(**settings))


def test_one_method_of_a_comparison_has_its_settings() -> None:
    settings = CompareConfig(hidden=(3,), activation="sign", seeds=(4, 5), batch_size=7)
    one = config.single(settings, "straight-through", seeds=(5,), rate=0.1, window=2.0)
    assert (one.hidden, one.seeds, one.batch_size) == ((3,), (5,), 7)
    assert config.make_method(one, 10) == Descent("straight-through", 0.1, 200, 10, 2.0)
