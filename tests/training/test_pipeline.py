"""Pipelined projection: the schedule, the delays, and what a stage does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.lab.data import batch_rows, load
from pjax.training import stages
from pjax.training.stages import Asked, Labelled

WIDTH, ROWS = 8, 12

he = jax.nn.initializers.he_normal()


def dense(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["w"] + params["b"])


def head(params: Any, x: Any) -> Any:
    return x @ params["w"] + params["b"]


def loss(outputs: Any, labels: Any) -> Any:
    return jnp.mean(pjax.cross_entropy(outputs, labels))


def network(count: int, dtype: Any = jnp.float32) -> tuple[list[Any], list[Any]]:
    keys = jax.random.split(jax.random.key(0), count)
    sizes = [WIDTH] * (count - 1) + [3]
    params = [
        {"w": jax.random.normal(key, (WIDTH, out), dtype) / 2, "b": jnp.zeros(out, dtype)}
        for key, out in zip(keys, sizes, strict=True)
    ]
    return [dense] * (count - 1) + [head], params


def batches(count: int, dtype: Any = jnp.float32) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    rule = rng.normal(size=(WIDTH, 3))
    found = []
    for _ in range(count):
        x = rng.normal(size=(ROWS, WIDTH))
        found.append((jnp.asarray(x, dtype), jnp.asarray(np.eye(3)[(x @ rule).argmax(-1)], dtype)))
    return found


def run(pipeline: Any, params: Any, data: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
    state, infos = pipeline.init(params, *data[0]), []
    for x, y in data:
        params, state, info = pipeline.update(params, state, x, y)
        infos.append(info)
    params, state = pipeline.finish(params, state)
    return params, state, infos


def assert_equal(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_stage_is_projection() -> None:
    fns, params = network(3)

    def whole(params: Any, x: Any) -> Any:
        for fn, own in zip(fns, params, strict=True):
            x = fn(own, x)
        return x

    data = batches(20)
    pipeline = pjax.optim.PipelinedProjection([whole], loss)
    assert pipeline.delays == (0,)
    found, _, infos = run(pipeline, [params], data)

    optimizer = pjax.optim.Projection()

    def whole_loss(params: Any, x: Any, y: Any) -> Any:
        return loss(whole(params, x), y)

    state = optimizer.init(whole_loss, params, *data[0])
    for (x, y), own in zip(data, infos, strict=True):
        params, state, info = optimizer.update(whole_loss, params, state, x, y)
        assert own.loss == info.loss
    assert_equal(found, [params])


def by_batch(pipeline: Any, params: Any, data: Sequence[Any]) -> Any:
    """The same told by batches in place of queues: each says what it meets, and when."""
    last, state = len(pipeline.stages) - 1, pipeline.init(params, *data[0])
    described = pipeline._described(state.layers)
    params, kept = list(params), list(state.kept)
    inputs: dict[Any, Any] = {(b, 0): x for b, (x, _) in enumerate(data)}
    asked: dict[Any, Any] = {}
    for tick in range(len(data) + 2 * last):
        old = dict(asked)
        for s in range(last + 1):
            b = tick - (2 * last - s)
            if 0 <= b < len(data):
                x = inputs[b, s]
                one: Any = Labelled(x, data[b][1])
                if s < last:
                    one = Asked(x, inputs[b, s + 1], old[b, s])
                solved = stages.solve(described[s], params[s], kept[s], one, 1.0)
                params[s], kept[s] = solved.params, solved.kept
                asked[b, s - 1] = solved.request
        for s in reversed(range(last)):
            if 0 <= (b := tick - s) < len(data):
                inputs[b, s + 1] = stages.forward(pipeline.stages[s], params[s], inputs[b, s])
    return params


def test_the_schedule_is_that_of_the_batches() -> None:
    fns, params = network(4)
    pipeline = pjax.optim.PipelinedProjection(fns, loss)
    data = batches(15)
    found, state, _ = run(pipeline, params, data)
    assert_equal(found, by_batch(pipeline, params, data))
    assert [int(kept.count) for kept in state.kept] == [15] * 4


def test_delays() -> None:
    fns, params = network(4)
    pipeline = pjax.optim.PipelinedProjection(fns, loss)
    assert pipeline.delays == (6, 4, 2, 0)
    data = batches(10)
    state = pipeline.init(params, *data[0])
    for tick, (x, y) in enumerate(data):
        before = params
        params, state, info = pipeline.update(params, state, x, y)
        moved = [bool(jnp.any(a["w"] != b["w"])) for a, b in zip(before, params, strict=True)]
        # Stage s is asked by the first batch in tick 2(S - 1) - s, when its newest batch is number
        # 2(S - 1) - 2s: its delay.
        assert moved == [tick >= 6 - s for s in range(4)]
        assert info.batch == (tick - 3 if tick >= 3 else None)
        waiting = [len(outputs) for outputs in state.outputs]
        assert waiting == [min(max(tick + 1 - s, 0), delay) for s, delay in enumerate((6, 4, 2, 0))]


def test_a_target_that_is_met_asks_for_nothing_more() -> None:
    """With κ = 1 a stage whose own moves have made of the inputs what was asked rests."""
    fns, params = network(2)
    pipeline = pjax.optim.PipelinedProjection(fns, loss)
    (x, y), *_ = batches(1)
    state = pipeline.init(params, x, y)
    stage = replace(pipeline._described(state.layers)[0], correction=1.0, ramp=1.0)
    before = dense(params[0], x)
    now = {"w": params[0]["w"] * 1.01, "b": params[0]["b"] + 0.01}
    request = dense(now, x) - before
    met = stages.solve(stage, now, state.kept[0], Asked(x, before, request), 1.0)
    unmet = stages.solve(stage, now, state.kept[0], Asked(x, before, 2 * request), 1.0)

    def length(solved: Any) -> Any:
        return jnp.linalg.norm(solved.params["w"] - now["w"])

    assert length(met) < 1e-4 * length(unmet)


def test_a_request_is_the_force_on_the_inputs() -> None:
    """In direction it is the gradient of the loss by the inputs of the last stage."""
    fns, params = network(2)
    pipeline = pjax.optim.PipelinedProjection(fns, loss)
    (x, y), *_ = batches(1)
    state = pipeline.init(params, x, y)
    stage = pipeline._described(state.layers)[1]
    h = dense(params[0], x)
    solved = stages.solve(stage, params[1], state.kept[1], Labelled(h, y), 1.0)
    gradient = jax.grad(lambda h: loss(head(params[1], h), y))(h)
    assert solved.request is not None
    cosine = -jnp.vdot(solved.request, gradient) / (
        jnp.linalg.norm(solved.request) * jnp.linalg.norm(gradient)
    )
    assert cosine > 0.99
    size = jnp.sqrt(jnp.mean(solved.request**2) / jnp.mean(h**2))
    np.testing.assert_allclose(size, 1.2 / 2**0.5, rtol=1e-5)


def test_work_of_a_tick_does_not_grow_with_depth() -> None:
    def work(count: int) -> float:
        fns, params = network(count)
        pipeline = pjax.optim.PipelinedProjection(fns, loss)
        (x, y), *_ = batches(1)
        state = pipeline.init(params, x, y)
        worst = 0.0
        for number, stage in enumerate(pipeline._described(state.layers)):
            out = x if number < count - 1 else None
            one = Labelled(x, y) if out is None else Asked(x, out, out)
            program = stages.solve.lower(stage, params[number], state.kept[number], one, 1.0)
            ahead = stages.forward.lower(fns[number], params[number], x)
            flops = [cast(Any, p.compile().cost_analysis())["flops"] for p in (program, ahead)]
            worst = max(worst, sum(flops))
        return worst

    assert work(16) <= 1.01 * work(4)


def test_learns() -> None:
    """Four stages of the digits, with a delay of up to six batches."""
    digits = load("digits")
    sizes = (64, 32, 32, 32, 10)
    params = [
        {"w": he(key, pair), "b": jnp.zeros(pair[1])}
        for key, pair in zip(jax.random.split(jax.random.key(0), 4), pairwise(sizes), strict=True)
    ]
    pipeline = pjax.optim.PipelinedProjection([dense] * 3 + [head], loss)
    rows = islice(batch_rows(len(digits.train), 128, seed=0), 200)
    data = [(digits.train.x[r], jax.nn.one_hot(digits.train.y[r], 10)) for r in rows]
    params, _, _ = run(pipeline, params, data)
    x = digits.test.x
    for fn, own in zip(pipeline.stages, params, strict=True):
        x = fn(own, x)
    assert float((x.argmax(-1) == digits.test.y).mean()) > 0.9


def test_a_state_goes_on_after_finish() -> None:
    fns, params = network(3)
    pipeline = pjax.optim.PipelinedProjection(fns, loss)
    data = batches(6)
    params, state, _ = run(pipeline, params, data)
    params, state, info = pipeline.update(params, state, *data[0])
    assert info.batch is None
    params, state = pipeline.finish(params, state)
    assert [int(kept.count) for kept in state.kept] == [7, 7, 7]


def test_numbers_that_are_not_finite_name_the_stage() -> None:
    fns, params = network(2)
    pipeline = pjax.optim.PipelinedProjection(fns, loss)
    data = batches(4)
    params[1]["b"] = params[1]["b"].at[0].set(jnp.nan)
    with pytest.raises(pjax.optim.NonFiniteError, match="Stage 1"):
        run(pipeline, params, data)


def test_errors() -> None:
    fns, params = network(2)
    (x, y), *_ = batches(1)
    with pytest.raises(ValueError, match="`stages` is empty"):
        pjax.optim.PipelinedProjection([], loss)
    with pytest.raises(TypeError, match=r"`stages\[1\]`"):
        pjax.optim.PipelinedProjection([dense, 3], loss)  # pyright: ignore
    pipeline = pjax.optim.PipelinedProjection(fns, loss)
    with pytest.raises(ValueError, match="`params` must be a list of 2"):
        pipeline.init(params[:1], x, y)
    pair = pjax.optim.PipelinedProjection([lambda p, x: (x, x), head], loss)
    with pytest.raises(TypeError, match=r"`stages\[0\]` returned tuple"):
        pair.init(params, x, y)
    state = pipeline.init(params, x, y)
    with pytest.raises(TypeError, match=r"outside of `jax.jit`"):
        jax.jit(pipeline.update)(params, state, x, y)
