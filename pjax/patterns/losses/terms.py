"""The terms of a loss: rows of a known loss, or numbers that are computed from rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from pjax.program import Equation


@dataclass(frozen=True, eq=False)
class Computed:
    """An operation on data that is a function of Python; it stands where a primitive does."""

    function: Callable[..., list[Any]]
    name: str
    multiple_results: bool = True

    def bind(self, *args: Any) -> list[Any]:
        return self.function(*args)


@dataclass(frozen=True, eq=False)
class RowLoss:
    """A loss `(x, *knowns) -> one number per row` without a name; it stands where a primitive does.

    **Attributes:**

    - `value`: the function; the last axis of `x` is the row.
    - `entries`: for a sum of functions of single entries: the loss of each.
    - `convex`: whether it was found to be convex at sample points.
    - `linear`: whether it is linear.
    """

    value: Callable[..., Array]
    entries: Callable[..., Array] | None
    convex: bool
    linear: bool
    name: str
    multiple_results: bool = False

    def bind(self, *args: Any) -> Array:
        return self.value(*args)


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One loss of the function's result, `Σ coefficient · rows`; or a constraint, which has no part
    in it.

    **Attributes:**

    - `equation`: `rows = loss(prediction, *knowns)`; the last axis of a prediction is a row.
    - `coefficient`: how much each row counts: a known number (or an array), or the variable that
        holds it; None for a constraint.
    """

    equation: Equation
    coefficient: Any

    def counts(self, values: Mapping[int, Any]) -> Any:
        """How much each row counts, from the values of the program."""
        return values[self.coefficient] if type(self.coefficient) is int else self.coefficient
