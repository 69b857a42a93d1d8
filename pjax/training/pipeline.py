"""Pipelined projection: batches flow through the stages of a network, and no stage waits.

In a *tick* every stage makes its output for one batch and is solved for an older one, from what the
tick before has sent. With `S` stages batch `b` enters stage `s` in tick `b + s`, and the request
for it comes back in tick `b + 2(S − 1) − s`: `2(S − 1 − s)` batches later, the stage's *delay*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from pjax.options import Fallback
from pjax.trace import require_function
from pjax.training import stages
from pjax.training.checks import NonFiniteError, require_relaxation
from pjax.training.requests import Requests
from pjax.training.stages import Asked, Kept, Labelled, Stage

#: With a delay of so many batches moves are half as long.
_HALF_SIZE = 24.0
#: With a delay of so many batches requests are remembered for half as long.
_HALF_MEMORY = 14.0
#: Moves grow to their size in so many batches: in the first ones all ask for the same, and none has
#: seen what the others have moved.
_RAMP = 100.0
#: How far a stage counts its own moves as done: of less it asks again for what it has, with more it
#: takes back what the stages beside it needed.
_CORRECTION = 0.2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PipelineState:
    """What one tick hands on to the next; a pytree of arrays.

    **Attributes:**

    - `tick`, `fed`: how many ticks there were, and batches.
    - `layers`: how many layers each stage has.
    - `kept`: memories, for each stage.
    - `inputs`, `outputs`: of each stage, of the batches that it was not asked by yet.
    - `labels`: of the batches that the last stage has not seen yet.
    - `arrived`, `asked`: for each stage the inputs and the request that the tick before has sent.
    - `sound`: whether the last tick's numbers are finite, for each stage.
    """

    tick: Any
    fed: Any
    layers: tuple[Any, ...]
    kept: tuple[Kept, ...]
    inputs: tuple[tuple[Any, ...], ...]
    outputs: tuple[tuple[Any, ...], ...]
    labels: tuple[Any, ...]
    arrived: tuple[Any, ...]
    asked: tuple[Any, ...]
    sound: tuple[Any, ...]


class PipelineInfo(NamedTuple):
    """What there is beside parameters and state.

    **Attributes:**

    - `batch`: the number of the batch that the last stage saw in this tick; None while none has
        arrived there.
    - `loss`: its loss; None with it.
    """

    batch: int | None
    loss: Array | None


@dataclass(frozen=True)
class PipelinedProjection:
    """Training by projection of a network that is cut into stages, each on a device of its own.

    In every tick each stage takes the output of the stage before for a newer batch, and the request
    of the stage behind for an older one. Nothing waits: the time of a tick is that of the slowest
    stage, whatever their number. The price is a delay: stage `s` of `S` moves as batches ask that
    it saw `2(S − 1 − s)` batches ago. A request is a target for the stage's output, and is met from
    the weights of today. Moves are shorter and the memory fades sooner, the longer the delay.

    ```python
    pipeline = pjax.optim.PipelinedProjection([first, second, head], loss, devices=jax.devices())
    state = pipeline.init(params, x, y)
    for x, y in batches:
        params, state, info = pipeline.update(params, state, x, y)
    params, state = pipeline.finish(params, state)
    ```

    With one stage it is [`pjax.optim.Projection`][].

    **Arguments:**

    - `stages`: functions `f(params, x)` from the parameters and inputs of a stage to its outputs,
        one array of floating-point numbers with a row for each of the batch. Stages that share one
        function object compile once for each device.
    - `loss`: `loss(outputs, labels)` of the last stage's outputs, one number: a mean over rows.
    - `devices`: stages are spread over them in order; None: all on the default device, with the
        same results.
    - `check`: raise an error where numbers of the tick before are not finite; it waits for that
        tick, while the new one is computed.
    - `fallback`: see [`pjax.feasibility_problem`][].
    - `requests`: the constants of the rule, without a delay.
    """

    stages: Sequence[Callable[[Any, Any], Any]]
    loss: Callable[[Any, Any], Any]
    devices: Sequence[Any] | None = None
    check: bool = True
    fallback: Fallback | None = None
    requests: Requests = Requests()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("`stages` is empty: give one function `f(params, x)` for each stage.")
        for number, fn in enumerate(self.stages):
            require_function(fn, f"stages[{number}]")
        require_function(self.loss, "loss")

    @property
    def delays(self) -> tuple[int, ...]:
        """For each stage how many batches it has seen since the one that it is asked by."""
        last = len(self.stages) - 1
        return tuple(2 * (last - number) for number in range(last + 1))

    def init(self, params: Sequence[Any], x: Any, y: Any) -> PipelineState:
        """The state before the first batch.

        **Arguments:**

        - `params`: the parameters of each stage, pytrees of arrays.
        - `x`, `y`: inputs and labels of a batch, for their shapes.

        **Raises:** `ValueError` for another number of parameters than of stages; `TypeError` for a
        stage whose output is not an array; [`pjax.TraceError`][] for an operation without a rule.
        """
        self._require_params(params)
        asked = []
        for number, (fn, own) in enumerate(zip(self.stages, params, strict=True)):
            if number == len(self.stages) - 1:
                asked.append(Labelled(x, y))
                break
            output = stages.forward(fn, own, x)
            if not (isinstance(output, jax.Array) and jnp.issubdtype(output.dtype, jnp.floating)):
                kind = getattr(output, "dtype", type(output).__name__)
                raise TypeError(
                    f"`stages[{number}]` returned {kind}: the output of a stage must be one array "
                    "of floating-point numbers."
                )
            asked.append(Asked(x, output, jnp.zeros_like(output)))
            x = output
        ones = (1,) * len(self.stages)
        layers = tuple(
            stages.count_layers(stage, own, one)
            for stage, own, one in zip(self._described(ones), params, asked, strict=True)
        )
        kept = tuple(
            self._put(stages.start(stage, own, one), number)
            for number, (stage, own, one) in enumerate(
                zip(self._described(layers), params, asked, strict=True)
            )
        )
        none = (None,) * len(self.stages)
        waiting = ((),) * len(self.stages)
        zero = np.zeros((), np.int32)
        return PipelineState(zero, zero, layers, kept, waiting, waiting, (), none, none, none)

    def update(
        self, params: Sequence[Any], state: PipelineState, x: Any, y: Any, relaxation: Any = 1.0
    ) -> tuple[list[Any], PipelineState, PipelineInfo]:
        """One tick: the stages' parameters after it. Called outside of `jit`: it starts the work of
        each device by itself, and does not wait for it.

        **Arguments:**

        - `params`: of each stage, as `init` had them.
        - `state`: from `init` or the update before.
        - `x`, `y`: the batch that enters. All batches have one shape.
        - `relaxation`: a factor on the moves of this tick, such as a schedule from 1 to 0.

        **Returns:** `(params, state, info)`, see [`PipelineInfo`][].

        **Raises:** [`pjax.NonFiniteError`][], naming the stage, one tick later.
        """
        if isinstance(state, PipelineState) and isinstance(state.tick, Tracer):
            raise TypeError("`PipelinedProjection.update` is called outside of `jax.jit`.")
        return self._tick(params, state, (x, y), relaxation)

    def finish(
        self, params: Sequence[Any], state: PipelineState, relaxation: Any = 1.0
    ) -> tuple[list[Any], PipelineState]:
        """Lets the batches that are on their way arrive, in `2(S − 1)` ticks without a new one.

        **Arguments:**

        - `relaxation`: a factor on the moves, or one for each of these ticks.

        **Returns:** the parameters, and a state that can go on with further batches.
        """
        for factor in np.broadcast_to(relaxation, self.delays[0]):
            params, state, _ = self._tick(params, state, None, factor)
        self._raise_if_unsound(state)
        none, waiting = (None,) * len(self.stages), ((),) * len(self.stages)
        zero = np.zeros((), np.int32)
        return list(params), replace(
            state, tick=zero, fed=zero, inputs=waiting, outputs=waiting, labels=(), arrived=none,
            asked=none, sound=none,
        )  # fmt: skip

    def _tick(
        self, params: Sequence[Any], state: PipelineState, batch: Any, relaxation: Any
    ) -> tuple[list[Any], PipelineState, PipelineInfo]:
        self._require_params(params)
        require_relaxation(relaxation)
        described = self._described(tuple(int(n) for n in state.layers))
        last = len(described) - 1
        tick, fed = int(state.tick), int(state.fed)
        params = [self._put(own, number) for number, own in enumerate(params)]
        kept = list(state.kept)
        inputs = [list(queue) for queue in state.inputs]
        outputs = [list(queue) for queue in state.outputs]
        labels, arrived = state.labels, list(state.arrived)
        if batch is not None:
            arrived[0] = self._put(batch[0], 0)
            labels = (*labels, self._put(batch[1], last))
            fed += 1
        sent: list[Any] = [None] * len(described)
        asked: list[Any] = [None] * len(described)
        sound: list[Any] = [None] * len(described)
        number_seen, loss = None, None
        for number, stage in enumerate(described):
            # What arrived now waits for its request; of the last stage it comes with the labels.
            if 0 <= tick - number < fed:
                inputs[number].append(arrived[number])
            if not 0 <= tick - (2 * last - number) < fed:
                continue
            x = inputs[number].pop(0)
            if number == last:
                label, *labels = labels
                one: Any = Labelled(x, label)
            else:
                one = Asked(x, outputs[number].pop(0), state.asked[number])
            solved = stages.solve(stage, params[number], kept[number], one, relaxation)
            params[number], kept[number] = solved.params, solved.kept
            sound[number] = solved.sound
            if number == last:
                number_seen, loss = tick - last, solved.loss
            if number > 0:
                asked[number - 1] = self._put(solved.request, number - 1)
        for number, fn in enumerate(self.stages[:-1]):
            if 0 <= tick - number < fed:
                output = stages.forward(fn, params[number], arrived[number])
                outputs[number].append(output)
                sent[number + 1] = self._put(output, number + 1)
        if self.check:
            self._raise_if_unsound(state)
        new = PipelineState(
            np.int32(tick + 1), np.int32(fed), state.layers, tuple(kept),
            tuple(map(tuple, inputs)), tuple(map(tuple, outputs)), tuple(labels), tuple(sent),
            tuple(asked), tuple(sound),
        )  # fmt: skip
        return params, new, PipelineInfo(number_seen, loss)

    def _described(self, layers: Sequence[int]) -> list[Stage]:
        """The stages of a network whose stages have so many layers."""
        last, described = len(self.stages) - 1, []
        share = self.requests.size / sum(layers) ** 0.5
        for number, (fn, own) in enumerate(zip(self.stages, layers, strict=True)):
            stage = Stage(
                fn,
                self.loss if number == last else None,
                number == 0,
                replace(self.requests, size=share * own**0.5),
                share,
                fallback=self.fallback,
            )
            described.append(_delayed(stage, 2 * last))
        return described

    def _put(self, tree: Any, number: int) -> Any:
        """Arrays on the device of a stage."""
        if self.devices is None:
            return tree
        return jax.device_put(tree, self.devices[number * len(self.devices) // len(self.stages)])

    def _require_params(self, params: Sequence[Any]) -> None:
        if not isinstance(params, (list, tuple)) or len(params) != len(self.stages):
            found = len(params) if isinstance(params, (list, tuple)) else type(params).__name__
            raise ValueError(
                f"`params` must be a list of {len(self.stages)}, the parameters of each stage; got "
                f"{found}."
            )

    def _raise_if_unsound(self, state: PipelineState) -> None:
        for number, sound in enumerate(state.sound):
            if sound is not None and not sound:
                raise NonFiniteError(
                    f"Stage {number} left the range of floating-point numbers: its parameters, its "
                    "request or the loss are NaN or infinite. Look for NaN in the data and for an "
                    "overflow in the stage; a smaller initialisation or scaled inputs help."
                )


def _delayed(stage: Stage, delay: int) -> Stage:
    """A stage of a pipeline with this delay, in batches, from its first stage to its last."""
    if delay == 0:
        return stage
    rule = stage.requests
    kept = max(1.0, 1 / (1 - rule.memory) / (1 + (delay / _HALF_MEMORY) ** 3))
    # A batch that has not seen the last moves cannot say whether they were too long.
    rule = replace(rule, memory=1 - 1 / kept, pacing=0.0)
    return replace(
        stage,
        requests=rule,
        size=1 / (1 + (delay / _HALF_SIZE) ** 2),
        ramp=_RAMP,
        correction=_CORRECTION,
    )


__all__ = ["PipelineInfo", "PipelineState", "PipelinedProjection"]
