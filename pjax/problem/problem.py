"""The problem of one batch: its projections, its distances, its residuals.

In come a function, its parameters and a batch (or, inside compiled code, a layout and arrays); out
goes what a solver calls:

    problem = pjax.feasibility_problem(loss, params, x, y)
    state = problem.project(0, problem.initial())

The work is done, by task, in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from pjax.backend import shardings
from pjax.graph import Node, Slot
from pjax.metrics import Metric, Weight
from pjax.options import Fallback, Fanout, Grouping, Splitting
from pjax.problem import moves, projection, state
from pjax.problem.consensus import Consensus
from pjax.problem.forward import ForwardPass
from pjax.problem.layouts import Formulation, Layout, Sizes, layout, sizes
from pjax.problem.state import State
from pjax.problem.weights import Weights
from pjax.rules import Reference
from pjax.sets import Set
from pjax.trace import require_function, trace


class Problem:
    """Find slot values that satisfy every node: the projections and distances of one problem.

    Made by [`pjax.feasibility_problem`][], or inside compiled code from a layout and data.
    """

    def __init__(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        consts: Sequence[Any],
        vectors: Sequence[Any] | None = None,
        sets: Sequence[Set | None] = (),
    ):
        self.layout = layout
        self.graph = layout.graph
        self.leaves = list(leaves)
        self._forward = ForwardPass(layout, leaves, consts, vectors)
        self._weights = Weights(self._forward, sets)
        self._consensus = Consensus(self._weights)

    @property
    def forward(self) -> dict[int, Any]:
        """The forward pass: the value of every variable of the program."""
        return self._forward.program_values

    @property
    def values(self) -> dict[int, Any]:
        """The same in at least float32: what deviations are from."""
        return self._forward.values

    @property
    def loss(self) -> Array:
        """The function's value in the forward pass."""
        return self._forward.loss

    @property
    def largest_coefficient(self) -> Array:
        """The largest coefficient of a row of a loss in the function's result."""
        return self._forward.rows.largest

    @property
    def weights(self) -> list[Weight]:
        """The weight of each slot; of one that stands for copies, of each copy."""
        return self._weights.slots

    @property
    def gains(self) -> list[Any]:
        """For each slot the bound on its squared gain that the metric asked for."""
        return self._weights.gains

    @property
    def vectors(self) -> list[Any]:
        """For each slot where the power iterations of the next problem may begin, or None."""
        return self._weights.vectors

    def reference(self, node: int) -> Reference:
        """The forward pass at a node."""
        return self._weights.references[node]

    # What a solver calls: see `pjax.solvers.Sets`.

    def require(self, grouping: Grouping, reflecting: bool) -> None:
        """Checks that the problem was made for a kind of solver.

        **Raises:** `ValueError` if its groups are others, or if the solver reflects and the
        storage does not keep the copies.
        """
        given = self.layout.formulation
        if grouping != given.grouping:
            raise ValueError(
                f"The solver projects onto {grouping}, and the groups of this problem are "
                f'{given.grouping}: make it with `grouping="{grouping}"`.'
            )
        if reflecting and not given.reflecting:
            raise ValueError(
                "The solver combines states, and the states of this problem keep only the mean of "
                "copies: make it with `reflecting=True`."
            )

    @property
    def num_groups(self) -> int:
        """How many sets there are to project onto."""
        return len(self.layout.groups)

    def initial(self) -> State:
        """The forward pass itself: every deviation 0."""
        return state.zero(self.layout)

    def unmoved(self) -> State:
        """`initial` in a form that costs nothing in a first step; for solvers that only project."""
        return state.unmoved(self.layout)

    def project(self, group: int, state: State) -> State:
        """The nearest point to `state` that satisfies every node of a group."""
        return projection.project(self._consensus, self.layout.groups[group], state)

    def difference(self, a: State, b: State) -> State:
        """`a − b`, as a state."""
        return state.difference(self.layout, a, b)

    def squared_distance(self, a: State, b: State) -> Float[Array, ""]:
        """`Σ ρ |a − b|²` over all slots and copies."""
        return state.squared_distance(self._weights, a, b)

    def distance(self, a: State, b: State) -> Float[Array, ""]:
        """`(Σ ρ |a − b|²)^½`."""
        return jnp.sqrt(jnp.maximum(self.squared_distance(a, b), 0))

    def sweep(self, layer_forces: bool = False) -> State:
        """The forces after one cyclic sweep from the forward pass: see `projection.sweep`."""
        return projection.sweep(self._consensus, layer_forces)

    # What comes out.

    def parameter_deviations(self, state: State) -> list[Array | None]:
        """For each leaf the weighted mean of its readers; None where nothing reads it."""
        return moves.parameter_deviations(self._consensus, state)

    def parameter_forces(self, state: State) -> list[Array | None]:
        """For each leaf the sum of the forces of its readers; None where nothing reads it."""
        return moves.parameter_forces(self._consensus, state)

    def node_forces(self, nodes: Sequence[int], state: State) -> dict[int, Array]:
        """The sum of the forces of the readers of each node's output."""
        return moves.node_forces(self._consensus, nodes, state)

    def slot_force(self, slot: Slot, state: State) -> Array:
        """`ρ δ` of a slot."""
        return moves.slot_force(self._weights, slot, state)

    def pull(self, slot: Slot, node: int, entries: Array) -> Array:
        """For each entry of a node's output the sum of the `entries` of a slot that read it."""
        parts = self._forward.pull([(slot, entries.astype(slot.dtype))])
        return sum(part for producer, part in parts if producer == node)  # pyright: ignore

    def leaf_moves(self, moved: Mapping[int, Array]) -> list[Array | None]:
        """For each leaf how far it moves, from moves of nodes: see `moves.leaf_moves`."""
        return moves.leaf_moves(self._weights, moved)

    # To look at.

    def mean(self, point: State, slot: Slot) -> Array:
        """The deviation of a slot, in its unit; of a slot with copies, their mean."""
        return state.mean(self._weights, point, slot)

    def node_deviation(self, node: Node, point: State) -> Float[Array, ""]:
        """`(Σ ρ |δ|²)^½` over the slots of a node; stiff slots count the force on them."""
        return state.node_deviation(self._weights, node, point)

    def violations(self) -> dict[str, Float[Array, ""]]:
        """How far what the user constrains is from its sets in the forward pass: `|x − P(x)|` for
        each line that calls `pjax.constrain`.
        """
        squares = self._weights.squared_violations()
        return {line: jnp.sqrt(total) for line, total in squares.items()}

    def residuals(self, state: State | None = None) -> dict[str, Float[Array, ""]]:
        """The distance of a state to each node's constraint; of a loss, how far its prox would
        move it.

        **Arguments:**

        - `state`: a state of this problem; the forward pass if not given.

        **Returns:** one number per node, by `"<index> <name>"`.
        """
        point = self.initial() if state is None else state
        return {
            f"{node.index} {node.name}": jnp.sqrt(
                projection.squared_residual(self._consensus, node, point)
            )
            for node in self.graph.nodes
        }

    def sizes(self) -> Sizes:
        """Edge variables and bytes of the state, per node and in all."""
        return sizes(self.layout)


