"""`pjax.optim.Projection`: readers, the solve, equal problems and equal moves, hard inputs."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import pjax
from pjax.trace import trace
from pjax.training import find_units
from pjax.training.requests import Requests
from tests.networks import assert_close, make_mlp, mlp, mlp_loss

FULL = Requests(rank=10_000, output_rank=10_000, equalise=1e9, every=1)


def moves_of(optimizer, fn, params, *args, batches=1):
    state = optimizer.init(fn, params, *args)
    new = params
    for _ in range(batches):
        new, state, _ = optimizer.update(fn, new, state, *args)
    return jax.tree.map(jnp.subtract, new, params)


def units_of(fn, params):
    program, *_ = trace(fn, params)
    layout = pjax.optim.Projection()._layout(program)
    return layout.graph, find_units(layout.graph)


# --- Readers ------------------------------------------------------------------------------------


def test_a_weight_and_its_bias_are_one_layer():
    params, x, y = make_mlp(0, 2)
    graph, units = units_of(lambda p: mlp_loss(p, x, y), params)
    layers = {graph.nodes[unit.node].name: unit.layer for unit in units.units}
    assert units.layers == 3
    for k in range(3):
        assert layers[f"['w'][{k}]"] == layers[f"['b'][{k}]"]


def test_steps_of_a_loop_are_readers_of_one_weight():
    w = jnp.eye(3)

    def loss(params):
        h = jnp.ones((4, 3))
        for _ in range(5):
            h = jnp.tanh(h @ params["w"])
        return jnp.mean(pjax.squared_error(h, jnp.zeros((4, 3))))

    _, units = units_of(loss, {"w": w})
    (unit,) = units.units
    assert [reader.kind for reader in unit.readers] == 5 * ["product"]


def test_gathered_rows_are_entries():
    tokens = jnp.array([[0, 2], [1, 1]])

    def loss(params):
        x = jnp.tanh(params["embedding"][tokens])
        return jnp.mean(pjax.cross_entropy(x @ params["w"], jax.nn.one_hot(tokens, 3)))

    params = {"embedding": jnp.ones((3, 4)), "w": jnp.ones((4, 3))}
    graph, units = units_of(loss, params)
    kinds = {graph.nodes[u.node].name: [r.kind for r in u.readers] for u in units.units}
    assert kinds == {"['embedding']": ["entries"], "['w']": ["product"]}


def test_units_know_the_thresholds_beside_them():
    params, x, y = make_mlp(0, 2)

    def loss(p):
        h = x
        for w, b in zip(p["w"][:-1], p["b"][:-1], strict=True):
            h = jnp.sign(h @ w + b)
        return jnp.mean(pjax.cross_entropy(h @ jnp.sign(p["w"][-1]) + p["b"][-1], y))

    _, units = units_of(loss, params)
    by_layer = {unit.layer: unit for unit in units.units if unit.matrix is not None}
    found = sorted((u.thresholds, u.reads_thresholds) for u in by_layer.values())
    assert found == [(False, True), (True, False), (True, True)]
    assert not any(
        unit.thresholds or unit.reads_thresholds
        for unit in units_of(lambda p: mlp_loss(p, x, y), params)[1].units
    )


# --- The solve ----------------------------------------------------------------------------------


def numpy_moves(rows, forces, size, kappa=0.4):
    """The first move of one weight, by a solve of the same least squares in NumPy."""
    x, g = np.concatenate(rows), np.concatenate(forces)
    (number, length) = x.shape
    request = size * g / np.sqrt(np.mean(g**2))
    moment, asked = x.T @ x / number, x.T @ request / number
    white = np.linalg.inv(moment + 0.01 * np.trace(moment) / length * np.eye(length))
    noise = np.trace(asked.T @ white @ asked) / np.trace(moment @ white)
    share = min(noise / np.mean(np.sum(request**2, axis=1)), 1)
    damping = kappa * length * share * np.linalg.eigvalsh(moment)[-1]
    move = np.linalg.solve(moment + damping * np.eye(length), asked)
    explained = np.sum(move * asked) / np.mean(np.sum(request**2, axis=1))
    return move * min(1, 0.3 / explained)


def test_the_first_move_is_a_ridge_regression(x64):
    """Of a dense layer that a squared error reads: the force is what is left, and the request it in
    the size of the output.
    """
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(20, 6)), rng.normal(size=(20, 3))
    w = rng.normal(size=(6, 3))
    settings = dataclasses.replace(FULL, size=0.7)
    optimizer = pjax.optim.Projection(requests=settings)
    found = moves_of(
        optimizer, lambda p, x: jnp.mean(pjax.squared_error(x @ p, jnp.asarray(z))),
        jnp.asarray(w), jnp.asarray(x),
    )  # fmt: skip
    output = x @ w
    size = 0.7 * np.sqrt(np.mean(output**2))
    best = numpy_moves([x], [z - output], size)
    np.testing.assert_allclose(found, best, rtol=1e-8)


@pytest.mark.parametrize("spelling", ["right", "left", "transposed", "loop", "sum"])
def test_other_spellings_of_a_read_have_the_same_rows(x64, spelling):
    rng = np.random.default_rng(1)
    x, z, w = (jnp.asarray(rng.normal(size=s)) for s in ((12, 5), (12, 3), (5, 3)))
    optimizer = pjax.optim.Projection(requests=FULL)

    def loss(product):
        return lambda p: jnp.mean(pjax.squared_error(product(p), z))

    expected = moves_of(optimizer, loss(lambda p: x @ p), w)
    if spelling == "right":
        found = moves_of(optimizer, loss(lambda p: jnp.einsum("nd,do->no", x, p)), w)
    elif spelling == "left":
        found = moves_of(optimizer, loss(lambda p: (p @ x.T).T), w.T).T
    elif spelling == "transposed":
        found = moves_of(optimizer, loss(lambda p: x @ jnp.swapaxes(p, 0, 1)), w.T).T
    elif spelling == "sum":
        other = jnp.asarray(rng.normal(size=x.shape))
        found = moves_of(optimizer, loss(lambda p: other @ p + (x - other) @ p), w)
    else:
        parts = lambda p: jnp.concatenate([x[:6] @ p, x[6:] @ p])  # noqa: E731
        found = moves_of(optimizer, loss(parts), w)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_a_convolution_of_one_tap_is_a_dense_layer(x64):
    rng = np.random.default_rng(2)
    x, z, w = (jnp.asarray(rng.normal(size=s)) for s in ((2, 3, 3, 4), (2, 3, 3, 5), (4, 5)))
    optimizer = pjax.optim.Projection(requests=FULL)
    dense = moves_of(optimizer, lambda p: jnp.mean(pjax.squared_error(x @ p, z)), w)

    def convolved(p):
        out = jax.lax.conv_general_dilated(
            x, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(pjax.squared_error(out, z))

    other = jnp.asarray(rng.normal(size=x.shape))

    def convolved_twice(p):
        parts = [
            jax.lax.conv_general_dilated(
                part, p, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            for part in (other, x - other)
        ]
        return jnp.mean(pjax.squared_error(parts[0] + parts[1], z))

    found = moves_of(optimizer, convolved_twice, w[None, None])[0, 0]
    np.testing.assert_allclose(found, dense, rtol=1e-6, atol=1e-9)
    found = moves_of(optimizer, convolved, w[None, None])[0, 0]
    np.testing.assert_allclose(found, dense, rtol=1e-6, atol=1e-9)


def numpy_entry_moves(diagonal, asked, requests, kappa=0.4):
    """The first move of what is solved for entry by entry.

    **Arguments:** the diagonal of `XᵀX`, `XᵀR`, and the rows of requests.
    """
    diagonal, asked = diagonal / len(requests), asked / len(requests)
    square = np.mean(np.sum(requests**2, axis=1))
    inverses = 1 / (diagonal + 0.01 * np.mean(diagonal))
    directions = np.sum(diagonal * inverses) / diagonal.shape[-1]
    share = min(np.sum(asked**2 * inverses) / (directions * square), 1)
    damping = kappa * np.prod(diagonal.shape[:-1]) * share * np.max(diagonal)
    move = asked / (diagonal + damping)
    return move * min(1, 0.3 * square / np.sum(move * asked))


def requested(output, target, size=1.2):
    """Requests of the outputs' size, along the forces of a squared error."""
    force = target - output
    return size * np.sqrt(np.mean(output**2)) * force / np.sqrt(np.mean(force**2))


