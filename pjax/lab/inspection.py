"""One batch of a trained run, looked at node by node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pjax
from pjax.graph import Graph
from pjax.inspection import Profile
from pjax.lab import config, data, runs, terminal
from pjax.lab.errors import RunError
from pjax.lab.train import Params, Projection, PureProjection
from pjax.problem import Formulation, Sizes, layout, make_problem, sizes
from pjax.trace import trace

#: A solve that would store more bytes than this is left out.
LARGEST_STATE = 2**30


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the run's method makes of the first batch of a seed, from that seed's best parameters.

    **Attributes:**

    - `seed`, `step`: whose parameters, and after how many batches.
    - `graph`: coloured.
    - `sizes`: of the problem as the method's solver stores it.
    - `profile`: of the solve; None if it would store more than a gigabyte.
    - `displacement`: what the method moves the parameters by, with the opposite sign.
    - `gradient`: of the mean loss.
    """

    seed: int
    step: int
    batch_size: int
    graph: Graph
    sizes: Sizes
    profile: Profile | None
    params: Params
    displacement: Params
    gradient: Params


def inspect(
    folder: Path,
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Inspection | None:
    """Solves one batch of a run from the best parameters of its best seed.

    **Arguments:**

    - `folder`: of `pjax train`.
    - `data_dir`: the folder with the data set's files, if not the run's. Nothing is downloaded.
    - `say`: gets a line for each checkpoint that is passed over, and for a solve that is left out.

    **Returns:** nothing if the run's method solves no problem.

    **Raises:** `RunError`, `DataError` or `UsageError` if a file of the run or the data are missing
    or damaged.
    """
    settings = runs.settings_of(folder)
    if settings.method not in (*config.OPTIMIZERS, "projection", "displacement-adam"):
        return None
    run = runs.trained(folder, say)
    number = max(range(len(run.best_step)), key=lambda n: run.validation_accuracy[n])
    seed, params = settings.seeds[number], run.of_seed()
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    if settings.dataset != "digits" and data.find(settings.dataset, settings.data_dir) is None:
        raise RunError(f"the data set {settings.dataset} is not on this machine.")
    dataset = config.load_data(settings)
    runs.check_same_data(folder, dataset)
    rows = next(data.batch_rows(len(dataset.train), settings.batch_size, seed))
    x = jnp.asarray(dataset.train.x[rows])
    labels = jax.nn.one_hot(dataset.train.y[rows], dataset.num_classes)

    def loss(params: Params) -> Any:
        return pjax.cross_entropy(run.model.apply(params, x), labels)

    def mean_loss(params: Params) -> Any:
        return jnp.mean(loss(params))

    method = config.make_method(settings, dataset.num_classes)
    fn: Callable[[Params], Any] = loss
    if isinstance(method, Projection):
        found: Any = method.optimizer
        moved, _ = found.update(loss, params)
        displacement = jax.tree.map(jnp.subtract, params, moved)
    else:
        found = pjax.value_and_displacement(mean_loss)
        fn = mean_loss
        _, displacement = found(params)
        if isinstance(method, PureProjection):  # the same sweep, with requests for its forces
            pure = pjax.optim.Projection()
            displacement, *_ = pure.displacement(fn, params, pure.init(fn, params))
    solver = found.solver
    stored = Formulation(found.metric, found.fanout, found.splitting).for_solver(solver)
    coloured = dataclasses.replace(stored, grouping="colours")
    # Residuals need the copies.
    copied = dataclasses.replace(stored, reflecting=True)
    if found.splitting == "layer":
        copied = stored
    program = trace(fn, params)[0]
    needed = sizes(layout(program, copied)).bytes
    profile = None
    if needed <= LARGEST_STATE:
        # In one program: operation by operation it takes several times as long.
        def solve(params: Params) -> tuple[Any, Any]:
            profile = pjax.profile(make_problem(fn, params, copied), solver)
            names.extend(profile.names)
            return profile.deviation, profile.residual

        names: list[str] = []
        deviation, residual = jax.jit(solve)(params)
        profile = Profile(tuple(names), deviation, residual)
    else:
        size = terminal.in_bytes(needed)
        say(f"Residuals by node are left out: their copies of one batch take {size}.")
    return Inspection(
        seed=seed,
        step=run.best_step[number],
        batch_size=settings.batch_size,
        graph=layout(program, coloured).graph,
        sizes=sizes(layout(program, stored)),
        profile=profile,
        params=params,
        displacement=displacement,
        gradient=jax.grad(mean_loss)(params),
    )
