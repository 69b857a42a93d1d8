"""Runs in folders: started, killed, gone on with, and used; `docs/runs.md` lists the files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np

from pjax import nn
from pjax.lab import checkpoints, config, devices
from pjax.lab.checkpoints import Checkpoint, CheckpointError
from pjax.lab.config import TrainConfig
from pjax.lab.data import Dataset
from pjax.lab.errors import RunError, UsageError, shown
from pjax.lab.files import make_folder, read_json, write_json, write_text
from pjax.lab.recording import JSON_LINES, Recorder, read_records
from pjax.lab.train import Accuracy, Params, Record, Training

CONFIG, ENVIRONMENT, DATA, RESULT = "config.toml", "environment.json", "data.json", "result.json"
CHECKPOINTS = "checkpoints"
#: Settings that may change when a run goes on: the results do not depend on them, or on the mesh
#: by rounding only.
_FREE = ("data_dir", "checkpoint_every", "keep", "tensorboard", "mesh")

Say = Callable[[str], None]


def create(settings: TrainConfig, dataset: Dataset, runs_dir: Path, name: str = "") -> Path:
    """A new folder for a run, with its settings.

    **Arguments:**

    - `settings`: what is saved as `config.toml`.
    - `dataset`: what `data.json` describes.
    - `runs_dir`, `name`: the folder is `runs_dir/name`; without a name it is made from data set,
      model and method, and a number where that is taken.

    **Raises:** `UsageError` for a name that is taken or is no name.
    """
    if name:
        check_name(name)
    make_folder(runs_dir)
    stem = name or f"{settings.dataset}-{settings.model}-{settings.method}"
    number = 1
    while True:
        folder = runs_dir / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            if name:
                raise UsageError(
                    f"--name {name}: {folder} exists. Go on with it (pjax train --resume {folder}) "
                    "or choose another name."
                ) from None
            number += 1
        except OSError as error:
            raise RunError(f"{folder}: cannot create the folder ({error.strerror}).") from error
    write_json(folder / ENVIRONMENT, environment())
    bounds = [float(dataset.train.x.min()), float(dataset.train.x.max())]
    write_json(folder / DATA, {**describe(dataset), "range": bounds})
    # Last: a folder with settings is a run.
    write_text(folder / CONFIG, config.to_toml(settings))
    return folder


def check_name(name: str) -> None:
    """Raises `UsageError` for what is not the name of a folder."""
    if name.startswith(".") or not name.isprintable() or any(sign in name for sign in "/\\"):
        raise UsageError(f"--name must be the name of a folder, got {shown(name)}.")


def settings_of(folder: Path) -> TrainConfig:
    """The settings of a run.

    **Raises:** `RunError` for a folder that is not one of a run, and for a damaged file.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run.")
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder}: not a run ({CONFIG} is missing).")
    return config.read(folder / CONFIG, TrainConfig, complete=True)


def environment() -> dict[str, Any]:
    """Versions and devices, for someone who repeats a run."""
    versions = {}
    for name in ("pjax-learn", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source folder
            versions[name] = None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "x64": jax.dtypes.canonicalize_dtype(float) == np.float64,
    }


def computer() -> str:
    """What computes here, in a few words: the devices and the version of JAX."""
    devices = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"{devices}, JAX {jax.__version__}"


