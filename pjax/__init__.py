"""Neural networks trained by projecting onto constraints, for JAX.

Training without a learning rate, of any JAX function that returns a loss:

    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, params, x, y)
    for x, y in batches:
        params, state, info = optimizer.update(loss_fn, params, state, x, y)

Where to look:

- `pjax.optim.Projection`: the recommended way, with nothing to tune.
- `pjax.value_and_displacement(loss_fn)`: stands where `jax.value_and_grad(loss_fn)` does, for an
  optimiser of Optax.
- `pjax.optim.DouglasRachford`, `AlternatingProjections`, `CyclicProjections`, …: the paper's
  solvers, which take many steps on each batch.
- `pjax.cross_entropy`, `squared_error`, `margin_loss`: losses; those of Optax do as well.
- `pjax.step`, `pjax.quantize` (and `jnp.sign`): functions without a gradient that train.
- `pjax.sets`: in which parameters are to lie, exactly; `pjax.constrain`: values of a network.
- `pjax.export.pack`: a trained network of signs or levels as one file of bits.
- `pjax.register_projection`: an operation of your own.
- `pjax.feasibility_problem(fn, params)`, `pjax.profile`: the constraints, to look at.
- `pjax.nn`, `pjax.numpy`: the interface of the paper's library.
- `pjax.lab` (extra `lab`): data sets, training runs, comparisons; on the command line `pjax`.
"""

from types import ModuleType as _Module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from pjax import export as export
from pjax import metrics as metrics
from pjax import nn as nn
from pjax import optim as optim
from pjax import sets as sets
from pjax import solvers as solvers
from pjax.backend import moved as _moved
from pjax.graph import CustomRuleWarning as CustomRuleWarning
from pjax.graph import Graph as Graph
from pjax.graph import UnusedParameterWarning as UnusedParameterWarning
from pjax.inspection import Explanation as Explanation
from pjax.inspection import Profile as Profile
from pjax.inspection import explain as explain
from pjax.inspection import profile as profile
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
from pjax.problem import Problem as Problem
from pjax.problem import feasibility_problem as feasibility_problem
from pjax.program import TraceError as TraceError
from pjax.program import cross_entropy as cross_entropy
from pjax.program import identity as identity
from pjax.program import margin_loss as margin_loss
from pjax.program import quantize as quantize
from pjax.program import squared_error as squared_error
from pjax.program import step as step
from pjax.program import threshold as threshold
from pjax.rules import register_projection as register_projection
from pjax.sets import constrain as constrain
from pjax.training import SearchProgress as SearchProgress
from pjax.training import Solutions as Solutions
from pjax.training import displacement as displacement
from pjax.training import solve as solve
from pjax.training import value_and_displacement as value_and_displacement

__version__ = "0.2.0"

#: Modules that users use; the others are found by their names.
_MODULES = ("export", "lab", "metrics", "nn", "numpy", "optim", "sets", "solvers")
_moved.install()


def __dir__() -> list[str]:
    return [
        name
        for name, value in globals().items()
        if (not isinstance(value, _Module) or name in _MODULES)
        and (not name.startswith("_") or name.startswith("__"))
    ]


if not _TYPE_CHECKING:  # type checkers would take every name

    def __getattr__(name: str) -> _Module:
        return _moved.attribute(name)
