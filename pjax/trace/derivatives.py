"""Functions with a derivative of their own: `jax.custom_jvp` and `jax.custom_vjp`.

Where the rule that a user wrote is the derivative of the function, written with numerical care, the
function is traced through like any other call. Where it is another one (a straight-through
estimator, a surrogate of a spike, a reversed gradient), forces are to follow the rule: the function
becomes its value in the forward pass plus what the rule makes of a move,

    y = f(x₀) + D(x₀) (x − x₀),  x₀ = stop_gradient(x),

which is linear in what moves. Integer results are those of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.backend import compat, device, source_lines
from pjax.program import Atom, CustomRule, TraceError, canonical
from pjax.trace.writer import Writer

#: Sizes of sample points, and of the tangents or cotangents there.
_SIZES = (0.1, 1.0, 3.0), (1.0, 1e4)
_TOLERANCE = 1e-3
#: Of functions by what they compute: whether their rule is their derivative.
_COMPARED: dict[Any, bool] = {}
_MAX_COMPARED = 256


def expand(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The outputs of a function whose own rule is not its derivative, as linear equations."""
    if eqn.primitive not in compat.CUSTOM_JVP | compat.CUSTOM_VJP:
        return None
    if not any(map(writer.is_variable, inputs)) or source_lines.is_jax_function(eqn):
        return None
    avals = [var.aval for var in eqn.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    # What the function closes over is an operand too, which its rule knows nothing of.
    moving = [writer.is_variable(a) and _is_real(s) for a, s in zip(inputs, shapes, strict=True)]
    types = [aval.dtype for aval in (*avals, *(var.aval for var in eqn.outvars))]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in types):
        return None
    # Of integer results nothing is asked; a function of integers alone has no effect on forces.
    if not any(map(_is_real, eqn.outvars)) or _is_derivative(eqn, moving, shapes):
        return None
    try:
        results = writer.add_function(_tangent(eqn, moving), inputs, source)
        writer.honoured[CustomRule(_name(eqn), source)] = None
        return results
    except Exception as error:
        raise TraceError(
            f"The backward rule of `{_name(eqn)}` ({source}) is not linear in the cotangents (or "
            "has no transpose), as that of a clipped gradient: forces cannot follow it. Clip the "
            f"displacements, or call `inspect.unwrap({_name(eqn)})`, the function without its rule."
        ) from error


def _name(eqn: Any) -> str:
    body, _ = compat.call_body(eqn.primitive, eqn.params)  # pyright: ignore
    return compat.function_name(body) or eqn.primitive.name


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(getattr(x, "aval", x).dtype, jnp.floating)


def _of_moving(moving: Sequence[bool], args: Sequence[Any], bind: Any) -> tuple[Any, list[Any]]:
    """The function of its operands that move alone, and those."""

    def function(*floats: Any) -> list[Any]:
        given = iter(floats)
        return bind(*(next(given) if m else a for m, a in zip(moving, args, strict=True)))

    return function, [a for m, a in zip(moving, args, strict=True) if m]


def _tangent(eqn: Any, moving: Sequence[bool]) -> Any:
    def linear(*args: Any) -> list[Any]:
        rest = [jax.lax.stop_gradient(x) for x in args]
        function, floats = _of_moving(moving, rest, lambda *xs: compat.bind(eqn, xs))
        moves = [x - r for x, r, m in zip(args, rest, moving, strict=True) if m]
        if eqn.primitive in compat.CUSTOM_JVP:
            out, moved = jax.jvp(function, floats, moves)
            moved = [m for o, m in zip(out, moved, strict=True) if _is_real(o)]
        else:
            out, back = jax.vjp(function, *floats)
            real = [o for o in out if _is_real(o)]
            back_real = lambda *g: back(_cotangents(out, g))  # noqa: E731
            moved = jax.linear_transpose(back_real, *real)(tuple(moves))
        found = iter(moved)
        return [o + next(found) if _is_real(o) else o for o in out]

    return linear


def _cotangents(out: Sequence[Any], real: Sequence[Any]) -> list[Any]:
    """Cotangents of all results, from those of the real ones."""
    given = iter(real)
    return [
        next(given) if _is_real(o) else np.zeros(o.shape, jax.dtypes.float0)  # pyright: ignore
        for o in out
    ]


def _is_derivative(eqn: Any, moving: Sequence[bool], shapes: Sequence[Any]) -> bool:
    """Whether the rule gives what the derivative of the function's body does, at sample points."""
    body, consts = compat.call_body(eqn.primitive, eqn.params)  # pyright: ignore

    def compare(points: Sequence[Any], ways: Sequence[Any]) -> Any:
        def by(bind: Any) -> Any:
            function, floats = _of_moving(moving, points, bind)
            if eqn.primitive in compat.CUSTOM_JVP:
                ways_in = [w for w, m in zip(ways, moving, strict=True) if m]
                moved = jax.jvp(function, floats, ways_in)[1]
                return [m for m, o in zip(moved, eqn.outvars, strict=True) if _is_real(o)]
            out, back = jax.vjp(function, *floats)
            real = [jnp.resize(ways[0], o.shape).astype(o.dtype) for o in out if _is_real(o)]
            return back(_cotangents(out, real))

        return by(lambda *xs: compat.bind(eqn, xs)), by(compat.as_function(body, consts))

    try:
        closed = jax.make_jaxpr(compare)(shapes, shapes)
    except Exception:  # the body has no derivative of this kind: the rule is what there is
        return False

    key = canonical(closed.jaxpr), tuple(canonical(c) for c in closed.consts)
    if key not in _COMPARED:
        if len(_COMPARED) >= _MAX_COMPARED:
            _COMPARED.clear()
        _COMPARED[key] = _agree(compare, shapes)
    return _COMPARED[key]


def _agree(compare: Any, shapes: Sequence[Any]) -> bool:
    rng = np.random.default_rng(0)

    def draw(size: float) -> list[Any]:
        drawn = [
            (size * rng.normal(size=s.shape)).astype(s.dtype)
            if _is_real(s)
            else np.zeros(s.shape, s.dtype)
            for s in shapes
        ]
        return drawn

    pairs = [(draw(size), draw(way)) for size in _SIZES[0] for way in _SIZES[1]]
    found = device.run_once(lambda pairs: [compare(*pair) for pair in pairs], pairs)
    for rule, body in found:
        for a, b in zip(jax.tree.leaves(rule), jax.tree.leaves(body), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            both = np.isfinite(a) & np.isfinite(b)
            size = np.max(np.abs(np.where(both, b, 0)), initial=0.0)
            if np.any(np.abs(a - b)[both] > _TOLERANCE * (np.abs(b)[both] + 1e-3 * size)):
                return False
    return True
