"""The metric of a splitting, where the user gives none."""

from __future__ import annotations

from pjax.metrics.base import Metric
from pjax.metrics.spectral import Spectral
from pjax.metrics.uniform import Uniform
from pjax.options import Splitting


def default_metric(splitting: Splitting) -> Metric:
    """The metric of a problem for which none is given."""
    return Spectral() if splitting == "layer" else Uniform()
