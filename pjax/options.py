"""The words that a user chooses from: how products are split, copies joined, nodes grouped."""

from __future__ import annotations

from typing import Literal

Exactness = Literal["exact", "inexact", "relaxed"]
#: How finely a bilinear operation is cut: a constraint for each scalar product, or for the array.
Splitting = Literal["neuron", "layer"]
#: What an operation without a rule gets.
Fallback = Literal["gauss-newton"]
RowWeights = Literal["relative", "absolute"]
Fanout = Literal["exact", "paper"]
Grouping = Literal["colours", "levels"]
