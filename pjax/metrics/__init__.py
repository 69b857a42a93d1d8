"""How deviations are weighed against each other: the metrics in which projections are nearest.

    optimizer = pjax.optim.DouglasRachford(steps=20, metric=pjax.metrics.Uniform())

A metric takes a graph and what its nodes measure of a forward pass, and returns a weight for each
slot and parameter.
"""

from __future__ import annotations

from pjax.metrics.base import INFINITE as INFINITE
from pjax.metrics.base import Measures as Measures
from pjax.metrics.base import Metric as Metric
from pjax.metrics.base import Weighing as Weighing
from pjax.metrics.base import Weight as Weight
from pjax.metrics.spectral import Spectral as Spectral
from pjax.metrics.uniform import Uniform as Uniform
