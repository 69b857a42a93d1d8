"""Every layer of Flax NNX and of Equinox is a graph of constraints that gives the right direction.

The page docs/operations.md is written from the same cases; after a change to rules or cases run
`python tests/operations_table.py`.
"""

from __future__ import annotations

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import operations_table
import pytest
from flax import nnx
from operations_table import network

import pjax
from pjax.backend.device import QUICK
from pjax.trace import trace

CASES = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.slow else [])
    for case in catalogue.CASES
]

#: So stiff and with so short a prox step that a displacement is the gradient up to rounding.
LIMIT = pjax.metrics.Spectral(activations=1e6, prox_step=1e-6, power_iterations=1)


@pytest.mark.parametrize("library", [catalogue.FLAX, catalogue.EQUINOX])
def test_every_public_layer_has_a_case_or_a_reason(library):
    tried = {case.layer for case in catalogue.CASES if case.library == library}
    refused = set(catalogue.NOT_SUPPORTED[library])
    outside = set(catalogue.NO_FORWARD_PASS[library])
    assert not tried & refused
    assert not (tried | refused) & outside
    new = catalogue.exported(library) - tried - refused - outside
    assert not new, f"{library} exports {sorted(new)}: add them to tests/catalogue.py."
    # What an older release does not have may stay.
    assert len(refused) <= (len(tried) + len(refused)) / 10


def test_every_layer_is_tried_quickly():
    quick = {(case.library, case.layer) for case in catalogue.CASES if not case.slow}
    assert quick == {(case.library, case.layer) for case in catalogue.CASES}


@pytest.mark.parametrize("case", CASES)
def test_forward_pass_and_direction(case):
    params, outputs, loss = network(case)
    program, *_ = trace(loss, params)
    predictions = [e.inputs[0] for e in program.equations if e.primitive.name.startswith("pjax_")]

    def compare(params):
        program, leaves, consts, _ = trace(loss, params)
        values = program.evaluate(leaves, consts)
        value, moved = pjax.value_and_displacement(loss, metric=LIMIT)(params)
        return (
            [values[atom] for atom in predictions],
            [out.reshape(-1) for out in outputs(params)],
            (value, moved),
            jax.jit(jax.value_and_grad(loss))(params),
        )

    found = jax.jit(compare).lower(params).compile(QUICK)(params)
    ours, theirs, (value, moved), (expected, gradient) = found
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    assert largest > 1e-3
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(gradient), strict=True
    ):
        scale = float(jnp.max(jnp.abs(theirs)))
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            ours, theirs, atol=1e-3 * scale + 1e-5 * largest, rtol=0, err_msg=name
        )


def test_every_primitive_is_handled():
    table = operations_table.handled(catalogue.CASES)
    for name, row in table.items():
        for splitting, handlers in row.items():
            assert handlers, f"nothing handles `{name}` in {splitting} splitting"


def test_the_page_of_operations_is_up_to_date():
    written = operations_table.PAGE.read_text()
    if f"Versions: {operations_table.versions()}." not in written:
        # Other releases make other primitives of the same layers: what both have must agree in
        # whether it is supported, which the tests above show for the installed ones.
        pytest.skip("docs/operations.md was written with other versions of the libraries")
    assert written == operations_table.page(), "run `python tests/operations_table.py`"


@pytest.mark.slow
@pytest.mark.parametrize("case", catalogue.CASES, ids=str)
def test_alternating_projections_in_neuron_splitting(case):
    params, _, loss = network(case)
    optimizer = pjax.optim.AlternatingProjections(steps_per_update=8, prox_step=0.1)
    moved, residual = optimizer.update(loss, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        assert jnp.all(jnp.isfinite(leaf)), jax.tree_util.keystr(path)
    assert np.isfinite(float(residual))
    changed = [
        bool(jnp.any(a != b))
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(moved), strict=True)
    ]
    assert any(changed)
    assert float(loss(moved)) < float(loss(params))


@pytest.mark.slow
@pytest.mark.parametrize("case", catalogue.CASES, ids=str)
def test_pure_projection(case):
    """Every parameter that has a gradient moves, all of them together downhill, and again."""
    params, _, loss = network(case)
    optimizer = pjax.optim.Projection()
    moved, state, _ = optimizer.update(loss, params, optimizer.init(loss, params))
    gradient = jax.jit(jax.grad(loss))(params)
    way = jax.tree.map(jnp.subtract, moved, params)
    total = 0.0
    for (path, move), force in zip(
        jax.tree_util.tree_leaves_with_path(way), jax.tree.leaves(gradient), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert jnp.all(jnp.isfinite(move)), name
        if jnp.max(jnp.abs(force)) > 1e-5:
            assert jnp.any(move != 0), name
        total += float(jnp.vdot(move, force))
    assert total < 0
    again, _, info = optimizer.update(loss, moved, state)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((again, info)))


class _Coupling(nnx.Module):
    """Half of the entries, scaled and shifted by a network of the other half."""

    def __init__(self, size, width, flip, rngs):
        self.flip = flip
        self.first = nnx.Linear(size // 2, width, rngs=rngs)
        self.scale = nnx.Linear(width, size // 2, rngs=rngs)
        self.shift = nnx.Linear(width, size // 2, rngs=rngs)

    def __call__(self, x):
        kept, moved = jnp.split(x, 2, -1)[:: -1 if self.flip else 1]
        h = nnx.relu(self.first(kept))
        s = jnp.tanh(self.scale(h))
        halves = [kept, moved * jnp.exp(s) + self.shift(h)]
        return jnp.concatenate(halves[:: -1 if self.flip else 1], -1), s.sum(-1)


def _flow(size=4, width=16, layers=4):
    """A flow of coupling layers, and what its log-determinants sum to: `(params, loss)`."""
    rngs = nnx.Rngs(0)
    split = [nnx.split(_Coupling(size, width, bool(i % 2), rngs)) for i in range(layers)]
    x = jax.random.normal(jax.random.key(0), (32, size))

    def loss(params):
        z, log_det = x, jnp.zeros(32)
        for (definition, _), p in zip(split, params, strict=True):
            z, change = nnx.merge(definition, p)(z)
            log_det += change
        return -jnp.mean(jax.scipy.stats.norm.logpdf(z).sum(-1) + log_det)

    return [state for _, state in split], loss


def _assert_none_missing(loss, params):
    moved, gradient = (jax.jit(of(loss))(params) for of in (pjax.displacement, jax.grad))
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    for (path, d), g in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(gradient), strict=True
    ):
        name = jax.tree_util.keystr(path)
        size = float(jnp.linalg.norm(g))
        if size > 1e-4 * largest:
            assert float(jnp.linalg.norm(d)) > 0.1 * size, name
            assert float(jnp.vdot(d, g)) > 0, name


def test_no_parameter_of_a_flow_is_left_out():
    params, loss = _flow()
    _assert_none_missing(loss, params)


@pytest.mark.slow
@pytest.mark.parametrize("case", catalogue.CASES, ids=str)
def test_no_parameter_with_a_gradient_is_left_out(case):
    params, _, loss = network(case)
    _assert_none_missing(loss, params)
