"""Writes the file of a packed network, and compares it with the function that it is of."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from pjax.export import operations, predictor
from pjax.export.walk import PackedProduct, Walk
from pjax.trace import require_function, trace


@dataclass(frozen=True)
class Packed:
    """What `pack` has written.

    **Attributes:**

    - `path`: of the file.
    - `bytes`: its size.
    - `float_bytes`: of the parameters in float32.
    - `products`: of the network, in order.
    - `rows`: how many were given.
    - `difference`: the largest difference between outputs of the file and of the function on them.
    """

    path: Path
    bytes: int
    float_bytes: int
    products: tuple[PackedProduct, ...]
    rows: int
    difference: float

    def __str__(self) -> str:
        factor = self.float_bytes / self.bytes
        return "\n".join([
            f"{self.path}: {self.bytes:,} bytes, {self.float_bytes:,} in float32 (1/{factor:.1f})",
            *(f"  {product}" for product in self.products),
            f"  largest difference on {self.rows} rows: {self.difference:g}",
        ])  # fmt: skip


class DifferenceWarning(UserWarning):
    """A packed network gives other outputs than the function, by more than rounding."""


#: Of outputs, relative to the largest: more is not the rounding of one sum.
_ROUNDING = 1e-4


def pack(
    fn: Callable[[Any, Array], Any],
    params: PyTree[Array],
    x: ArrayLike,
    path: str | os.PathLike[str],
) -> Packed:
    """Writes `x ↦ fn(params, x)` into one file of packed bits, for [`load`][pjax.export.load].

    Weights of at most 16 evenly spaced levels, such as signs, are kept as bits. Where the inputs of
    a product have few levels too, it is computed by exclusive or and counts of ones, as a whole
    number; a bias, a scale and a sign behind it become whole thresholds.

    What the file computes is equal to the function bit for bit wherever each sum is exact in
    float32: of signs always; of other numbers if they are whole multiples of a power of two, such
    as pixels from 0 to 255, or four levels from −1.5 to 1.5. Other sums are rounded in another
    order.

    **Arguments:**

    - `fn`: the function of parameters and rows, without its loss. Computed from `x` may be products
        (`@`, `jnp.dot`, `einsum` of one matrix) and convolutions with weights that do not depend on
        `x`; `+ − * /`, `maximum`, `minimum`, relu, clip, `round`; `jnp.sign`, `pjax.threshold`,
        `pjax.step`, `pjax.quantize`, `jnp.where(x > 0, 1, -1)` and their kin; pooling, sums, maxima
        and minima over axes, `argmax`; reshapes, slices, padding, concatenation. Parameters may go
        through anything.
    - `params`: its parameters, in float32.
    - `x`: some rows, `[rows, …]`: for shapes, and to compare the file with the function.
    - `path`: of the file; it is replaced.

    **Returns:** [`Packed`][pjax.export.Packed]: sizes, products, and the largest difference on the
    rows.

    **Raises:** [`pjax.TraceError`][] for any other operation, with its line, and for one that mixes
    rows.

    `TypeError` for rows that are not one array, `FileNotFoundError` without the folder of the path.

    **Warns:** `DifferenceWarning` where outputs on the rows differ by more than rounding, or are
    not finite.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> import pjax
    >>> def network(params, x):
    ...     return jnp.sign(x @ jnp.sign(params["w1"]) + params["b1"]) @ jnp.sign(params["w2"])
    >>> w = jax.random.normal(jax.random.key(0), (64, 16))
    >>> params = {"w1": w, "b1": jnp.full(16, 0.5), "w2": w[:16, :4]}
    >>> x = jnp.round(10 * w.T)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = pjax.export.pack(network, params, x, folder + "/network.npz")
    ...     outputs = pjax.export.load(report.path)(x)
    >>> report.difference
    0.0
    >>> bool((outputs == network(params, x)).all())
    True
    """
    require_function(fn, "fn")
    if isinstance(x, (tuple, dict)):
        raise TypeError(
            f"`x` must be one array of rows, got a {type(x).__name__}: labels and losses are no "
            "part of a packed network."
        )
    x = jnp.asarray(x)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into.")
    if x.ndim == 0 or 0 in x.shape:
        raise ValueError(f"`x` must have rows, got an array of shape {x.shape}.")

    def of_rows(rows: Array) -> Any:
        return fn(params, rows)

    program, leaves, consts, _ = trace(of_rows, x, rests=True)
    walk = Walk(program, leaves[0], consts, operations.HANDLERS)
    text = json.dumps({"format": predictor.FORMAT, **walk.described()}, separators=(",", ":"))
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            arrays: Any = {"program": np.frombuffer(text.encode(), np.uint8), **walk.arrays}
            np.savez_compressed(file, **arrays)
        found = predictor.load(unfinished)(np.asarray(x))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    expected = jax.tree.leaves(jax.jit(of_rows)(x))
    pairs = list(zip(found if isinstance(found, tuple) else (found,), expected, strict=True))
    differences = [_difference(a, np.asarray(b)) for a, b in pairs]
    sizes = [np.size(a) for a in jax.tree.leaves(params) if jnp.issubdtype(a.dtype, jnp.floating)]
    report = Packed(
        path,
        path.stat().st_size,
        4 * sum(sizes),
        tuple(walk.products),
        len(x),
        float(np.max(differences)),
    )
    if np.isnan(report.difference):
        warnings.warn(
            f"Outputs of {path} or of the function are not finite on the rows that were given, and "
            "are not compared: look at the parameters.",
            DifferenceWarning,
            stacklevel=2,
        )
    elif any(d > _ROUNDING * np.abs(np.asarray(b)).max() for d, (_, b) in zip(
        differences, pairs, strict=True)):  # fmt: skip
        warnings.warn(
            f"Outputs of {path} differ by up to {report.difference:g} from those of the function: "
            "sums of numbers are rounded in another order, and some were close to a threshold. "
            "Sums of whole numbers are exact: let the first layer read pixels from 0 to 255, say.",
            DifferenceWarning,
            stacklevel=2,
        )
    return report


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))
