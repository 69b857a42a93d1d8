"""Methods with a learning rate, tuned: Optax on gradients, or on displacements in their place."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import pjax
from pjax import nn
from pjax.lab.data import Dataset, batch_rows
from pjax.lab.train import Accuracy, Outcome, Params, cosine
from pjax.training import ValueAndDisplacement

Name = Literal["adam", "sgd", "muon", "schedule-free", "displacement-adam", "straight-through"]

#: The rates that are tried, each with and without cosine decay; `schedule-free` has no decay.
RATES: dict[str, tuple[float, ...]] = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
    "muon": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "schedule-free": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "displacement-adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "straight-through": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
#: The windows that are tried with each rate: half of the width over which a straight-through
#: estimator lets gradients pass, in units of the largest level.
WINDOWS: dict[str, tuple[float, ...]] = {"straight-through": (0.25, 0.5, 1.0, 2.0)}
#: The share of a run over which the rate of `schedule-free` grows.
WARMUP = 0.1


def matrix_axes(params: Any, skip: Callable[[str, Any], bool]) -> Any:
    """Which axes of each array are the rows and which the columns of a matrix, for Muon.

    A convolution's kernel is the matrix that it applies to a patch. Arrays with fewer than two axes
    and those of which `skip(name, array)` holds get nothing, so that they are Adam's.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if leaf.ndim < 2 or skip(jax.tree_util.keystr(path), leaf):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def scale_by_muon(axes: Callable[[Any], Any] | None = None) -> optax.GradientTransformation:
    """Muon on matrices and Adam on the rest, to be multiplied by minus the rate.

    A matrix moves as far as Adam would move it (Liu et al., arXiv:2502.16982), so that one rate
    serves both.

    **Arguments:**

    - `axes`: from parameters to what `matrix_axes` gives. By default, embeddings and the layer of
      the outputs are Adam's, as Muon's author advises.
    """
    if axes is None:
        axes = functools.partial(
            matrix_axes, skip=lambda name, _: "embedding" in name or "['output." in name
        )
    # `muon` moves against the gradient; what stands in Adam's place must not yet.
    muon = optax.contrib.muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=axes)
    return optax.chain(muon, optax.scale(-1.0))


_DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "sgd": optax.identity,
    "muon": scale_by_muon,
    "displacement-adam": optax.scale_by_adam,
    "straight-through": optax.scale_by_adam,
}


@dataclasses.dataclass(frozen=True)
class Descent:
    """`params − rate(t) · direction(g)`, the direction Adam's, Muon's or `g` itself.

    `g` is the gradient of the mean cross-entropy, or the displacement by
    [`pjax.value_and_displacement`][] in its place.

    **Arguments:**

    - `name`: `"adam"`, `"sgd"`, `"muon"`, `"displacement-adam"`, `"schedule-free"`: AdamW with
      averages in the place of a schedule, or `"straight-through"`: Adam on the gradient of a
      straight-through estimator.
    - `rate`: the learning rate at the start.
    - `decay_steps`: the batches over which a cosine takes the rate to zero; 0 keeps it constant.
    - `num_classes`: the length of a one-hot row.
    - `window`: of the straight-through estimator, see `WINDOWS`.
    - `warmup_steps`: of `"schedule-free"`, the batches over which the rate grows; see `warmup`.
    """

    name: Name
    rate: float
    decay_steps: int
    num_classes: int
    window: float = 0.0
    warmup_steps: int = 0

    @property
    def description(self) -> str:
        if self.name == "schedule-free":
            return f"rate {self.rate:g}, warm-up {self.warmup_steps}"
        window = f", window {self.window:g}" if self.name in WINDOWS else ""
        return f"rate {self.rate:g}{window}, {'cosine' if self.decay_steps else 'constant'}"

    def init(self, model: nn.Module, params: Params, x: Array, y: Array) -> Any:
        return _init(self.name, model, self.num_classes, params, x, y)

    def step(
        self, model: nn.Module, params: Params, state: Any, x: Array, y: Array
    ) -> tuple[Params, Any, Outcome]:
        setting = self.rate, self.decay_steps, self.window, self.warmup_steps
        params, state, loss = _update(
            self.name, model, self.num_classes, params, state, x, y, setting
        )
        return params, state, Outcome(loss, jnp.array(jnp.nan))