def first_vectors(layout: Layout, leaves: Sequence[Any], consts: Sequence[Any]) -> tuple[Any, ...]:
    """Where the power iterations of a solver's first batch begin: where those from fixed directions
    end.
    """

    def find(*arrays: Any) -> tuple[Any, ...]:
        return tuple(Problem(layout, *arrays).vectors)

    return shardings.automatic(jax.jit(find), leaves, consts, like=PartitionSpec())


def feasibility_problem(
    fn: Callable[..., Any],
    params: PyTree[Array],
    *args: Any,
    metric: Metric | None = None,
    fanout: Fanout = "exact",
    splitting: Splitting = "neuron",
    grouping: Grouping = "colours",
    reflecting: bool = False,
    fallback: Fallback | None = None,
) -> Problem:
    """Find edge values that satisfy every operation, every loss and every parameter of
    `fn(params, *args)`.

    **Arguments:**

    - `fn`: a JAX function that ends in a loss, or in means and weighted sums of losses.
    - `params`: the pytree of parameters; `args` are data, like anything that `fn` closes over.
    - `metric`: the weights of the distances. By default [`pjax.metrics.Uniform`][] for `"neuron"`
        splitting and [`pjax.metrics.Spectral`][] for `"layer"`.
    - `fanout`: `"exact"`: a node weighs its readers as the nearest point demands; `"paper"`: as
        if it had one reader, whatever their number.
    - `splitting`: `"neuron"`: one constraint per scalar product; `"layer"`: one per array
        operation, without copies.
    - `grouping`: `"colours"` (two groups, identities inserted) or `"levels"` (reverse topological).
    - `reflecting`: store copies in the form that reflecting algorithms need.
    - `fallback`: `"gauss-newton"` allows operations without a rule: each gets a numeric projection
        that linearises the operation itself. None: they are an error.

    **Returns:** a [`Problem`][].

    **Raises:** [`pjax.TraceError`][] if `fn` cannot become a graph, naming the operation and its
    source line.
    """
    require_function(fn, "fn")
    formulation = Formulation(metric, fanout, splitting, grouping, reflecting, fallback)
    return make_problem(lambda p: fn(p, *args), params, formulation)


def make_problem(fn: Callable[[Any], Any], params: Any, formulation: Formulation) -> Problem:
    """The problem of a function of the parameters alone."""
    program, leaves, consts, _ = trace(fn, params)
    return Problem(layout(program, formulation), leaves, consts)
