"""What a user looks at before and beside training: `pjax.explain`, `pjax.profile`, costs."""

from __future__ import annotations

from pjax.inspection.explanation import Explanation as Explanation
from pjax.inspection.explanation import explain as explain
from pjax.inspection.explanation import label as label
from pjax.inspection.profiles import Profile as Profile
from pjax.inspection.profiles import profile as profile
from pjax.inspection.scaling import Machine as Machine
from pjax.inspection.scaling import Network as Network
from pjax.inspection.scaling import ScalingCost as ScalingCost
from pjax.inspection.scaling import scaling_cost as scaling_cost
