"""The methods that `benchmarks.accuracy` compares; `register` adds one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import pjax
from benchmarks.accuracy_tasks import Batch, Kind, Loss, Params
from pjax.lab import baselines

#: Numbers by name; they are traced, so one compiled program serves all of a grid.
Settings = Mapping[str, Any]
Init = Callable[[Loss, Params, Batch], Any]
Step = Callable[[Loss, Params, Any, Any, Any, Array, Settings], tuple[Params, Any]]
#: The parameters that are evaluated, of those that train and the state.
Read = Callable[[Params, Any], Params]
#: Beside its rate a tuned method tries both of these, unless it names others.
SCHEDULES: Mapping[str, tuple[float, ...]] = {"cosine": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    **Arguments:**

    - `name`: for the table and the cache.
    - `kind`: `"gradient"` and `"optax"` methods read the setting `rate` and those of `choices`, and
      are tuned on every row; a `"pure"` one has the same `settings` on every row. It also says
      which loss they get, see `Task.loss`.
    - `init`: `init(loss_fn, params, (x, targets))`, what is carried from batch to batch, a pytree
      of arrays; the batch is the first.
    - `step`: `step(loss_fn, params, state, x, targets, progress, settings)`, the new parameters and
      state; `progress` goes from 0 to (just below) 1 over the run. Compiled.
    - `read`: `read(params, state)`, the parameters that are evaluated; by default those that train.
    - `description`: all that is fixed in `step`. Cached runs are found by name, description and
      settings, so a change of any of them trains anew.
    - `settings`: of a pure method.
    - `choices`: the values that tuning tries of each further setting, all with every rate.
    - `reflecting`: it takes part in the rows for methods that reflect.
    - `requires`: a name that `pjax` must have; without it the method is left out.
    - `rows`: names of rows; empty: all.
    """

    name: str
    kind: Kind
    init: Init
    step: Step
    description: str = ""
    settings: Settings = dataclasses.field(default_factory=dict)
    choices: Mapping[str, tuple[float, ...]] = dataclasses.field(
        default_factory=lambda: dict(SCHEDULES)
    )
    read: Read = lambda params, state: params
    reflecting: bool = False
    requires: str = ""
    rows: tuple[str, ...] = ()

    @property
    def tuned(self) -> bool:
        return self.kind != "pure"

    @property
    def available(self) -> bool:
        return not self.requires or hasattr(pjax, self.requires)