@pytest.mark.parametrize("kind", ["bias", "scale", "embedding", "embedding by steps"])
def test_the_first_move_of_entries_is_a_weighted_mean(x64, kind):
    """A bias by rows of ones, a scale by its inputs, an embedding by how often each row is read."""
    rng = np.random.default_rng(4)
    x, z, tokens = *rng.normal(size=(2, 12, 3)), np.array([0, 1, 3, 3, 3, 0, 2, 1, 3, 3, 0, 1])
    params = {"p": rng.normal(size=3), "w": rng.normal(size=(3, 3))}
    rows, layers = x @ params["w"], 1
    if kind == "bias":
        made = lambda p: x @ p["w"] + p["p"]  # noqa: E731
        rows = np.ones((12, 3))
    elif kind == "scale":
        made = lambda p: (x @ p["w"]) * p["p"]  # noqa: E731
        layers = 2
    else:
        params, rows = {"p": rng.normal(size=(5, 3))}, np.eye(5)[tokens][:, :, None]
        made = lambda p: p["p"][tokens]  # noqa: E731
        if kind == "embedding by steps":
            made = lambda p: jnp.concatenate([p["p"][tokens[k : k + 4]] for k in (0, 4, 8)])  # noqa: E731
    requests = requested(made(params), z, 1.2 / np.sqrt(layers))
    across = requests if kind in ("bias", "scale") else requests[:, None, :]
    diagonal = np.sum(rows**2, axis=0) * np.ones(across.shape[1:])
    best = numpy_entry_moves(diagonal, np.sum(rows * across, axis=0), requests)
    found = moves_of(
        pjax.optim.Projection(requests=FULL),
        lambda p: jnp.mean(pjax.squared_error(made(p), jnp.asarray(z))),
        jax.tree.map(jnp.asarray, params),
    )
    np.testing.assert_allclose(found["p"], best, rtol=1e-8, atol=1e-12)


