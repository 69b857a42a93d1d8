"""What a newcomer meets: names, help, what is printed, and what wrong calls are told."""

from __future__ import annotations

import pydoc
import traceback

import jax
import jax.numpy as jnp
import optax
import pytest

import pjax
from pjax.problem import Problem

X = jnp.ones((32, 4))
Y = jax.nn.one_hot(jnp.arange(32) % 2, 2)
PARAMS = {"w": jnp.zeros((4, 2))}


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy(x @ params["w"], y).mean()


def test_help_names_the_recommended_way_first() -> None:
    text = pydoc.plain(pydoc.render_doc(pjax))
    assert text.index("pjax.optim.Projection()") < text.index("DouglasRachford")
    for name in ("value_and_displacement", "register_projection", "feasibility_problem"):
        assert name in text


def test_completion_shows_what_users_use() -> None:
    shown = dir(pjax)
    for name in ("optim", "value_and_displacement", "cross_entropy", "nn", "__version__"):
        assert name in shown
    assert not {"trace", "graph", "problem", "rewrites", "slots", "thresholds"} & {*shown}
    assert Problem is pjax.Problem  # what is not shown is there


def test_a_residual_is_one_line_everywhere() -> None:
    optimizer = pjax.optim.DouglasRachford(5)
    _, residual = optimizer.update(lambda p: loss_fn(p, X, Y), PARAMS)
    first, last = (float(residual.residual[place]) for place in (0, -1))
    line = (
        f"ResidualHistory(5 steps, residual {first:.3g} to {last:.3g}, verdict {residual.verdict})"
    )
    assert repr(residual) == str(residual) == f"{residual}" == line

    seen = []

    def inside(params):
        new, history = optimizer.update(lambda p: loss_fn(p, X, Y), params)
        seen.append(repr(history))
        return new, history

    jax.jit(inside)(PARAMS)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), PARAMS)
    seen.append(repr(jax.vmap(inside)(many)[1]))
    for text in seen:
        assert text.startswith("ResidualHistory(residual of shape ")
        assert "\n" not in text


GRADIENT = {"w": jnp.ones((4, 2))}


@pytest.mark.parametrize("given", [0.5, jnp.ones(()), GRADIENT], ids=["number", "loss", "gradient"])
def test_a_value_where_the_function_belongs(given) -> None:
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, PARAMS, X, Y)
    for call in (
        lambda: optimizer.init(given, PARAMS, X, Y),
        lambda: optimizer.update(given, PARAMS, state, X, Y),
        lambda: pjax.optim.DouglasRachford(5).update(given, PARAMS),
        lambda: pjax.feasibility_problem(given, PARAMS),
    ):
        with pytest.raises(TypeError, match="must be the loss as a function, and got a.*itself"):
            call()


def test_a_gradient_function_is_no_loss() -> None:
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, PARAMS, X, Y)
    with pytest.raises(TypeError, match="`loss_fn` and not `jax.grad"):
        optimizer.update(jax.grad(loss_fn), PARAMS, state, X, Y)
    # A loss in a list is one number still, whatever the parameters are in.
    moved, _, _ = optimizer.update(lambda *args: {"w": loss_fn(*args)}, PARAMS, state, X, Y)
    assert moved["w"].shape == (4, 2)


def test_a_batch_of_another_size_than_its_labels() -> None:
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, PARAMS, X, Y)
    with pytest.raises(TypeError) as caught:
        optimizer.update(loss_fn, PARAMS, state, X, Y[:31])
    told = "".join(traceback.format_exception_only(caught.value))
    assert "have 32, 31 rows: a batch and its labels must have as many" in told
    # Sizes that are right are not blamed.
    with pytest.raises(TypeError) as caught:
        optimizer.update(loss_fn, PARAMS, state, X[:, :3], Y)
    assert "rows" not in "".join(traceback.format_exception_only(caught.value))


def test_a_forgotten_state() -> None:
    optimizer = pjax.optim.Projection()
    with pytest.raises(TypeError, match="`state` must come from `init`"):
        optimizer.update(loss_fn, PARAMS, X, Y)  # pyright: ignore