def describe(dataset: Dataset) -> dict[str, Any]:
    """What must be known of a data set to load a run's parameters, and to tell it from another."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.validation, dataset.test):
        digest.update(np.ascontiguousarray(split.y).tobytes())
        for part in (split.x[:1000], split.x[-1000:]):
            digest.update(np.ascontiguousarray(part).tobytes())
    described: dict[str, Any] = {
        "name": dataset.name,
        "features": dataset.num_features,
        "classes": dataset.num_classes,
        "shape": list(dataset.shape),
        "rows": {
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "sha256": digest.hexdigest(),
    }
    if dataset.moments is not None:
        described["moments"] = [values.tolist() for values in dataset.moments]
    return described


def check_same_data(folder: Path, dataset: Dataset) -> None:
    """Raises `RunError` if this is not the data set that the run was trained on."""
    saved = read_json(folder / DATA)
    for name, value in describe(dataset).items():
        if saved.get(name) != value:
            raise RunError(
                f"{folder / DATA}: the run was trained on other data ({name} differs from what "
                f"--dataset {dataset.name} gives now)."
            )


@dataclasses.dataclass(frozen=True)
class Result:
    """A run as far as it got; `rows` is empty until it is finished."""

    folder: Path
    step: int
    finished: bool
    rows: list[dict[str, Any]]


def advance(
    folder: Path,
    settings: TrainConfig,
    dataset: Dataset,
    model: nn.Module,
    *,
    on_start: Callable[[Training], None] = lambda training: None,
    on_step: Callable[[Training, Sequence[Record]], None] = lambda training, records: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Say = lambda message: None,
) -> Result:
    """Trains a run from its newest checkpoint, or its start, to its end.

    What a run writes is a function of its settings, apart from the seconds: a process that was
    killed at any moment and one that was not leave the same parameters and metrics.

    **Arguments:**

    - `folder`, `settings`, `dataset`, `model`: of the run.
    - `on_start`: called once the step is compiled and the checkpoint is read.
    - `on_step`: called after each batch, with the records if it was measured.
    - `should_stop`: asked after each batch; a checkpoint is then written, and that is all.
    - `say`: gets a line for each checkpoint that is passed over.

    **Raises:** `RunError` for files that cannot be used.
    """
    with _alone(folder):
        if (folder / RESULT).exists():
            return finished_result(folder)
        found = newest_checkpoint(folder, settings, on_skip=lambda text: say(_passed(text)))
        numbers = {} if found is None else found.numbers["training"]
        # The groups decide how sums are rounded: those of the first start go on.
        training = config.make_training(settings, dataset, model, numbers.get("seeds_at_once"))
        if found is None:
            _check_not_started(folder)
            recorder = _recorder(folder, settings, None)
            records = training.measure()
            recorder.write(records)
            _save(folder, settings, training, recorder)
        else:
            training.restore(checkpoints.fit(found, training.snapshot()[0]), numbers)
            recorder = _recorder(folder, settings, found.numbers["metrics"])
        with contextlib.closing(recorder):
            on_start(training)
            while not training.finished:
                records = training.advance()
                recorder.write(records)
                # With several processes all must agree, which is asked for now and then.
                alone = jax.process_count() == 1
                stop = devices.any_of(should_stop()) if alone or records else False
                due = training.step % settings.checkpointed_every == 0
                if due or stop or training.finished:
                    _save(folder, settings, training, recorder)
                on_step(training, records)
                if stop and not training.finished:
                    return Result(folder, training.step, False, [])
        _finish(folder, settings, training)
        return finished_result(folder)


def _recorder(folder: Path, settings: TrainConfig, mark: dict[str, Any] | None) -> Any:
    """Process 0 writes metrics; the others have a recorder that writes nothing."""
    if devices.first():
        found = Recorder(folder, settings.tensorboard, mark)
    else:
        found = _Silent()
    devices.meet("metrics")
    return found


class _Silent:
    """In the place of a `Recorder`."""

    def write(self, records: Sequence[Record]) -> None:
        pass

    def mark(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def newest_checkpoint(
    folder: Path, settings: TrainConfig, on_skip: Say = lambda message: None
) -> Checkpoint | None:
    """The newest checkpoint of a run that can be used; `None` if none was ever finished."""
    now = config.to_table(settings)

    def accept(found: Checkpoint) -> None:
        try:
            then, numbers = dict(found.numbers["config"]), found.numbers["training"]
            mark = found.numbers["metrics"]
            if not (numbers["step"] == found.step and {"bytes", "sha256"} <= mark.keys()):
                raise KeyError
            if [one["seed"] for one in numbers["standings"]] != then["seeds"]:
                raise KeyError
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{found.path}: not a checkpoint of a run.") from error
        difference = _difference(then, now)
        if difference:
            raise CheckpointError(f"{found.path}: {difference}")
        # A file that every checkpoint needs is not a reason to pass over this one alone.
        if mark["bytes"] and not (folder / JSON_LINES).is_file():
            raise RunError(f"{folder / JSON_LINES}: missing.")

    return checkpoints.newest(folder / CHECKPOINTS, accept, on_skip)


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """How the settings differ that results depend on; empty if they do not."""
    for name in sorted(then.keys() | now.keys()):
        if name not in _FREE and then.get(name) != now.get(name):
            return (
                f"of another configuration ({name} was {shown(then.get(name))} there, "
                f"{CONFIG} has {shown(now.get(name))})."
            )
    return ""


def finished_result(folder: Path) -> Result:
    """What a finished run found.

    **Raises:** `RunError` if it is not finished, its file is damaged or of another configuration.
    """
    path = folder / RESULT
    if not path.is_file():
        raise RunError(f"{folder}: not finished; go on with: pjax train --resume {folder}")
    content = read_json(path)
    try:
        rows = [
            {
                "seed": int(row["seed"]),
                "best_step": int(row["best_step"]),
                "validation_accuracy": float(row["validation_accuracy"]),
                "test_accuracy": float(row["test_accuracy"]),
                "steps": int(row["steps"]),
                "stopped": str(row["stopped"]),
                "test_auc": None if row.get("test_auc") is None else float(row["test_auc"]),
            }
            for row in content["seeds"]
        ]
        step, then = int(content["step"]), dict(content["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: damaged, not the result of a run.") from error
    difference = _difference(then, config.to_table(settings_of(folder)))
    if difference:
        raise RunError(f"{path}: {difference}")
    return Result(folder, step, True, rows)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The best parameters of a run, for each seed, with what they are for.

    **Attributes:**

    - `params`: stacked along a first axis, one entry for each seed.
    - `validation_accuracy`, `best_step`: of each seed.
    - `moments`: mean and deviation of each channel, if the data were standardised.
    - `range`: the least and the greatest value of the training rows, standardised if these were;
      `None` where the run does not tell.
    """

    settings: TrainConfig
    model: nn.Module
    features: int
    classes: int
    step: int
    params: Params
    validation_accuracy: list[float]
    best_step: list[int]
    moments: tuple[np.ndarray, np.ndarray] | None = None
    range: tuple[float, float] | None = None

    def of_seed(self, seed: int | None = None) -> Params:
        """The parameters of a seed; by default the one with the best validation accuracy."""
        if seed is None:
            number = int(np.argmax(self.validation_accuracy))
        elif seed in self.settings.seeds:
            number = self.settings.seeds.index(seed)
        else:
            raise UsageError(f"--seed {seed}: the run has the seeds {self.settings.seeds}.")
        return {name: value[number] for name, value in self.params.items()}