def test_the_first_move_of_a_kernel_is_that_of_its_patches(x64):
    rng = np.random.default_rng(5)
    x, z, w = (rng.normal(size=s) for s in ((3, 6, 6, 2), (3, 3, 3, 4), (3, 3, 2, 4)))
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))  # of SAME with a stride of 2
    patches = np.stack([
        padded[n, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].ravel()
        for n in range(3) for i in range(3) for j in range(3)
    ])  # fmt: skip
    output, target = patches @ w.reshape(18, 4), z.reshape(-1, 4)
    size = 1.2 * np.sqrt(np.mean(output**2))
    best = numpy_moves([patches], [target - output], size).reshape(w.shape)

    def loss(w):
        out = jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(pjax.squared_error(out, jnp.asarray(z)))

    found = moves_of(pjax.optim.Projection(requests=FULL), loss, jnp.asarray(w))
    np.testing.assert_allclose(found, best, rtol=1e-8, atol=1e-9)


# --- Equal problems, equal moves ----------------------------------------------------------------

OPTIMIZER = pjax.optim.Projection()


def spelled(name, x, y):
    def loss(p):
        logits = mlp(p, x)
        if name == "mean":
            return jnp.mean(pjax.cross_entropy(logits, y))
        if name == "sum":
            return jnp.sum(pjax.cross_entropy(logits, y))
        if name == "optax":
            return jnp.mean(optax.softmax_cross_entropy(logits, y))
        if name == "by hand":
            return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=-1))
        if name == "mask":
            return jnp.sum(pjax.cross_entropy(logits, y) * jnp.ones(len(y))) / len(y)
        if name == "halves":
            k = len(y) // 2
            rows = (pjax.cross_entropy(mlp(p, x[i]), y[i]) for i in (slice(k), slice(k, None)))
            return sum(jnp.mean(r) for r in rows) / 2
        if name == "twice":
            two = jnp.concatenate([logits, mlp(p, x)]), jnp.concatenate([y, y])
            return jnp.mean(pjax.cross_entropy(*two))
        if name == "zero rows":
            more = jnp.concatenate([x, 5 + x[:7]])
            labels = jnp.concatenate([y, y[:7]])
            weights = jnp.concatenate([jnp.ones(len(x)), jnp.zeros(7)])
            return jnp.sum(weights * pjax.cross_entropy(mlp(p, more), labels)) / len(x)
        raise ValueError(name)

    return loss


