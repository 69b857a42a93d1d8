"""Warnings and errors about a graph: parameters without effect, operations without a rule."""

from __future__ import annotations

import sys
import warnings

from pjax.backend import source_lines
from pjax.graph.graph import Graph
from pjax.graph.stopped import DECIDES, decides
from pjax.program import CustomRule, Leaf


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
