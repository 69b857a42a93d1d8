"""What lies on every way from one variable to others."""

from __future__ import annotations

from collections.abc import Sequence


def common_chain(chains: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What is in all of several chains, in the order of the first; `()` of none."""
    common = chains[0] if chains else ()
    for chain in chains[1:]:
        there = set(chain)
        common = tuple(v for v in common if v in there)
    return common