@pytest.mark.parametrize(
    "name", ["sum", "optax", "by hand", "mask", "halves", "twice", "zero rows"]
)
def test_equal_problems_have_equal_moves(x64, name):
    params, x, y = make_mlp(3, 2)
    expected = moves_of(OPTIMIZER, spelled("mean", x, y), params, batches=3)
    found = moves_of(OPTIMIZER, spelled(name, x, y), params, batches=3)
    assert_close(found, expected, 1e-5)


def test_moves_do_not_depend_on_units(x64):
    params, x, y = make_mlp(1, 2)
    moves = moves_of(OPTIMIZER, lambda p, x: mlp_loss(p, x, y), params, x, batches=2)
    scaled = {"w": [params["w"][0] / 100, *params["w"][1:]], "b": params["b"]}
    other = moves_of(OPTIMIZER, lambda p, x: mlp_loss(p, x, y), scaled, 100 * x, batches=2)
    other["w"][0] = 100 * other["w"][0]
    assert_close(other, moves, 1e-6)


# --- Hard inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["one row", "constant", "zeros", "tiny", "huge", "solved", "dead", "no labels"]
)
def test_nothing_becomes_nan(case):
    params, x, y = make_mlp(5, 2)
    params, x, y = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x, y))
    if case == "one row":
        x, y = x[:1], y[:1]
    elif case == "constant":
        x = jnp.ones_like(x)
    elif case == "zeros":
        x = jnp.zeros_like(x)
    elif case in ("tiny", "huge"):
        x = x * {"tiny": 1e-6, "huge": 1e6}[case]
    elif case == "dead":
        params["b"][0] = params["b"][0] - 1e3
    elif case == "no labels":
        y = jnp.zeros_like(y)
    elif case == "solved":
        y = jax.nn.one_hot(jnp.argmax(mlp(params, x), axis=-1), y.shape[-1])
        params["w"][-1] = 1e3 * params["w"][-1]
    optimizer = pjax.optim.Projection(check=False)
    state = optimizer.init(mlp_loss, params, x, y)
    for _ in range(6):
        params, state, info = optimizer.update(mlp_loss, params, state, x, y)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, state, info)))


def test_zero_weights_move():
    """A layer that begins at zero has no size of its own: it is asked for that of its input."""
    x = jax.random.normal(jax.random.key(0), (16, 4))
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    y = jax.nn.one_hot(jnp.arange(16) % 3, 3)
    moves = moves_of(
        OPTIMIZER, lambda p: jnp.mean(pjax.cross_entropy(x @ p["w"] + p["b"], y)), params
    )
    assert float(jnp.max(jnp.abs(moves["w"]))) > 1e-5


