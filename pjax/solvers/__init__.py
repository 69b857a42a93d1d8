"""Solvers: iterations over the projections of a feasibility problem; those that project in turn,
and those that reflect.

A solver knows nothing of networks: it needs `Sets`, of which `pjax.Problem` is one.
"""

from __future__ import annotations

from pjax.solvers.history import ResidualHistory as ResidualHistory
from pjax.solvers.history import Verdict as Verdict
from pjax.solvers.projecting import AlternatingProjections as AlternatingProjections
from pjax.solvers.projecting import CyclicProjections as CyclicProjections
from pjax.solvers.reflecting import AlternatingReflections as AlternatingReflections
from pjax.solvers.reflecting import CyclicDouglasRachford as CyclicDouglasRachford
from pjax.solvers.reflecting import DifferenceMap as DifferenceMap
from pjax.solvers.reflecting import DouglasRachford as DouglasRachford
from pjax.solvers.reflecting import reflect as reflect
from pjax.solvers.solver import Solver as Solver
from pjax.solvers.solver import Step as Step
from pjax.solvers.solver import affine as affine
