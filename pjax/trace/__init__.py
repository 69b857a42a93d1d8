"""From a JAX function to a `Program`: `trace(fn, params)`.

Calls are inlined and loops unrolled (`flatten`, `control_flow`), then operations without a rule are
written in those that have one: windows, scatters, complex numbers, custom derivatives, regrouped
products. Each of these files has an `expand`, which writes with a `Writer`.
"""

from __future__ import annotations

from pjax.trace.entry import require_function as require_function
from pjax.trace.entry import trace as trace