@pytest.mark.parametrize("weights", [0.0, 1.0])
def test_what_is_zero_in_the_first_batches_begins_in_a_later_one(weights):
    """A layer without inputs or outputs has no size yet, and is not held at it."""
    x, y = jax.random.normal(jax.random.key(0), (16, 4)), jax.nn.one_hot(jnp.arange(16) % 3, 3)
    loss = lambda p, x: jnp.mean(pjax.cross_entropy(jnp.tanh(x @ p["a"]) @ p["b"], y))  # noqa: E731
    keys = jax.random.split(jax.random.key(1))
    params = {
        "a": weights * jax.random.normal(keys[0], (4, 5)), "b": jax.random.normal(keys[1], (5, 3))
    }  # fmt: skip
    state = OPTIMIZER.init(loss, params, x)
    for _ in range(2):
        still, state, _ = OPTIMIZER.update(loss, params, state, jnp.zeros_like(x))
    jax.tree.map(np.testing.assert_array_equal, still, params)
    moved, state, _ = OPTIMIZER.update(loss, params, state, x)
    assert float(jnp.max(jnp.abs(moved["a"] - params["a"]))) > 1e-5


@pytest.mark.parametrize("relaxation", [float("nan"), -1.0, "fast", [0.5, 0.5], np.inf])
def test_a_relaxation_that_is_no_factor_is_an_error(relaxation):
    params = {"w": jnp.ones((2, 2))}
    loss = lambda p: jnp.sum(pjax.squared_error(p["w"], jnp.zeros((2, 2))))  # noqa: E731
    state = OPTIMIZER.init(loss, params)
    with pytest.raises(ValueError, match="`relaxation` must be a finite number of at least 0"):
        OPTIMIZER.update(loss, params, state, relaxation=relaxation)
    with pytest.raises(ValueError, match="`relaxation` must be a finite number of at least 0"):
        pjax.optim.AlternatingProjections().update(loss, params, relaxation=relaxation)


def test_a_head_that_begins_small_moves_as_one_that_begins_at_zero():
    """Policies and residual branches begin with small weights, and are not held there by them."""
    x = jax.random.normal(jax.random.key(0), (16, 4))
    y = jax.nn.one_hot(jnp.arange(16) % 3, 3)
    head = jax.random.normal(jax.random.key(1), (4, 3))

    def move(scale):
        params = {"first": jnp.eye(4), "head": scale * head}
        loss = lambda p: jnp.mean(pjax.cross_entropy(jnp.tanh(x @ p["first"]) @ p["head"], y))  # noqa: E731
        return moves_of(OPTIMIZER, loss, params)["head"]

    zero, small = move(0.0), move(0.005)
    assert float(jnp.linalg.norm(small - zero)) < 0.02 * float(jnp.linalg.norm(zero))


@pytest.mark.parametrize(
    "output",
    [
        lambda p, x: x @ p + jnp.tanh(x @ p),
        lambda p, x: x @ p.T.reshape(p.shape),
        lambda p, x: x @ (p * p),
    ],
    ids=["shared", "transposed", "squared"],
)
def test_parameters_that_are_not_read_as_they_are_move(output):
    params, x, _ = make_mlp(0, 1)
    w = params["w"][0]
    target = jnp.ones((len(x), w.shape[1]))
    loss = lambda p: jnp.mean(pjax.squared_error(output(p, x), target))  # noqa: E731
    moved = w + moves_of(OPTIMIZER, loss, w, batches=3)
    assert float(loss(moved)) < float(loss(w))


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_updates_lower_the_loss_of_their_batch(scale):
    """Also from saturated logits and tiny inputs."""
    params, x, y = make_mlp(3, 3)
    x = scale * x
    moves = moves_of(OPTIMIZER, mlp_loss, params, x, y, batches=3)
    assert float(mlp_loss(jax.tree.map(jnp.add, params, moves), x, y)) < float(
        mlp_loss(params, x, y)
    )


def test_a_state_of_other_shapes_is_an_error():
    params, x, y = make_mlp(5, 2)
    other, *_ = make_mlp(5, 2, width=9)
    state = OPTIMIZER.init(mlp_loss, other, x, y)
    with pytest.raises(ValueError, match="`init` with these parameters"):
        OPTIMIZER.update(mlp_loss, params, state, x, y)


# --- In use -------------------------------------------------------------------------------------


