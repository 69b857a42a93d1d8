"""What a program means: parts of it that are one constraint.

Piecewise linear functions of one value (`piecewise`), smooth functions of one array (`smooth`),
norms over axes (`normalizations`), sums of multiples (`sums`), and the terms of a loss (`losses`).
"""

from __future__ import annotations

from pjax.patterns.excerpts import Excerpt as Excerpt
from pjax.patterns.excerpts import Function as Function
from pjax.patterns.excerpts import single as single
from pjax.patterns.losses.find import find_losses as find_losses
from pjax.patterns.losses.terms import Computed as Computed
from pjax.patterns.losses.terms import LossTerm as LossTerm
from pjax.patterns.losses.terms import RowLoss as RowLoss
from pjax.patterns.normalizations import normal_form as normal_form
from pjax.patterns.piecewise import OfOneValue as OfOneValue
from pjax.patterns.smooth import SmoothFunctions as SmoothFunctions
from pjax.patterns.sums import SumTerm as SumTerm
