"""Alternating, cyclic and Douglas–Rachford projections as the paper states them: every copy
stored, in full values.

Written for checking, in float64 NumPy, apart from the library's projections, storages and
solvers: scalar roots by bisection, consensus by summing over scalar indices, no deviations, no
closed forms for means of copies.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pjax.problem import Problem
from pjax.program import read
from pjax.rules import Affine
from pjax.rules.losses import CrossEntropy
from pjax.rules.products import NeuronBilinear, PinnedBilinear


class NaiveProblem:
    """The lifted problem of a graph: one array of full values per slot, copies last."""

    def __init__(self, problem: Problem):
        self.graph, self.layout = problem.graph, problem.layout
        self.values = {k: np.asarray(v, np.float64) for k, v in problem.values.items()}
        self.knowns = {
            node.index: [np.asarray(read(problem.values, atom), np.float64) for atom in node.knowns]
            for node in self.graph.nodes
        }
        # Number every scalar that a node produces; 0 stands for "no producer".
        self.first: dict[int, int] = {}
        total = 1
        for node in self.graph.nodes:
            if node.kind != "loss":
                self.first[node.index] = total
                total += self.values[node.output].size  # pyright: ignore
        self.total = total
        self.ids: dict[int, np.ndarray] = {}
        self.rho: dict[int, np.ndarray] = {}
        for slot in self.graph.slots:
            ids = [self._ids(p) for p in slot.producers]
            routed = np.asarray(slot.route([jnp.asarray(i) for i in ids], problem.values)).astype(
                int
            )
            self.ids[slot.index] = self._lift(slot, routed)
            self.rho[slot.index] = np.full(
                self.ids[slot.index].shape, problem.weights[slot.index].mantissa
            )

    def _ids(self, node: int) -> np.ndarray:
        out = self.values[self.graph.nodes[node].output]  # pyright: ignore
        return np.arange(self.first[node], self.first[node] + out.size, dtype=np.float64).reshape(
            out.shape
        )

    def _lift(self, slot, array):
        rule = self.graph.nodes[slot.node].rule
        if isinstance(rule, NeuronBilinear):
            left = self.graph.nodes[slot.node].slots[0] == slot.index
            lift = rule.operation.lift_left if left else rule.operation.lift_right
            return np.asarray(lift(jnp.asarray(array)))
        if isinstance(rule, PinnedBilinear):
            lift = rule.operation.lift_right if rule.pinned == "left" else rule.operation.lift_left
            return np.asarray(lift(jnp.asarray(array)))
        return np.asarray(array)

    def initial(self) -> dict[int, np.ndarray]:
        return {s.index: self._lift(s, self.values[s.variable]) for s in self.graph.slots}

    def consensus(self, state):
        """The weighted mean of all entries that read a scalar, and their total weight."""
        total, weight = np.zeros(self.total), np.zeros(self.total)
        for index, ids in self.ids.items():
            np.add.at(total, ids, self.rho[index] * state[index])
            np.add.at(weight, ids, self.rho[index])
        return total / np.where(weight > 0, weight, 1), weight

    def project(self, group, state):
        mean, weight = self.consensus(state)
        new = {index: array.copy() for index, array in state.items()}
        produced = np.full(self.total, np.nan)
        for index in self.layout.groups[group]:
            node = self.graph.nodes[index]
            inputs = [state[i] for i in node.slots]
            rhos = [self.rho[i] for i in node.slots]
            if node.kind == "loss":
                assert isinstance(node.rule, CrossEntropy)
                lam = self.layout.formulation.metric.prox_step / rhos[0][..., 0]
                new[node.slots[0]] = cross_entropy_prox(inputs[0], self.knowns[index][0], lam)
                continue
            ids = self._ids(index).astype(int)
            z, w = mean[ids], weight[ids]
            if self.layout.formulation.fanout == "paper":
                w = np.where(w > 0, 1.0, 0.0)
            if node.kind == "parameter":
                outputs, moved = z, []
            elif isinstance(node.rule, NeuronBilinear):
                (x, y), (rho_x, rho_y) = inputs, rhos
                *moved, outputs = scalar_products(x, y, rho_x, rho_y, z, w)
            elif isinstance(node.rule, PinnedBilinear):
                op = node.rule.operation
                lift = op.lift_left if node.rule.pinned == "left" else op.lift_right
                data = np.asarray(lift(jnp.asarray(self.knowns[index][0])))
                dot = (data * inputs[0]).sum(-1)
                e = (z - dot) / (1 / w + (data**2).sum(-1) / rhos[0][..., 0])
                moved = [inputs[0] + data * (e / rhos[0][..., 0])[..., None]]
                outputs = dot + (data**2).sum(-1) * e / rhos[0][..., 0]
            else:
                assert isinstance(node.rule, Affine)
                constant = (
                    self.values[node.output] if node.inner is None else self.values[node.inner[0]]
                )
                constant = constant - sum(
                    t.scale * self.values[self.graph.slots[i].variable]
                    for t, i in zip(node.rule.terms, node.slots, strict=True)
                )
                relu = node.rule.function is not None
                *moved, outputs = sums(
                    inputs, rhos, [t.scale for t in node.rule.terms], constant, z, w, relu
                )
            for i, array in zip(node.slots, moved, strict=True):
                new[i] = array
            produced[ids] = outputs
        for index, ids in self.ids.items():
            found = produced[ids]
            new[index] = np.where(np.isnan(found), new[index], found)
        return new

    def squared_distance(self, a, b):
        return sum((self.rho[i] * (a[i] - b[i]) ** 2).sum() for i in a)

    def parameters(self, state):
        mean, _ = self.consensus(state)
        return {n.output: mean[self._ids(n.index).astype(int)] for n in self.graph.parameters}


def cross_entropy_prox(v, y, lam):
    """`x + λ(softmax(x) − y) = v`, by bisection in the normaliser: `w + ln w = z`, `Σ w = λ`."""
    u = v + lam[..., None] * y

    def root(z):  # w + ln w = z
        low, high = np.full_like(z, -800.0), np.maximum(np.log(np.maximum(z, 1)) + 1, 1.0)
        for _ in range(200):
            middle = (low + high) / 2
            above = np.exp(middle) + middle > z
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.exp((low + high) / 2)

    low = u.max(-1) - 1000.0 - lam
    high = u.max(-1) + 1000.0 + lam
    for _ in range(200):
        middle = (low + high) / 2
        above = root(u + np.log(lam)[..., None] - middle[..., None]).sum(-1) > lam
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return u - root(u + np.log(lam)[..., None] - ((low + high) / 2)[..., None])


def scalar_products(x, w, rho_x, rho_w, z, weight):
    """The nearest `(x', w', y)` with `y = x'·w'`, slice axis last, by bisection in the
    multiplier.
    """
    rho_x, rho_w = rho_x[..., 0], rho_w[..., 0]
    sigma = np.sqrt(rho_x * rho_w)
    kappa = weight / sigma**2
    p = sigma * (x * w).sum(-1)
    q = rho_x * (x**2).sum(-1) + rho_w * (w**2).sum(-1)
    low, high = np.full(p.shape, -1.0), np.full(p.shape, 1.0)
    for _ in range(200):
        t = (low + high) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            f = ((1 + t**2) * p + t * q) / (1 - t**2) ** 2 - sigma * z + t / kappa
        low, high = np.where(f < 0, t, low), np.where(f < 0, high, t)
    t = (low + high) / 2
    s = 1 / (1 - t**2)
    new_x = s[..., None] * (x + (t * np.sqrt(rho_w / rho_x))[..., None] * w)
    new_w = s[..., None] * (w + (t * np.sqrt(rho_x / rho_w))[..., None] * x)
    return new_x, new_w, (new_x * new_w).sum(-1)


def sums(inputs, rhos, scales, constant, z, weight, relu):
    """The nearest point of `y = Σ c x + k`, or of `y = max(Σ c x + k, 0)`: each piece, clamped,
    the nearest.
    """
    u = sum(c * x for c, x in zip(scales, inputs, strict=True)) + constant
    rho = 1 / sum(c**2 / r for c, r in zip(scales, rhos, strict=True))
    linear = (rho * u + weight * z) / (rho + weight)
    if relu:
        active, inactive = np.maximum(linear, 0), np.minimum(u, 0)
        cost = [
            rho * (active - u) ** 2 + weight * (active - z) ** 2,
            rho * (inactive - u) ** 2 + weight * z**2,
        ]
        new = np.where(cost[0] < cost[1], active, inactive)
        y = np.maximum(new, 0)
    else:
        new = y = linear
    moved = [x + c * rho * (new - u) / r for x, c, r in zip(inputs, scales, rhos, strict=True)]
    return *moved, y
