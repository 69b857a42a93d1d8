"""From forces to moves of parameters.

`projection` is `pjax.optim.Projection`: one solve for each parameter, with a memory; `pipeline` has
one for each stage of a network, on batches that do not wait for each other.
`displacements` stand where gradients do; `optimizer` takes steps of a solver on each batch.
"""

from __future__ import annotations

from pjax.training.checks import NonFiniteError as NonFiniteError
from pjax.training.displacements import ValueAndDisplacement as ValueAndDisplacement
from pjax.training.displacements import displacement as displacement
from pjax.training.displacements import value_and_displacement as value_and_displacement
from pjax.training.optimizer import Optimizer as Optimizer
from pjax.training.pipeline import PipelinedProjection as PipelinedProjection
from pjax.training.pipeline import PipelineInfo as PipelineInfo
from pjax.training.pipeline import PipelineState as PipelineState
from pjax.training.projection import Info as Info
from pjax.training.projection import Projection as Projection
from pjax.training.projection import ProjectionState as ProjectionState
from pjax.training.projection import StateSize as StateSize
from pjax.training.readers import find_units as find_units
from pjax.training.search import SearchProgress as SearchProgress
from pjax.training.search import Solutions as Solutions
from pjax.training.search import solve as solve
from pjax.training.staged import StagedProjections as StagedProjections