def warmup(name: str, steps: int) -> int:
    """The batches over which the method's rate grows in a run of so many."""
    return round(WARMUP * steps) if name == "schedule-free" else 0


class Candidate(NamedTuple):
    """A setting that was tried, with the best validation accuracy along its run."""

    rate: float
    decay_steps: int
    accuracy: float
    window: float = 0.0


def tune(
    name: Name, model: nn.Module, dataset: Dataset, *, extend: bool = False, **settings: Any
) -> Descent:
    """The rate and schedule with the best validation accuracy along its run; see `search`."""
    found = search(name, model, dataset, extend=extend, **settings)
    return best_of(name, found, dataset.num_classes, settings["steps"])


def best_of(
    name: Name, candidates: Sequence[Candidate], num_classes: int, steps: int = 0
) -> Descent:
    """The method with the best of these settings for so many steps, the first of equal ones."""
    best = max(candidates, key=lambda candidate: candidate.accuracy)
    warmup_steps = warmup(name, steps)
    return Descent(name, best.rate, best.decay_steps, num_classes, best.window, warmup_steps)


def search(
    name: Name,
    model: nn.Module,
    dataset: Dataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    measure_every: int,
    extend: bool = False,
    on_step: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Candidate]:
    """The validation accuracies of `RATES[name]`, each rate constant and with cosine decay.

    Methods that have a window try each of `WINDOWS[name]` with each of these; `schedule-free` is
    tried without decay only.

    All candidates train at once, in one compiled program, from the initial parameters and on the
    batches that `pjax.lab.train.train` uses for the same seed.

    **Arguments:** as for `pjax.lab.train.train`; `on_step` gets the number of batches done. If
    `should_stop` ends the search early, accuracies are what was measured until then. With
    `extend`, a rate beyond an end of the range is tried as long as the best one is at that end.
    """
    rates = list(RATES[name])
    decays = (0,) if name == "schedule-free" else (0, steps)
    found: list[Candidate] = []
    while True:
        tried = {candidate.rate for candidate in found}
        fresh = [rate for rate in rates if rate not in tried]
        candidates = list(itertools.product(fresh, decays, WINDOWS.get(name, (0.0,))))
        accuracies = _race(
            name,
            model,
            dataset,
            candidates,
            steps,
            batch_size,
            seed,
            measure_every,
            on_step,
            should_stop,
        )
        found += [
            Candidate(rate, decay, float(accuracy), window)
            for (rate, decay, window), accuracy in zip(candidates, accuracies, strict=True)
        ]
        # Of equal ones the smallest: where all rates diverge at once, none of them is the best.
        best = max(found, key=lambda candidate: (candidate.accuracy, -candidate.rate)).rate
        if extend and not should_stop() and best == min(rates) > _LIMITS[0]:
            rates.append(float(f"{best / 10**0.5:.0e}"))
        elif extend and not should_stop() and best == max(rates) < _LIMITS[1]:
            rates.append(float(f"{best * 10**0.5:.0e}"))
        else:
            return found


#: A search is extended no further than this.
_LIMITS = (1e-6, 100.0)


def _race(
    name: Name,
    model: nn.Module,
    dataset: Dataset,
    candidates: Sequence[tuple[float, int, float]],
    steps: int,
    batch_size: int,
    seed: int,
    measure_every: int,
    on_step: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> np.ndarray:
    """The best validation accuracy of each candidate (rate, decay, window) along its run."""
    warm = len(candidates) * [warmup(name, steps)]
    settings = tuple(jnp.array(column) for column in (*zip(*candidates, strict=True), warm))
    params = model.init(jax.random.key(seed))
    train_x, train_y = jnp.asarray(dataset.train.x), jnp.asarray(dataset.train.y)
    first = slice(batch_size)
    state = _init(name, model, dataset.num_classes, params, train_x[first], train_y[first])
    params, state = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (len(candidates), *leaf.shape)), (params, state)
    )

    def run(params: Params, state: Any, setting: tuple[Array, ...], rows: Array) -> Any:
        def body(carry: tuple[Params, Any], chosen: Array) -> tuple[tuple[Params, Any], None]:
            x, y = train_x[chosen], train_y[chosen]
            params, state, _ = _update(name, model, dataset.num_classes, *carry, x, y, setting)
            return (params, state), None

        return jax.lax.scan(body, (params, state), rows)[0]

    advance = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None)))
    measure = Accuracy(model)
    order = batch_rows(len(dataset.train), batch_size, seed)
    best = np.zeros(len(candidates))
    done = 0
    while done < steps and not (done and should_stop()):
        size = min(measure_every, steps - done)
        rows = jnp.asarray(np.stack(list(itertools.islice(order, size))))
        params, state = jax.block_until_ready(advance(params, state, settings, rows))
        done += size
        best = np.maximum(best, measure.each(params, dataset.validation))
        on_step(done)
    return best


