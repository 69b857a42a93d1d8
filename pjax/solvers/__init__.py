"""Solvers: iterations over the projections of a feasibility problem, one file per algorithm.

A solver knows nothing of networks: it needs `Sets`, of which `pjax.Problem` is one.
"""

from __future__ import annotations

from pjax.solvers.alternating import AlternatingProjections as AlternatingProjections
from pjax.solvers.cyclic import CyclicProjections as CyclicProjections
from pjax.solvers.difference_map import DifferenceMap as DifferenceMap
from pjax.solvers.douglas_rachford import CyclicDouglasRachford as CyclicDouglasRachford
from pjax.solvers.douglas_rachford import DouglasRachford as DouglasRachford
from pjax.solvers.history import ResidualHistory as ResidualHistory
from pjax.solvers.history import Verdict as Verdict
from pjax.solvers.reflections import AlternatingReflections as AlternatingReflections
from pjax.solvers.sets import Step as Step
from pjax.solvers.solver import Solver as Solver
