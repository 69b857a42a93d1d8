"""A graph with data and weights: the feasibility problem whose sets a solver projects onto.

`layout` finds everything that does not depend on data, once for each program; `Problem` has the
projections, distances and forces of one batch.
"""

from __future__ import annotations

from pjax.problem.entry import feasibility_problem as feasibility_problem
from pjax.problem.find_layout import layout as layout
from pjax.problem.find_layout import make_layout as make_layout
from pjax.problem.layouts import Layout as Layout
from pjax.problem.problem import Problem as Problem
from pjax.problem.problem import State as State
from pjax.problem.size_report import Sizes as Sizes
from pjax.problem.size_report import sizes as sizes