#: Every method, by name, in the order of the table.
METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Adds a method to the table."""
    if method.name in METHODS:
        raise ValueError(f"there is a method called {method.name!r} already.")
    METHODS[method.name] = method
    return method


def rate_at(progress: Array, settings: Settings) -> Array:
    """The learning rate, constant or on a cosine to zero at the end of the run."""
    decayed = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return settings["rate"] * jnp.where(settings["cosine"] > 0, decayed, 1.0)


def descend(
    name: str,
    kind: Kind,
    direction: Callable[[Loss], Callable[[Params, Batch], tuple[Array, Params]]],
    *,
    scale: Callable[[], optax.GradientTransformation] = optax.scale_by_adam,
    description: str = "",
    requires: str = "",
    rows: tuple[str, ...] = (),
) -> Method:
    """`params − rate · scale(direction)`, Adam's scale unless told otherwise.

    `direction(loss_fn)` is `jax.value_and_grad(loss_fn)` or stands where it does: from
    `(params, batch)` to the loss and what takes the gradient's place.
    """

    def init(loss_fn: Loss, params: Params, batch: Batch) -> Any:
        return scale().init(params)  # pyright: ignore[reportArgumentType]

    def step(loss_fn, params, state, x, y, progress, settings):
        _, found = direction(loss_fn)(params, (x, y))
        updates, state = scale().update(found, state, params)  # pyright: ignore[reportArgumentType]
        rate = rate_at(progress, settings)
        return jax.tree.map(lambda leaf, move: leaf - rate * move, params, updates), state

    return Method(name, kind, init, step, description=description, requires=requires, rows=rows)


def matrices(params: Params) -> Any:
    """What is Muon's, see `baselines.matrix_axes`.

    To Adam go, as Muon's author advises, biases, scales of norms, tables that are read by row, and
    layers of outputs.
    """
    last = params["w"][-1] if "w" in params else None  # of perceptrons and convolutions

    def skip(name: str, leaf: Any) -> bool:
        return leaf is last or any(part in name for part in ("embedding", "position", "head"))

    return baselines.matrix_axes(params, skip)


def _schedule_free() -> Method:
    """Adam without a schedule (Defazio et al., arXiv:2405.15682); averages are evaluated.

    The rate grows from a tenth over the share `warmup` of the run.
    """

    def transformation(rate: Any) -> optax.GradientTransformation:
        return optax.contrib.schedule_free_adamw(rate)

    def init(loss_fn: Loss, params: Params, batch: Batch) -> Any:
        return transformation(1.0).init(params)  # the rate is no part of the state

    def step(loss_fn, params, state, x, y, progress, settings):
        grown = jnp.minimum(1.0, 0.1 + 0.9 * progress / settings["warmup"])
        found = jax.grad(loss_fn)(params, (x, y))
        updates, state = transformation(settings["rate"] * grown).update(found, state, params)
        return optax.apply_updates(params, updates), state

    return Method(
        "schedule-free",
        "gradient",
        init,
        step,
        description="AdamW without decay, b1 0.9",
        choices={"warmup": (0.02, 0.1)},
        read=lambda params, state: optax.contrib.schedule_free_eval_params(state, params),
    )


def displacement(name: str, **options: Any) -> Method:
    """Adam on the displacement of a projection, `pjax.value_and_displacement(loss_fn, **options)`.

    The displacement takes the gradient's place: Adam moves against it.
    """
    text = ", ".join(f"{key}={value!r}" for key, value in options.items())

    def direction(loss_fn: Loss) -> Any:
        return getattr(pjax, "value_and_displacement")(loss_fn, **options)  # noqa: B009

    return descend(name, "optax", direction, description=text, requires="value_and_displacement")


ADAM = register(descend("adam", "gradient", jax.value_and_grad))
register(
    descend(
        "muon",
        "gradient",
        jax.value_and_grad,
        scale=lambda: baselines.scale_by_muon(matrices),
        description="consistent RMS 0.2, head and tables by Adam",
    )
)
register(_schedule_free())
register(displacement("displacement-adam"))


def projection(
    name: str, solver: str, *, reflecting: bool = False, rows: tuple[str, ...] = (), **options: Any
) -> Method:
    """Pure projection, `pjax.optim`'s `solver` with layer splitting: no optimiser, no rate.

    The moves of the parameters are relaxed on a cosine from 1 to 0.
    """
    optimizer = getattr(pjax.optim, solver)(splitting="layer", check=False, **options)
    text = ", ".join(f"{key}={value!r}" for key, value in options.items())

    def init(loss_fn: Loss, params: Params, batch: Batch) -> Any:
        return optimizer.init(lambda params: loss_fn(params, batch), params)

    def step(loss_fn, params, state, x, y, progress, settings):
        relaxation = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        params, _, state = optimizer.update(
            lambda params: loss_fn(params, (x, y)), params, state, relaxation=relaxation
        )
        return params, state

    return Method(name, "pure", init, step, description=text, reflecting=reflecting, rows=rows)


def pure(name: str, **options: Any) -> Method:
    """`pjax.optim.Projection`: no optimiser, no rate. Moves are relaxed on a cosine from 1 to 0."""
    optimizer = pjax.optim.Projection(check=False, **options)

    def init(loss_fn: Loss, params: Params, batch: Batch) -> Any:
        return optimizer.init(loss_fn, params, batch)

    def step(loss_fn, params, state, x, y, progress, settings):
        relaxation = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        params, state, _ = optimizer.update(loss_fn, params, state, (x, y), relaxation=relaxation)
        return params, state

    return Method(name, "pure", init, step, description=str(optimizer.requests))


_REFLECTING = ("mnist-1x128-reflecting",)
register(pure("projection"))
register(projection("projection-dr", "DouglasRachford", reflecting=True, rows=_REFLECTING))
register(projection("projection-dm", "DifferenceMap", reflecting=True, rows=_REFLECTING))
register(
    projection(
        "projection-ar", "AlternatingReflections", reflecting=True, rows=_REFLECTING, relaxation=0.5
    )
)
