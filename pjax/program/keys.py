"""Programs as dictionary keys: equal for equal equations, whatever the data are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from pjax.backend import compat
from pjax.program.program import Scalar

#: How often users registered a rule for a primitive: with another rule it is another program.
REGISTRATIONS: Counter[Any] = Counter()


class _Identity:
    """Wraps an unhashable value: equal to itself only (better a recompile than a wrong reuse)."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value


def canonical(value: Any) -> Any:
    """A hashable stand-in, equal for equal meaning only: −0 is not 0, True is not 1."""
    if isinstance(value, Scalar):
        return ("literal", value.dtype, value.array().tobytes())
    if isinstance(value, compat.ClosedJaxpr):
        return ("closed", _canonical_jaxpr(value.jaxpr), tuple(map(canonical, value.consts)))
    if isinstance(value, compat.Jaxpr):
        return _canonical_jaxpr(value)
    if isinstance(value, Mapping):
        return tuple((name, canonical(value[name])) for name in sorted(value))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(canonical, value))
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return (type(value).__name__, np.asarray(value).tobytes())
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return value


def _canonical_jaxpr(jaxpr: Any) -> Any:
    """A body of control flow, its variables numbered by appearance (jaxprs hash by identity)."""
    numbers: dict[Any, int] = {}

    def define(var: Any) -> Any:
        numbers[var] = len(numbers)
        return str(var.aval), getattr(var.aval, "weak_type", False)

    def refer(var: Any) -> Any:
        if isinstance(var, compat.Literal):
            return ("literal", var.aval.dtype, np.asarray(var.val).tobytes())
        return numbers[var]

    return (
        "jaxpr",
        tuple(map(define, (*jaxpr.constvars, *jaxpr.invars))),
        tuple(
            (
                eqn.primitive,
                tuple(map(refer, eqn.invars)),
                tuple(map(define, eqn.outvars)),
                canonical(eqn.params),
            )
            for eqn in jaxpr.eqns
        ),
        tuple(map(refer, jaxpr.outvars)),
    )
