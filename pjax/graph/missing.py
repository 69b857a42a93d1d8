"""What to do about operations without a rule."""

from __future__ import annotations

from pjax.backend import compat
from pjax.program import Equation

#: What to do about loops whose length is not known.
LOOPS = {
    "scan": "unroll the loop in Python",
    "while": "give the loop a fixed number of steps (`jax.lax.fori_loop` with Python numbers, "
    "`jax.lax.scan`), the largest that may be needed, and keep what is done by "
    "`jnp.where(is_running, new, old)`",
}


def no_rule(equation: Equation, has_fallback: bool) -> str:
    name = equation.name
    where = f" at {equation.source}" if equation.source else ""
    message = f"There is no projection for the operation `{name}`{where}."
    if name in LOOPS:
        return (
            f"{message} Control flow over parameters whose course depends on data is not "
            f"supported: {LOOPS[name]}; or make the function around it an operation of its own, "
            "with a projection: `pjax.register_projection`."
        )
    if len(equation.outputs) != 1:
        return (
            f"{message} It has several outputs, and a node has one: make a function of it that "
            "returns one array an operation of its own, `@pjax.register_projection(function)`."
        )
    path = compat.primitive_path(name.replace("-", "_")) or "the_primitive"
    message = (
        f"{message} Register one:\n"
        f"    @pjax.register_projection({path})\n"
        "    def project(inputs, target, input_weights, target_weight, **params): ...\n"
        "It returns the inputs nearest to `inputs` whose output is nearest to `target`; see "
        "`help(pjax.register_projection)`."
    )
    if not has_fallback:
        message += (
            '\nOr allow a numeric one, of the linearised operation: `fallback="gauss-newton"`, of '
            "`pjax.value_and_displacement`, `pjax.optim.Projection` and all that train."
        )
    return message