def _init(
    name: Name, model: nn.Module, num_classes: int, params: Params, x: Array, y: Array
) -> Any:
    of_optax: Any = params
    if name == "schedule-free":
        return jnp.zeros((), jnp.int32), _schedule_free(1.0).init(of_optax), ()
    direction = _DIRECTIONS[name]().init(of_optax)
    carried: Any = ()
    if name == "displacement-adam":
        carried = _displace(model).init(params, x, jax.nn.one_hot(y, num_classes))
    return jnp.zeros((), jnp.int32), direction, carried


def _update(
    name: Name,
    model: nn.Module,
    num_classes: int,
    params: Params,
    state: Any,
    x: Array,
    y: Array,
    setting: tuple[Any, ...],
) -> tuple[Params, Any, Array]:
    count, direction_state, carried = state
    # They may be traced: tuning runs all of them side by side.
    rate, decay_steps, window, warmup_steps = setting
    options = {"window": window} if name in WINDOWS else {}

    def loss(params: Params) -> Array:
        logits = model.apply(params, x, **options)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    if name == "schedule-free":
        rate = rate * jnp.minimum(1.0, (count + 1) / jnp.maximum(warmup_steps, 1))
        params, direction_state, value = _average(loss, rate, params, direction_state)
        return params, (count + 1, direction_state, carried), value
    if name == "displacement-adam":
        labels = jax.nn.one_hot(y, num_classes)
        (value, found), carried = _displace(model).update(carried, params, x, labels)
    else:
        value, found = jax.value_and_grad(loss)(params)
    direction, direction_state = _DIRECTIONS[name]().update(
        found,
        direction_state,
        params,  # pyright: ignore[reportArgumentType]
    )
    rate = rate * cosine(count, decay_steps)
    updates = jax.tree.map(lambda leaf: -rate * leaf, direction)
    new: Any = optax.apply_updates(params, updates)  # pyright: ignore[reportArgumentType]
    return new, (count + 1, direction_state, carried), value


def _schedule_free(rate: Any) -> optax.GradientTransformation:
    return optax.contrib.schedule_free_adamw(rate, b1=_INTERPOLATION)


#: How far from the iterates towards their averages gradients are taken, `b1`.
_INTERPOLATION = 0.9


def _average(
    loss: Callable[[Params], Array], rate: Any, averages: Params, state: Any
) -> tuple[Params, Any, Array]:
    """A step of schedule-free AdamW (Defazio et al., arXiv:2405.15682).

    What is called parameters everywhere else are the averages `x`, which are to be evaluated; the
    gradient is taken at `y = b1 x + (1 − b1) z`, with the iterates `z` in Optax's state.
    """
    between: Any = jax.tree.map(
        lambda x, z: _INTERPOLATION * x + (1 - _INTERPOLATION) * z, averages, state.z
    )
    value, found = jax.value_and_grad(loss)(between)
    updates, state = _schedule_free(rate).update(found, state, between)
    between = optax.apply_updates(between, updates)
    averages = optax.contrib.schedule_free_eval_params(state, between)  # pyright: ignore
    return averages, state, value


def _displace(model: nn.Module) -> ValueAndDisplacement:
    def loss(params: Params, x: Array, labels: Array) -> Array:
        return jnp.mean(pjax.cross_entropy(model.apply(params, x), labels))

    return pjax.value_and_displacement(loss)