def test_a_state_that_orbax_has_kept_goes_on_as_it_was(tmp_path):
    params, x, y = make_mlp(8, 2)
    optimizer = pjax.optim.Projection(averaging=8.0)
    carry = params, optimizer.init(mlp_loss, params, x, y)
    for _ in range(3):
        carry = optimizer.update(mlp_loss, *carry, x, y)[:2]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", carry)
        checkpointer.wait_until_finished()
        empty = jax.eval_shape(lambda: (params, optimizer.init(mlp_loss, params, x, y)))
        kept = checkpointer.restore(tmp_path / "state", empty)
    for _ in range(2):
        carry = optimizer.update(mlp_loss, *carry, x, y)[:2]
        kept = optimizer.update(mlp_loss, *kept, x, y)[:2]
    jax.tree.map(np.testing.assert_array_equal, kept, carry)


@pytest.mark.parametrize("averaging", [None, 8.0])
def test_sizes_are_those_of_the_state(averaging):
    params, x, y = make_mlp(8, 2)
    optimizer = pjax.optim.Projection(averaging=averaging)
    state = optimizer.init(mlp_loss, params, x, y)
    size = optimizer.sizes(mlp_loss, params, x, y)
    assert size.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert size.requests == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    "mask",
    [
        {"w": [False, True, True], "b": [False, True, False]},
        lambda params: {"w": [False, True, True], "b": [False, True, False]},
    ],
    ids=["tree", "function"],
)
def test_masked_parameters_stay_and_are_no_part_of_the_problem(mask):
    params, x, y = make_mlp(9, 2)
    optimizer = pjax.optim.Projection(mask=mask, averaging=8.0, weight_decay=0.1)
    state = optimizer.init(mlp_loss, params, x, y)
    new, state, _ = optimizer.update(mlp_loss, params, state, x, y)
    direction, _, _ = optimizer.displacement(mlp_loss, params, state, x, y)
    whole = {"w": [False, True, True], "b": [False, True, False]}
    for moves, before, after, moved in zip(
        *map(jax.tree.leaves, (whole, params, new, direction)), strict=True
    ):
        assert bool(jnp.any(before != after)) == moves == bool(jnp.any(moved != 0))
    assert jax.tree.structure(optimizer.average(new, state)) == jax.tree.structure(params)

    def closed(own, x, y):
        b = [params["b"][0], own["b"], params["b"][2]]
        return mlp_loss({"w": [params["w"][0], *own["w"]], "b": b}, x, y)

    own = {"w": params["w"][1:], "b": params["b"][1]}
    plain = dataclasses.replace(optimizer, mask=None)
    other, _, _ = plain.update(closed, own, plain.init(closed, own, x, y), x, y)
    assert_close({"w": new["w"][1:], "b": new["b"][1]}, other, 1e-6)


def test_a_mask_of_a_whole_part_is_a_prefix():
    params, x, y = make_mlp(9, 2)
    optimizer = pjax.optim.Projection(mask={"w": True, "b": False})
    new, *_ = optimizer.update(mlp_loss, params, optimizer.init(mlp_loss, params, x, y), x, y)
    assert all(bool(jnp.all(a == b)) for a, b in zip(new["b"], params["b"], strict=True))
    assert all(bool(jnp.any(a != b)) for a, b in zip(new["w"], params["w"], strict=True))
    with pytest.raises(ValueError, match="`mask` is no prefix of `params`"):
        pjax.optim.Projection(mask={"v": True}).init(mlp_loss, params, x, y)
    with pytest.raises(TypeError, match="`mask` must have True or False"):
        pjax.optim.Projection(mask={"w": 1.0, "b": 0.0}).init(mlp_loss, params, x, y)


def test_a_small_network_is_fitted():
    params, x, y = make_mlp(6, 2)
    state = OPTIMIZER.init(mlp_loss, params, x, y)
    first = None
    for _ in range(30):
        params, state, info = OPTIMIZER.update(mlp_loss, params, state, x, y)
        first = info.loss if first is None else first
    assert float(info.loss) < 0.1 * float(first)


