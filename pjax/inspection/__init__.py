"""What a user looks at before and beside training: `pjax.explain` and `pjax.profile`."""

from __future__ import annotations

from pjax.inspection.explanation import Explanation as Explanation
from pjax.inspection.explanation import explain as explain
from pjax.inspection.explanation import label as label
from pjax.inspection.profiles import Profile as Profile
from pjax.inspection.profiles import profile as profile
