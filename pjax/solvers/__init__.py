"""Solvers: iterations over the projections of a feasibility problem, one file per algorithm."""

from __future__ import annotations

from pjax.solvers.alternating import AlternatingProjections as AlternatingProjections
from pjax.solvers.base import ResidualHistory as ResidualHistory
from pjax.solvers.base import Solver as Solver
from pjax.solvers.base import Step as Step
from pjax.solvers.base import Verdict as Verdict
from pjax.solvers.cyclic import CyclicProjections as CyclicProjections
from pjax.solvers.difference_map import DifferenceMap as DifferenceMap
from pjax.solvers.douglas_rachford import CyclicDouglasRachford as CyclicDouglasRachford
from pjax.solvers.douglas_rachford import DouglasRachford as DouglasRachford
from pjax.solvers.reflections import AlternatingReflections as AlternatingReflections
