"""Programs of equal parts are compiled as loops: `rolled(fn)` computes what `fn` does.

Repetitions are found by the fingerprints of equations (`repeats`, `fingerprints`), and run as loops
over stacked operands (`loops`).
"""

from __future__ import annotations

from pjax.compile.once import traced_once as traced_once
from pjax.compile.rolling import rolled as rolled
from pjax.compile.rolling import rolled_scan as rolled_scan