def trained(folder: Path, say: Say = lambda message: None) -> Trained:
    """The best parameters in a run's newest checkpoint that can be used.

    **Raises:** `RunError`.
    """
    settings = settings_of(folder)
    found = newest_checkpoint(folder, settings, on_skip=lambda text: say(_passed(text)))
    if found is None:
        raise RunError(f"{folder / CHECKPOINTS}: holds no checkpoint.")
    data = read_json(folder / DATA)
    try:
        features, classes = int(data["features"]), int(data["classes"])
        stand_in = _StandIn(str(data["name"]), features, classes, tuple(map(int, data["shape"])))
        standings = found.numbers["training"]["standings"]
        accuracies = [float(one["best_accuracy"]) for one in standings]
        steps = [int(one["best_step"]) for one in standings]
        bounds = None
        if "range" in data:
            low, high = map(float, data["range"])
            bounds = low, high
        moments = None
        if settings.standardise:
            mean, deviation = (np.array(values, np.float64) for values in data["moments"])
            if not mean.shape == deviation.shape == (stand_in.shape[-1],):
                raise ValueError
            moments = mean, deviation
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / DATA}: damaged, not the description of a data set.") from error
    model = config.make_model(settings, stand_in)
    one = jax.eval_shape(model.init, jax.random.key(0))
    params = {}
    for name, leaf in one.items():
        array = found.arrays.get(f"best.{name}")
        if array is None or array.shape != (len(settings.seeds), *leaf.shape):
            shape = None if array is None else array.shape
            raise RunError(
                f"{found.path}: the parameter {name} has the shape {shape}, "
                f"{(len(settings.seeds), *leaf.shape)} expected."
            )
        params[name] = jax.numpy.asarray(array)
    return Trained(
        settings,
        model,
        features,
        classes,
        found.step,
        params,
        accuracies,
        steps,
        moments,
        bounds,
    )


