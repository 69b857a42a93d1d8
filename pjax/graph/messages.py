"""What there is to say of a graph: parameters without effect, operations without a rule."""

from __future__ import annotations

import sys
import warnings

import jax.numpy as jnp

from pjax.backend import compat, shardings, source_lines
from pjax.graph.graph import Graph
from pjax.program import ROUNDED, STOP_GRADIENT, CustomRule, Equation, Leaf, Program


class CustomRuleWarning(UserWarning):
    """Forces follow a derivative rule of the user's that is not the derivative of its function."""


class UnusedParameterWarning(UserWarning):
    """A parameter that the loss does not depend on; it stays as it is."""


def warn(graph: Graph) -> None:
    """Warns of what may not be meant: each parameter that the function does not read at all (one at
    rest is), and each derivative rule of the user's that forces follow.
    """
    level = _levels_to_caller()
    for leaf, chooses in unused(graph):
        reason = DECIDES if chooses else "is not used by the loss; it stays as it is"
        message = f"`params{leaf.path}` {leaf.shape} {reason}."
        warnings.warn(message, UnusedParameterWarning, stacklevel=level)
    for rule in graph.program.custom_rules:
        warnings.warn(honoured(rule), CustomRuleWarning, stacklevel=level)


def honoured(rule: CustomRule) -> str:
    """What there is to say of a derivative rule that forces follow."""
    return (
        f"The derivative rule of `{rule.name}` ({rule.source}) is not the derivative of its "
        "function: forces follow the rule, as gradients do. "
        f"`inspect.unwrap({rule.name})` is the function without its rule."
    )


def unused(graph: Graph) -> list[tuple[Leaf, bool]]:
    """The parameters that could move and that nothing reads of which they would be moved, and
    whether something is decided by them.
    """
    program = graph.program
    used = {atom for equation in program.equations for atom in equation.inputs}
    nodes = {node.output for node in graph.parameters}
    leaves = [
        (number, leaf)
        for number, leaf in enumerate(program.leaves)
        if leaf.trainable and number not in nodes
    ]
    return [
        (leaf, number in used)
        for number, leaf in leaves
        if number not in used or decides(program, number)
    ]


def _levels_to_caller() -> int:
    """The `stacklevel` with which the caller of this function names the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and source_lines.is_library_file(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    return level


#: What to do about loops whose length is not known.
LOOPS = {
    "scan": "unroll the loop in Python",
    "while": "give the loop a fixed number of steps (`jax.lax.fori_loop` with Python numbers, "
    "`jax.lax.scan`), the largest that may be needed, and keep what is done by "
    "`jnp.where(is_running, new, old)`",
}

_SUM = (
    "A sum over devices inside of the network is not supported: leave it to `jax.jit`, with the "
    "batch (or the weights) sharded over the mesh, and take the plain sum or mean. Around the loss "
    "`jax.lax.pmean` and `psum` may stand."
)
#: What to do about exchanges between devices.
DEVICES = {
    **dict.fromkeys(compat.SUMS_OVER_DEVICES, _SUM),
    "pvary": shardings.TYPED,
    "all_gather": _SUM,
    "pmax": _SUM,
    "ppermute": _SUM,
    "shard_map": "Call pjax inside of `jax.shard_map`, on the function of one device, and not "
    "`shard_map` inside of the loss; or leave the exchange to `jax.jit`, with shardings of the "
    "arguments.",
}


def no_rule(equation: Equation, has_fallback: bool) -> str:
    name = equation.name
    where = f" at {equation.source}" if equation.source else ""
    message = f"There is no projection for the operation `{name}`{where}."
    if name in LOOPS:
        return (
            f"{message} Control flow over parameters whose course depends on data is not "
            f"supported: {LOOPS[name]}; or make the function around it an operation of its own, "
            "with a projection: `pjax.register_projection`."
        )
    if name in DEVICES:
        return f"{message} {DEVICES[name]}"
    if len(equation.outputs) != 1:
        return (
            f"{message} It has several outputs, and a node has one: make a function of it that "
            "returns one array an operation of its own, `@pjax.register_projection(function)`."
        )
    path = compat.primitive_path(name.replace("-", "_")) or "the_primitive"
    message = (
        f"{message} Register one:\n"
        f"    @pjax.register_projection({path})\n"
        "    def project(inputs, target, input_weights, target_weight, **params): ...\n"
        "It returns the inputs nearest to `inputs` whose output is nearest to `target`; see "
        "`help(pjax.register_projection)`."
    )
    if not has_fallback:
        message += (
            '\nOr allow a numeric one, of the linearised operation: `fallback="gauss-newton"`, of '
            "`pjax.value_and_displacement`, `pjax.optim.Projection` and all that train."
        )
    return message


#: What there is to say of a parameter that only decides.
DECIDES = (
    "is read by conditions, indices and roundings alone, which do not move: it stays as it is, and "
    "its gradient is 0, too. `pjax.step` in the place of a comparison would move it"
)


def decides(program: Program, leaf: int) -> bool:
    """Whether what is computed of a parameter becomes a condition, an index or a rounded number,
    and no `stop_gradient` says so.
    """
    seen = {leaf}
    for equation in program.equations:
        if seen.isdisjoint(equation.inputs) or equation.primitive in STOP_GRADIENT:
            continue
        seen.update(equation.outputs)
        numbers = (jnp.issubdtype(program.dtype(out), jnp.floating) for out in equation.outputs)
        if not all(numbers) or equation.primitive in ROUNDED:
            return True
    return False
