"""From a trained network of signs or levels to one file of bits, and to where there is no JAX.

```python
report = pjax.export.pack(network, params, x[:100], "network.npz")
predictor = pjax.export.load("network.npz")
outputs = predictor(x)
```
"""

from __future__ import annotations

from pjax.export.packing import Packed as Packed
from pjax.export.packing import pack as pack
from pjax.export.predictor import Predictor as Predictor
from pjax.export.predictor import load as load
from pjax.export.walk import PackedProduct as PackedProduct
