"""A training loop of one's own that records as `pjax train` does."""

from __future__ import annotations

import hashlib
import math
import operator
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from pjax.lab.errors import RunError, shown
from pjax.lab.files import make_folder
from pjax.lab.recording import FIELDS, JSON_LINES, Recorder, parse_lines
from pjax.lab.train import Record


class Logger:
    """Writes loss, residual and measures of an own loop into `metrics.jsonl`, `metrics.csv` and, if
    asked for, TensorBoard's event files.

    A line is on the disk when `log` returns. Leaving the `with` block closes the files, after an
    exception too. `pjax.lab.recording.read_records` reads the lines.

    **Arguments:**

    - `folder`: gets the files; it is made if it is not there.
    - `tensorboard`: write event files too, into `folder/tensorboard`: a curve for each measure.
      They need the extra `tensorboard`.
    - `resume`: go on from this step, that of the parameters that were restored: lines up to it are
      kept, those of later steps are cut off. `None` starts a new file.
    - `seed`: of this training, for the lines.

    **Raises:** `RunError` if the folder cannot be made, has metrics already and `resume` is `None`,
    or has none, or damaged ones, to go on with.

    ```python
    import tempfile

    import jax.numpy as jnp
    import pjax
    from pjax.lab import Logger

    def loss_fn(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    w, x, y = jnp.zeros((3, 1)), jnp.eye(3), jnp.ones((3, 1))
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, w, x, y)
    with Logger(tempfile.mkdtemp()) as logger:
        for step in range(1, 6):
            w, state, info = optimizer.update(loss_fn, w, state, x, y)
            logger.log(step, loss=info.loss, residual=info.residual, length=jnp.linalg.norm(w))
    ```
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = False,
        resume: int | None = None,
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self._seed, self._last, spent = seed, -1, 0.0
        make_folder(self.folder)
        path = self.folder / JSON_LINES
        mark = None
        if resume is None:
            if path.exists() and path.stat().st_size:
                raise RunError(
                    f"{path}: there are metrics already. Go on with them (`resume=STEP`, the step "
                    "of the parameters that you restored) or give another folder."
                )
        else:
            kept = b""
            for record, line in parse_lines(path):
                if record.step > resume:
                    break
                kept += line
                spent = record.seconds
            self._last = resume
            mark = {"bytes": len(kept), "sha256": hashlib.sha256(kept).hexdigest()}
        self._start = time.perf_counter() - (spent if math.isfinite(spent) else 0.0)
        self._recorder: Recorder | None = Recorder(self.folder, tensorboard, mark)

    def log(
        self, step: Any, *, loss: Any = math.nan, residual: Any = math.nan, **measures: Any
    ) -> None:
        """Writes one line.

        **Arguments:**

        - `step`: batches so far, an integer, more than in the line before.
        - `loss`, `residual`: numbers, or arrays of one element.
        - `measures`: further numbers by name. `epoch`, `seconds`, `train_accuracy` and
          `validation_accuracy` are the fields of that name; without `seconds` these are the
          seconds since the logger was opened, after those of the lines that it goes on with.

        A number that is not finite is `null` in the file and no point in TensorBoard.

        **Raises:** `TypeError` for what is no number, as in a function that `jax.jit` traces;
        `ValueError` for a step that does not grow, and after `close`.
        """
        try:
            step = operator.index(step)
        except TypeError as error:
            raise TypeError(f"Logger.log: `step` must be an integer, got {shown(step)}.") from error
        if step <= self._last:
            raise ValueError(
                f"Logger.log: `step` must be at least {self._last + 1}, as steps grow from line to "
                f"line, got {step}."
            )
        if "seed" in measures:
            raise ValueError("Logger.log: `seed` is an argument of Logger.")
        given = {"loss": loss, "residual": residual, **measures}
        numbers = {name: _number(name, value) for name, value in given.items()}
        fields = {"seconds": time.perf_counter() - self._start, "validation_accuracy": math.nan}
        fields |= {name: value for name, value in numbers.items() if name in FIELDS}
        others = {name: value for name, value in numbers.items() if name not in FIELDS}
        self.write(Record(step=step, seed=self._seed, measures=others, **fields))  # pyright: ignore[reportArgumentType]

    def write(self, record: Record) -> None:
        """Writes a record, as the `callback` of `pjax.lab.train.train`: `callback=logger.write`."""
        if self._recorder is None:
            raise ValueError("Logger: it is closed; open one with `resume=STEP` to go on.")
        self._recorder.write([record])
        self._last = record.step

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    def __enter__(self) -> Logger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _number(name: str, value: Any) -> float:
    try:
        if getattr(value, "size", 1) != 1 or isinstance(value, str):
            raise TypeError
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Logger.log: `{name}` must be one number, got {shown(value)}. Log outside of "
            "functions that jax.jit traces, and reduce arrays first (`.mean()`)."
        ) from error
