"""Through which variables everything passes that others are computed from.

tree = Dominators()
tree.add(0)             # a parameter
tree.add(1, [0])        # tanh(p)
tree.add(2, [0])        # p²
tree.add(3, [1, 2])     # tanh(p) · p²
tree.chain(3)           # (3, 0): all that 3 is made of passes through 0
"""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Dominators:
    """Above each variable the nearest one through which all that it is computed of passes.

    **Arguments:**

    - `stop`: variables beyond which nothing is seen from below.
    """

    def __init__(self, stop: Collection[int] = ()):
        self._stop = stop
        self._above: dict[int, int | None] = {}
        self._depth: dict[int, int] = {}

    def __contains__(self, var: int) -> bool:
        return var in self._above

    def add(self, var: int, operands: Iterable[int] = ()) -> None:
        """`var` is computed of `operands`, which are known; without them it is a beginning."""
        above = self.common(operands)
        self._above[var] = above
        self._depth[var] = 0 if above is None or var in self._stop else self._rank(above) + 1

    def above(self, var: int) -> int | None:
        """The nearest variable through which all passes that `var` is computed of."""
        return self._above.get(var)

    def common(self, variables: Iterable[int]) -> int | None:
        """The nearest variable, maybe one of these, through which all of them pass; None if there
        is none.
        """
        nearest: int | None = None
        for number, there in enumerate(variables):
            nearest = there if number == 0 else self._meet(nearest, there)
        return nearest

    def chain(self, var: int | None) -> tuple[int, ...]:
        """`var`, then all variables through which everything passes, the nearest first."""
        if var is None:
            return ()
        chain, here = [var], self.above(var)
        while here is not None:
            chain.append(here)
            here = self._seen_above(here)
        return tuple(chain)

    def _rank(self, var: int) -> int:
        return self._depth.get(var, 0)

    def _seen_above(self, var: int) -> int | None:
        return None if var in self._stop else self._above.get(var)

    def _meet(self, a: int | None, b: int | None) -> int | None:
        while a is not None and b is not None and a != b:
            if self._rank(a) >= self._rank(b):
                a = self._seen_above(a)
            else:
                b = self._seen_above(b)
        return None if a is None or b is None else a
