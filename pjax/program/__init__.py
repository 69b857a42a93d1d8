"""A function as a list of equations, and the words in which the rest of the library reads it.

`Program` holds equations over numbered variables; `canonical` makes keys of them. `primitives` are
the operations of our own, `vocabulary` the kinds of JAX's, `wiring` what only copies entries.
"""

from __future__ import annotations

from pjax.program.axes import carried_axes as carried_axes
from pjax.program.axes import independent_axes as independent_axes
from pjax.program.dominators import Dominators as Dominators
from pjax.program.keys import REGISTRATIONS as REGISTRATIONS
from pjax.program.keys import canonical as canonical
from pjax.program.parameters import Leaves as Leaves
from pjax.program.parameters import leaves_of as leaves_of
from pjax.program.primitives import cross_entropy as cross_entropy
from pjax.program.primitives import identity as identity
from pjax.program.primitives import margin_loss as margin_loss
from pjax.program.primitives import quantize as quantize
from pjax.program.primitives import squared_error as squared_error
from pjax.program.primitives import step as step
from pjax.program.primitives import threshold as threshold
from pjax.program.program import Atom as Atom
from pjax.program.program import CustomRule as CustomRule
from pjax.program.program import Equation as Equation
from pjax.program.program import Leaf as Leaf
from pjax.program.program import Program as Program
from pjax.program.program import Scalar as Scalar
from pjax.program.program import TraceError as TraceError
from pjax.program.program import live as live
from pjax.program.program import read as read
from pjax.program.program import run as run
from pjax.program.program import widened as widened
from pjax.program.vocabulary import ADDITIONS as ADDITIONS
from pjax.program.vocabulary import BINARY as BINARY
from pjax.program.vocabulary import COMPARISONS as COMPARISONS
from pjax.program.vocabulary import ELEMENTWISE as ELEMENTWISE
from pjax.program.vocabulary import FUNCTIONS as FUNCTIONS
from pjax.program.vocabulary import IN_LOSSES as IN_LOSSES
from pjax.program.vocabulary import INTEGER_ARITHMETIC as INTEGER_ARITHMETIC
from pjax.program.vocabulary import LOSSES as LOSSES
from pjax.program.vocabulary import MATRICES as MATRICES
from pjax.program.vocabulary import ORDERED_SHAPES as ORDERED_SHAPES
from pjax.program.vocabulary import REDUCTIONS as REDUCTIONS
from pjax.program.vocabulary import ROUNDED as ROUNDED
from pjax.program.vocabulary import SHAPES as SHAPES
from pjax.program.vocabulary import SMOOTH as SMOOTH
from pjax.program.vocabulary import STOP_GRADIENT as STOP_GRADIENT
from pjax.program.vocabulary import STOPPED as STOPPED
from pjax.program.vocabulary import UNIFORM_ELEMENTWISE as UNIFORM_ELEMENTWISE
from pjax.program.vocabulary import UNIFORM_WIRING as UNIFORM_WIRING
from pjax.program.vocabulary import OfParts as OfParts
from pjax.program.vocabulary import Packed as Packed
from pjax.program.vocabulary import is_complex as is_complex
from pjax.program.vocabulary import is_function as is_function
from pjax.program.vocabulary import is_noisy as is_noisy
from pjax.program.vocabulary import operation_axes as operation_axes
from pjax.program.vocabulary import real_type as real_type
from pjax.program.wiring import Route as Route
from pjax.program.wiring import bind_scatter as bind_scatter
from pjax.program.wiring import broadcast_step as broadcast_step
from pjax.program.wiring import data_operands as data_operands
from pjax.program.wiring import find_route as find_route
from pjax.program.wiring import is_overwriting as is_overwriting
from pjax.program.wiring import is_wiring as is_wiring
from pjax.program.wiring import pull_together as pull_together
from pjax.program.wiring import scatter_add as scatter_add
