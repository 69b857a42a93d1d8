"""Which operation is projected how.

A `Rule` is the constraint of one node: its projection, its force, its output. The registry finds
the rule of an equation; `register_projection` adds a user's.
"""

from __future__ import annotations

from pjax.rules.affine import Affine as Affine
from pjax.rules.affine import Term as Term
from pjax.rules.base import PARAMETER as PARAMETER
from pjax.rules.base import Force as Force
from pjax.rules.base import Geometry as Geometry
from pjax.rules.base import NodeSpec as NodeSpec
from pjax.rules.base import Reference as Reference
from pjax.rules.base import Rule as Rule
from pjax.rules.layer_sum import LayerSum as LayerSum
from pjax.rules.layer_terms import Addend as Addend
from pjax.rules.layer_terms import Product as Product
from pjax.rules.losses import LinearLoss as LinearLoss
from pjax.rules.losses import Loss as Loss
from pjax.rules.losses import NumericLoss as NumericLoss
from pjax.rules.margins import SignedProduct as SignedProduct
from pjax.rules.membership import STIFF as STIFF
from pjax.rules.membership import Membership as Membership
from pjax.rules.piecewise_constant import Threshold as Threshold
from pjax.rules.piecewise_constant import as_threshold as as_threshold
from pjax.rules.products import BILINEAR as BILINEAR
from pjax.rules.products import bilinear_name as bilinear_name
from pjax.rules.products import bilinear_operands as bilinear_operands
from pjax.rules.registry import IDENTITY as IDENTITY
from pjax.rules.registry import find_builder as find_builder
from pjax.rules.registry import register_projection as register_projection
from pjax.rules.smooth import ArrayFunction as ArrayFunction
from pjax.rules.smooth import ArrayStep as ArrayStep
from pjax.rules.smooth import Normalization as Normalization
from pjax.rules.smooth import NormalizationStep as NormalizationStep
from pjax.rules.smooth import ScalarFunction as ScalarFunction
from pjax.rules.smooth import ScalarStep as ScalarStep
from pjax.rules.storages import Compact as Compact
from pjax.rules.storages import Dense as Dense
from pjax.rules.storages import Joined as Joined
from pjax.rules.storages import Lifted as Lifted
from pjax.rules.storages import Storage as Storage
