"""Sets in which parameters, or values inside of a network, are to lie.

```python
optimizer = pjax.optim.Projection(sets={"w": pjax.sets.Nonnegative(), "b": None})
predictions = pjax.constrain(network(params, x), pjax.sets.Simplex())
```

Each set is a frozen dataclass and a pytree: its numbers are leaves, so that they may change from
batch to batch without compiling again. `axis` says along which axes of an array a set is meant: a
ball along axis 0 of a matrix is one ball for each column; `None` is the whole array. Sets of
matrices are meant for the last two axes.
"""

from __future__ import annotations

from pjax.sets.along import LinearEqualities as LinearEqualities
from pjax.sets.along import Monotone as Monotone
from pjax.sets.along import Simplex as Simplex
from pjax.sets.along import Sparse as Sparse
from pjax.sets.base import Set as Set
from pjax.sets.entries import Box as Box
from pjax.sets.entries import Levels as Levels
from pjax.sets.entries import Nonnegative as Nonnegative
from pjax.sets.entries import Signs as Signs
from pjax.sets.inside import constrain as constrain
from pjax.sets.norms import Ball as Ball
from pjax.sets.norms import Sphere as Sphere
from pjax.sets.of_matrices import LowRank as LowRank
from pjax.sets.of_matrices import Orthogonal as Orthogonal
from pjax.sets.trees import for_leaves as for_leaves
from pjax.sets.trees import into as into
from pjax.sets.trees import keep as keep
from pjax.sets.trees import project as project
