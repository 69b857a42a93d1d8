"""Text in the accuracy benchmark: its networks are causal and remember, and learn to."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import accuracy, accuracy_tasks
from benchmarks.accuracy_methods import ADAM, METHODS
from benchmarks.accuracy_tasks import Row, TextTask
from benchmarks.text_models import Recurrent, Transformer
from pjax.lab.data import Text
from tests.selection import mostly_slow

SYMBOLS, CONTEXT = 5, 6
MODELS = [
    Recurrent(SYMBOLS, CONTEXT, width=8),
    Transformer(SYMBOLS, CONTEXT, width=8, heads=2),
    Transformer(SYMBOLS, CONTEXT, width=8, heads=2, blocks=2),
]


def made(model, seed=0):
    """Parameters without zeros, so that each of them counts."""
    params = model.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return {
        name: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)
        for name, leaf in params.items()
    }


@pytest.mark.parametrize("model", mostly_slow(MODELS, MODELS[:1]), ids=str)
def test_a_character_changes_its_own_and_later_predictions_only(model):
    params = made(model)
    tokens = np.random.default_rng(1).integers(0, SYMBOLS, (3, CONTEXT))

    @jax.jit
    def predict(tokens):
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.network(p, tokens)))))(params)
        return model.network(params, tokens), gradient

    before, gradient = predict(tokens)
    assert before.shape == (3, CONTEXT, SYMBOLS)
    assert all(np.any(leaf != 0) for leaf in gradient.values())  # every parameter counts
    for place in range(CONTEXT):
        other = tokens.copy()
        other[:, place] = (other[:, place] + 1) % SYMBOLS
        changed = np.any(predict(other)[0] != before, axis=(0, 2))
        np.testing.assert_array_equal(changed, np.arange(CONTEXT) >= place)


def test_the_first_block_has_the_parameters_of_a_single_one():
    one, two = (model.init(jax.random.key(3)) for model in MODELS[1:])
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, two[name])
    further = {name.removesuffix("_2"): leaf for name, leaf in two.items() if name.endswith("_2")}
    assert len(further) == len(two) - len(one) == 10
    assert np.any(further["qkv"] != two["qkv"])


def test_the_recurrent_network_by_hand():
    model = MODELS[0]
    params = made(model)
    tokens = np.random.default_rng(1).integers(0, SYMBOLS, CONTEXT)
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    state, expected = np.zeros(8), []
    for token in tokens:
        both = np.concatenate([state, p["embedding"][token]])
        inner = np.maximum(both @ p["w1"] + p["b1"], 0)
        state = np.concatenate([inner, both]) @ p["w2"] + p["b2"]
        expected.append(state @ p["head"] + p["bias"])
    np.testing.assert_allclose(model.network(params, tokens[None])[0], expected, atol=1e-4)


def noisy_rule(length: int, seed: int = 0) -> np.ndarray:
    """Tokens of which each is a fixed function of the two before it, but for one in ten."""
    rng = np.random.default_rng(seed)
    rule = np.stack([rng.permutation(SYMBOLS) for _ in range(SYMBOLS)])
    tokens = [0, 1]
    for _ in range(length - 2):
        noise = rng.random() < 0.1
        tokens.append(int(rng.integers(SYMBOLS)) if noise else rule[tokens[-2], tokens[-1]])
    return np.array(tokens, np.int32)


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Text:
    parts = np.split(noisy_rule(5000), [4000, 4500])
    text = Text("letters", "abcde", *parts)
    monkeypatch.setattr(accuracy_tasks.data, "load_text", lambda name, data_dir: text)
    accuracy_tasks.load_windows.cache_clear()
    return text


def test_the_windows_of_a_task(text: Text):
    rows = TextTask("letters", context=CONTEXT).load(None)
    assert (rows.num_features, rows.num_classes) == (CONTEXT, SYMBOLS)
    assert rows.train.x.shape == rows.train.y.shape == (4000 - CONTEXT, CONTEXT)
    np.testing.assert_array_equal(rows.train.x[7], text.train[7 : 7 + CONTEXT])
    np.testing.assert_array_equal(rows.train.y[7], text.train[8 : 8 + CONTEXT])
    # Each character is predicted once, but for the first and what is left over at the end.
    predicted = rows.validation.y.ravel()
    np.testing.assert_array_equal(predicted, text.validation[1 : 1 + len(predicted)])
    assert 500 - len(predicted) <= CONTEXT


@pytest.mark.slow
def test_runs_are_kept_and_rows_of_a_task_share_them(text: Text, tmp_path: Path):
    task = TextTask("letters", hidden=(8,), context=CONTEXT, batch_size=8, batches=4)
    rows = [Row("validation", task, part="validation"), Row("test", task)]

    def compare(row: Row, seeds: int = 1, train: bool = True):
        console = Console(quiet=True)
        return accuracy.compare([row], [ADAM], seeds, tmp_path, None, console, train)

    (first,), trained = compare(rows[0])
    assert trained >= 12 + 1
    (other,), trained = compare(rows[1])
    assert trained == 0
    assert compare(rows[0], train=False)[0] == [first]
    (path,) = tmp_path.glob("letters-rnn/adam/*seed0*.json")
    run = accuracy.Cache(tmp_path).read(task, ADAM, first.settings or {}, 0)
    assert run is not None
    assert (first.mean, other.mean) == (run.validation[-1].score, run.test)
    path.unlink()
    (again,), trained = compare(rows[0])
    assert (trained, again.mean) == (1, first.mean)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["rnn", "transformer"])
def test_projections_learn_what_takes_memory(text: Text, model):
    """The last character alone tells the next one in half of all cases."""
    task = TextTask("letters", (32,), model=model, context=4, batch_size=32, batches=300)
    trainer = accuracy.Trainer(None)

    def reach(name, **settings):
        return trainer.train(task, METHODS[name], settings, seed=0).test

    adam = reach("adam", rate=1e-2, cosine=1.0)
    assert adam > 0.75
    assert reach("displacement-adam", rate=1e-2, cosine=1.0) > adam - 0.02
    assert reach("projection") > 0.6
