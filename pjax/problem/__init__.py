"""A graph with data and weights: the feasibility problem whose sets a solver projects onto.

`layout` finds everything that does not depend on data, once for each program; `Problem` has the
projections, distances and forces of one batch.
"""

from __future__ import annotations

from pjax.problem.divided import Copies as Copies
from pjax.problem.divided import DividedProblem as DividedProblem
from pjax.problem.layouts import Formulation as Formulation
from pjax.problem.layouts import Layout as Layout
from pjax.problem.layouts import Sizes as Sizes
from pjax.problem.layouts import layout as layout
from pjax.problem.layouts import make_layout as make_layout
from pjax.problem.layouts import sizes as sizes
from pjax.problem.problem import Problem as Problem
from pjax.problem.problem import feasibility_problem as feasibility_problem
from pjax.problem.problem import first_vectors as first_vectors
from pjax.problem.problem import make_problem as make_problem
from pjax.problem.state import State as State
