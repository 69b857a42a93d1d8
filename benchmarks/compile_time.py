"""How long a recurrent network takes to become a compiled step, by the length of its sequence.

    python -m benchmarks.compile_time [--lengths 16 64 128] [--batch-size 64] [--profile]

The network is the paper's character RNN, its cell under `jax.lax.scan`; the step one displacement
by a cyclic sweep, beside `jax.value_and_grad` of the same loss and of the loss with its loop
unrolled. Seconds, each of one cold run:

- trace: the function becomes a flat program (nothing of the kind for gradients);
- graph: nodes, slots and routes;
- lower: the step becomes StableHLO, without the two above;
- compile: XLA.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import pjax
from pjax.displacements import ValueAndDisplacement
from pjax.solvers.base import layout_for
from pjax.trace import trace

Params = dict[str, Array]


def make(length: int, batch_size: int, symbols: int = 65, hidden: int = 64) -> tuple[Params, Any]:
    """The parameters, and a batch `(tokens, one_hot)` of `(batch, length)` tokens."""
    keys = jax.random.split(jax.random.key(0), 4)
    he = jax.nn.initializers.he_normal()
    params = {
        "embedding": jax.random.normal(keys[0], (symbols, hidden)),
        "w1": he(keys[1], (2 * hidden, hidden)),
        "b1": jnp.zeros(hidden),
        "w2": he(keys[2], (hidden, hidden)),
        "b2": jnp.zeros(hidden),
        "head": he(keys[3], (hidden, symbols)),
        "bias": jnp.zeros(symbols),
    }
    tokens = np.random.default_rng(0).integers(0, symbols, (batch_size, length + 1))
    return params, (jnp.asarray(tokens[:, :-1]), jax.nn.one_hot(tokens[:, 1:], symbols))


def make_loss(rows: Callable[..., Array], unrolled: bool) -> Callable[..., Array]:
    """The mean cross-entropy of all next characters."""

    def loss(params: Params, batch: tuple[Array, Array]) -> Array:
        tokens, one_hot = batch

        def cell(state: Array, entry: Array) -> tuple[Array, Array]:
            both = jnp.concatenate([state, entry], axis=-1)
            inner = jax.nn.relu(both @ params["w1"] + params["b1"])
            state = state + inner @ params["w2"] + params["b2"]
            return state, state

        entries = jnp.swapaxes(params["embedding"][tokens], 0, 1)
        first = jnp.zeros((len(tokens), params["w2"].shape[1]))
        if unrolled:
            states = []
            for entry in entries:
                first, state = cell(first, entry)
                states.append(state)
            outputs = jnp.stack(states)
        else:
            _, outputs = jax.lax.scan(cell, first, entries)
        logits = jnp.swapaxes(outputs, 0, 1) @ params["head"] + params["bias"]
        return jnp.mean(rows(logits, one_hot))

    return loss


def measure(step: Any, params: Params, batch: Any) -> dict[str, float]:
    """Seconds by stage, and milliseconds of a step."""
    found = {}
    if isinstance(step, ValueAndDisplacement):
        begin = time.perf_counter()
        program, *_ = trace(lambda p: step.fn(p, batch), params)
        found["trace"] = time.perf_counter() - begin
        begin = time.perf_counter()
        layout_for(step.solver, program, step.metric, step.fanout, step.splitting, step.fallback)
        found["graph"] = time.perf_counter() - begin
    begin = time.perf_counter()
    lowered = jax.jit(step).lower(params, batch)
    found["lower"] = time.perf_counter() - begin - found.get("trace", 0)
    begin = time.perf_counter()
    compiled = lowered.compile()
    found["compile"] = time.perf_counter() - begin
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(params, batch))
        times.append(time.perf_counter() - begin)
    found["ms"] = 1e3 * float(np.median(times[1:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile time by sequence length.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", nargs="+", default=["scanned", "unrolled", "displacement"])
    parser.add_argument("--profile", action="store_true", help="say where Python spends its time")
    options = parser.parse_args()
    gradient: Any = optax.softmax_cross_entropy
    steps = {
        "scanned": jax.value_and_grad(make_loss(gradient, unrolled=False)),
        "unrolled": jax.value_and_grad(make_loss(gradient, unrolled=True)),
        "displacement": pjax.value_and_displacement(make_loss(pjax.cross_entropy, unrolled=False)),
    }
    columns = ("trace", "graph", "lower", "compile", "ms")
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}")
    print(f"{'length':>6s} {'step':14s}" + "".join(f"{column:>9s}" for column in columns))
    for length in options.lengths:
        params, batch = make(length, options.batch_size)
        for name in options.steps:
            profile = cProfile.Profile()
            if options.profile:
                profile.enable()
            found = measure(steps[name], params, batch)
            profile.disable()
            cells = (f"{found[c]:9.2f}" if c in found else f"{'–':>9s}" for c in columns)
            print(f"{length:6d} {name:14s}" + "".join(cells), flush=True)
            if options.profile:
                pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
