"""pjax: neural-network training by projection, for JAX."""

from pjax import metrics as metrics
from pjax import nn as nn
from pjax import optim as optim
from pjax import solvers as solvers
from pjax.displacement import displacement as displacement
from pjax.displacement import value_and_displacement as value_and_displacement
from pjax.graph import Graph as Graph
from pjax.graph import UnusedParameterWarning as UnusedParameterWarning
from pjax.numpy import add as add
from pjax.numpy import array as array
from pjax.numpy import broadcast_to as broadcast_to
from pjax.numpy import concatenate as concatenate
from pjax.numpy import conv_patch as conv_patch
from pjax.numpy import dot as dot
from pjax.numpy import expand_dims as expand_dims
from pjax.numpy import index as index
from pjax.numpy import matmul as matmul
from pjax.numpy import max as max
from pjax.numpy import maximum as maximum
from pjax.numpy import moveaxis as moveaxis
from pjax.numpy import parameter as parameter
from pjax.numpy import relu as relu
from pjax.numpy import repeat as repeat
from pjax.numpy import reshape as reshape
from pjax.numpy import squeeze as squeeze
from pjax.numpy import stack as stack
from pjax.numpy import sum as sum
from pjax.numpy import sum_relu as sum_relu
from pjax.numpy import swapaxes as swapaxes
from pjax.numpy import transpose as transpose
from pjax.numpy import vmap as vmap
from pjax.numpy import zero_pad as zero_pad
from pjax.optim import NonFiniteError as NonFiniteError
from pjax.primitives import cross_entropy as cross_entropy
from pjax.primitives import identity as identity
from pjax.primitives import margin_loss as margin_loss
from pjax.primitives import quantize as quantize
from pjax.primitives import squared_error as squared_error
from pjax.primitives import step as step
from pjax.problem import Problem as Problem
from pjax.problem import feasibility_problem as feasibility_problem
from pjax.rules import register_projection as register_projection
from pjax.trace import TraceError as TraceError

__version__ = "0.1.0"