def evaluate(run: Trained, dataset: Dataset) -> list[dict[str, Any]]:
    """Validation and test accuracy of each seed's best parameters; of two classes test AUC too."""
    measure = Accuracy(run.model)
    validation = measure.each(run.params, dataset.validation)
    test = measure.each(run.params, dataset.test)
    auc = measure.auc(run.params, dataset.test) if dataset.num_classes == 2 else None
    return [
        {
            "seed": seed,
            "best_step": run.best_step[number],
            "validation_accuracy": float(validation[number]),
            "test_accuracy": float(test[number]),
            "test_auc": None if auc is None else float(auc[number]),
        }
        for number, seed in enumerate(run.settings.seeds)
    ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    if not all(math.isfinite(value) for value in values):
        return sum(values), math.nan
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.fmean(values), error


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """What a model needs to know of a data set, without its rows."""

    name: str
    num_features: int
    num_classes: int
    shape: tuple[int, ...]


def _save(folder: Path, settings: TrainConfig, training: Training, recorder: Recorder) -> None:
    arrays, numbers = training.snapshot()
    content = {
        "training": numbers,
        "metrics": recorder.mark(),
        "config": config.to_table(settings),
    }
    checkpoints.save(folder / CHECKPOINTS, training.step, arrays, content, settings.keep)


def _finish(folder: Path, settings: TrainConfig, training: Training) -> None:
    rows = [
        {
            "seed": one.seed,
            "best_step": one.best_step,
            "validation_accuracy": one.best_accuracy,
            "test_accuracy": accuracy,
            "steps": one.steps,
            "stopped": one.stopped,
            "test_auc": auc,
        }
        for one, accuracy, auc in zip(
            training.standings, training.test(), training.test_auc(), strict=True
        )
    ]
    if devices.first():
        _write_result(folder, settings, training, rows)
    devices.meet("result")


def _write_result(
    folder: Path, settings: TrainConfig, training: Training, rows: list[dict[str, Any]]
) -> None:
    write_json(
        folder / RESULT,
        {
            "method": training.method.name,
            "description": training.method.description,
            "step": training.step,
            "seconds": training.seconds,
            "compile_seconds": training.compile_seconds,
            "state_bytes": training.state_bytes,
            "seeds_at_once": training.seeds_at_once,
            "config": config.to_table(settings),
            "seeds": rows,
        },
    )


def _check_not_started(folder: Path) -> None:
    """Raises `RunError` if metrics tell of steps whose checkpoints are gone."""
    if (folder / JSON_LINES).exists():
        last = max((record.step for record in read_records(folder)), default=0)
        if last:
            raise RunError(
                f"{folder / CHECKPOINTS}: holds no checkpoint, though {folder / JSON_LINES} "
                f"reaches step {last}; start a new run."
            )


def _passed(text: str) -> str:
    return f"{text} Using the one before."


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    if not devices.first():  # process 0 keeps others out
        yield
        return
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise RunError(f"{folder}: another process is training this run.") from None
