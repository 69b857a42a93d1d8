"""Run by `test_pipeline_devices` in a process with four CPU devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pjax


def dense(params: Any, x: Any) -> Any:
    return jax.nn.relu(x @ params["w"] + params["b"])


def loss(outputs: Any, labels: Any) -> Any:
    return jnp.mean(pjax.cross_entropy(outputs, labels))


def run(params: Any, data: Any, devices: Any) -> Any:
    pipeline = pjax.optim.PipelinedProjection([dense] * 4, loss, devices=devices)
    own, state = list(params), pipeline.init(params, *data[0])
    for x, y in data:
        own, state, _ = pipeline.update(own, state, x, y)
    return pipeline.finish(own, state)[0]


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    params = [
        {"w": jnp.asarray(rng.normal(size=(6, 6)) / 2), "b": jnp.zeros(6)} for _ in range(4)
    ]  # fmt: skip
    data = [
        (jnp.asarray(rng.normal(size=(8, 6))), jnp.asarray(np.eye(6)[rng.integers(0, 6, 8)]))
        for _ in range(10)
    ]
    here, there = run(params, data, None), run(params, data, jax.devices())
    for number, (one, other) in enumerate(zip(here, there, strict=True)):
        for a, b, before in zip(*map(jax.tree.leaves, (one, other, params[number])), strict=True):
            assert b.devices() == {jax.devices()[number]}, (number, b.devices())
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)
            assert np.any(a != before)
    # Two stages share a device where there are fewer devices.
    for number, own in enumerate(run(params, data, jax.devices()[:2])):
        assert own["w"].devices() == {jax.devices()[number // 2]}
        np.testing.assert_allclose(own["w"], here[number]["w"], rtol=1e-12, atol=1e-14)
    print("equal")


if __name__ == "__main__":
    main()
