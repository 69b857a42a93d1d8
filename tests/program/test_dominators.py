"""Dominators: through which variables everything passes, against all ways."""

from __future__ import annotations

import numpy as np
import pytest

from pjax.program import Dominators


def ways(operands, var, stop):
    """All ways from `var` back to a beginning; nothing is seen beyond what stops, from below."""
    if not operands[var]:
        return [[var]]
    found = []
    for operand in operands[var]:
        behind = [[operand]] if operand in stop else ways(operands, operand, stop)
        found += [[var, *way] for way in behind]
    return found


def expected_chain(operands, var, stop):
    first, *others = ways(operands, var, stop)
    return tuple(v for v in first if all(v in way for way in others))


@pytest.mark.parametrize("seed", range(40))
def test_chains_are_what_lies_on_every_way(seed):
    rng = np.random.default_rng(seed)
    operands = [
        sorted({int(rng.integers(var)) for _ in range(rng.integers(0, 3))}) if var else []
        for var in range(12)
    ]
    stop = {int(v) for v in rng.integers(0, 12, size=seed % 3)}
    tree = Dominators(stop)
    for var, given in enumerate(operands):
        tree.add(var, given)
    for var in range(12):
        assert tree.chain(var) == expected_chain(operands, var, stop)
        assert tree.above(var) == (*tree.chain(var)[1:2], None)[0]
        assert var in tree


def test_what_several_variables_have_in_common():
    tree = Dominators()
    for var, given in enumerate([[], [0], [1], [1], [], [2, 3]]):
        tree.add(var, given)
    assert tree.common([2, 3]) == 1
    assert tree.common([5, 2]) == 1
    assert tree.common([2]) == 2
    assert tree.common([2, 4]) is None
    assert tree.common([]) is None
    assert tree.chain(tree.common([2, 4])) == ()