def test_jit_scan_and_vmap_agree():
    params, x, y = make_mlp(7, 1)
    params, x, y = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x, y))
    optimizer = pjax.optim.Projection(check=False)
    state = optimizer.init(mlp_loss, params, x, y)

    def step(carry, _):
        params, state, info = optimizer.update(mlp_loss, *carry, x, y)
        return (params, state), info.loss

    (expected, _), losses = jax.lax.scan(step, (params, state), None, 5)
    carry = params, state
    for k in range(5):
        carry, loss = jax.jit(step)(carry, None)
        np.testing.assert_allclose(loss, losses[k], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(carry[0]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    two = jax.tree.map(lambda a: jnp.stack([a, a]), (params, state))
    (seeds, _), _ = jax.vmap(lambda carry: jax.lax.scan(step, carry, None, 5))(two)
    for a, b in zip(jax.tree.leaves(seeds), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-2, atol=1e-4)


def test_a_smaller_last_batch():
    params, x, y = make_mlp(8, 1)
    state = OPTIMIZER.init(mlp_loss, params, x, y)
    params, state, _ = OPTIMIZER.update(mlp_loss, params, state, x, y)
    params, state, info = OPTIMIZER.update(mlp_loss, params, state, x[:5], y[:5])
    assert np.isfinite(float(info.loss))


def test_auxiliary_outputs_are_those_of_the_forward_pass():
    params, x, y = make_mlp(9, 1)
    optimizer = pjax.optim.Projection(has_aux=True)

    def loss(p, x, y):
        logits = mlp(p, x)
        return jnp.mean(pjax.cross_entropy(logits, y)), {"logits": logits}

    state = optimizer.init(loss, params, x, y)
    _, _, info = optimizer.update(loss, params, state, x, y)
    np.testing.assert_allclose(info.aux["logits"], mlp(params, x), rtol=1e-5)


def test_the_average_can_be_read_at_any_time():
    params, x, y = make_mlp(10, 1)
    optimizer = pjax.optim.Projection(averaging=1.0)
    state = optimizer.init(mlp_loss, params, x, y)
    seen = []
    for _ in range(3):
        params, state, _ = optimizer.update(mlp_loss, params, state, x, y)
        seen.append(params)
    mean = optimizer.average(params, state)
    # The weights of the iterates grow like 1, 2, 3.
    expected = jax.tree.map(lambda a, b, c: (a + 2 * b + 3 * c) / 6, *seen)
    assert_close(mean, expected, 1e-5)
    with pytest.raises(ValueError, match="averaging"):
        pjax.optim.Projection().average(params, state)


def test_a_displacement_stands_where_a_gradient_does():
    params, x, y = make_mlp(11, 1)
    state = OPTIMIZER.init(mlp_loss, params, x, y)
    moved, _, _ = OPTIMIZER.update(mlp_loss, params, state, x, y)
    direction, _, _ = OPTIMIZER.displacement(mlp_loss, params, state, x, y)
    tx = optax.sgd(1.0)
    updates, _ = tx.update(direction, tx.init(params), params)
    assert_close(optax.apply_updates(params, updates), moved, 1e-6)


def test_weight_decay_shrinks_parameters():
    params, x, y = make_mlp(12, 1)
    state = OPTIMIZER.init(mlp_loss, params, x, y)
    plain, _, _ = OPTIMIZER.update(mlp_loss, params, state, x, y)
    decayed, _, _ = pjax.optim.Projection(weight_decay=0.1).update(mlp_loss, params, state, x, y)
    assert_close(decayed, jax.tree.map(lambda a, p: a - 0.1 * p, plain, params), 1e-5)


def test_an_equinox_model_and_a_bfloat16_network():
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(1), (16, 4))
    y = jax.nn.one_hot(jnp.arange(16) % 3, 3)

    def loss(params, x, y):
        narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        logits = jax.vmap(eqx.combine(narrow, static))(x.astype(jnp.bfloat16))
        return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), y))

    state = OPTIMIZER.init(loss, params, x, y)
    losses = []
    for _ in range(20):
        params, state, info = OPTIMIZER.update(loss, params, state, x, y)
        losses.append(float(info.loss))
    assert losses[-1] < 0.7 * losses[0]
