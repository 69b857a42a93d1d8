"""An own loop records as a run does: the same files, readable by the same functions."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from run_helpers import events_of

import pjax
from pjax.lab import Logger
from pjax.lab.errors import RunError
from pjax.lab.recording import FIELDS, read_records


def loss_fn(w, x, y):
    return jnp.mean((x @ w - y) ** 2)


def test_a_loop_of_projections_is_in_all_files(tmp_path: Path) -> None:
    x, w = jax.random.normal(jax.random.key(0), (16, 3)), jnp.zeros((3, 1))
    y = x @ jnp.ones((3, 1))
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, w, x, y)
    losses = []
    with Logger(tmp_path / "own", tensorboard=True, seed=3) as logger:
        for step in range(1, 5):
            w, state, info = optimizer.update(loss_fn, w, state, x, y)
            losses.append(float(info.loss))
            length = {"length": jnp.linalg.norm(w)} if step > 2 else {}
            logger.log(step, loss=info.loss, residual=info.residual, **length)
    assert losses[-1] < losses[0] / 2
    folder = tmp_path / "own"
    records = read_records(folder)
    assert [(one.step, one.seed, one.loss) for one in records] == [
        (step, 3, loss) for step, loss in enumerate(losses, 1)
    ]
    assert [sorted(one.measures) for one in records] == [[], [], ["length"], ["length"]]
    seconds = [one.seconds for one in records]
    assert seconds == sorted(seconds)
    with open(folder / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == (*FIELDS, "length")
    assert [row["length"] for row in table[:2]] == ["", ""]
    assert (
        float(table[3]["length"])
        == records[3].measures["length"]
        == pytest.approx(float(jnp.linalg.norm(w)))
    )
    sent = events_of(folder)
    assert sent["loss/seed3", 4] == pytest.approx(losses[3])
    assert sent["length/seed3", 3] == pytest.approx(records[2].measures["length"])
    assert len(sent) == 4 * 2 + 2


def test_it_closes_after_an_exception_and_goes_on_from_a_step(tmp_path: Path) -> None:
    def train(logger: Logger) -> None:
        with logger:
            for step in range(5):
                logger.log(step, loss=step, seconds=10.0 * step, other=-step)
            raise LookupError

    logger = Logger(tmp_path, tensorboard=True)
    with pytest.raises(LookupError):
        train(logger)
    with pytest.raises(ValueError, match="closed"):
        logger.log(5, loss=1)
    # A process that is killed leaves half a line.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "ep')
    with pytest.raises(RunError, match=r"metrics already.*resume=STEP"):
        Logger(tmp_path)
    with Logger(tmp_path, tensorboard=True, resume=2) as logger:
        with pytest.raises(ValueError, match="must be at least 3"):
            logger.log(2, loss=0)
        logger.log(3, loss=30, other=1)
    records = read_records(tmp_path)
    assert [one.loss for one in records] == [0, 1, 2, 30]
    assert records[3].seconds >= 20
    sent = events_of(tmp_path)
    assert sorted(step for tag, step in sent if tag.startswith("loss")) == [0, 1, 2, 3]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 5


def test_what_is_no_number_is_told_and_writes_nothing(tmp_path: Path) -> None:
    with Logger(tmp_path) as logger:
        for value in (jnp.ones(3), "0.5", None, [1.0]):
            with pytest.raises(TypeError, match="`auc` must be one number"):
                logger.log(1, auc=value)
        with pytest.raises(TypeError, match="outside of functions that jax"):
            jax.jit(lambda loss: logger.log(1, loss=loss))(1.0)
        with pytest.raises(TypeError, match="`step` must be an integer"):
            logger.log(1.5)
        with pytest.raises(ValueError, match="argument of Logger"):
            logger.log(1, seed=3)
        assert read_records(tmp_path) == []
        logger.log(jnp.int32(1), loss=jnp.nan, measures=2, validation_accuracy=jnp.ones((1,)))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    content = json.loads(line)
    assert content["loss"] is None
    assert (content["measures"], content["validation_accuracy"]) == (2, 1)
    (record,) = read_records(tmp_path)
    assert math.isnan(record.loss)
    assert record.measures == {"measures": 2.0}


def test_nothing_to_go_on_with_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be read"):
        Logger(tmp_path / "new", resume=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot create the folder"):
        Logger(tmp_path / "file" / "run")
