"""What is trained, how and on what: settings from the command line or a TOML file, checked."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import shlex
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
import tyro

from pjax import nn, optim
from pjax.lab import devices
from pjax.lab.baselines import WINDOWS, Descent, warmup
from pjax.lab.data import Dataset, DatasetName, load, load_text
from pjax.lab.errors import RunError, UsageError, shown
from pjax.lab.models import CNN, MLP, QUANTIZED, RNN, ActivationName
from pjax.lab.train import Method, Projection, PureProjection, Training

_T = TypeVar("_T")
#: Fields whose docstring says the default, so that the command line's help does not add it.
Told = Annotated[_T, tyro.conf.arg(help_behavior_hint="")]
Maybe = Annotated[_T | None, tyro.conf.arg(help_behavior_hint="")]

MethodName = Literal[
    "projection",
    "displacement-adam",
    "adam",
    "sgd",
    "muon",
    "schedule-free",
    "straight-through",
    "ap",
    "cp",
    "dr",
    "cdr",
    "dm",
    "ar",
]
#: What figures and tables for readers call them.
NAMES: dict[str, str] = {
    "projection": "projection",
    "displacement-adam": "Adam on displacements",
    "adam": "Adam",
    "sgd": "SGD",
    "muon": "Muon",
    "schedule-free": "schedule-free AdamW",
    "straight-through": "straight-through Adam",
    "ap": "alternating projections",
    "cp": "cyclic projections",
    "dr": "Douglas-Rachford",
    "cdr": "cyclic Douglas-Rachford",
    "dm": "difference map",
    "ar": "alternating reflections",
}
TaskName = Literal[DatasetName, "tinyshakespeare"]
#: Those that are texts, and the characters in a row of one.
TEXTS, WINDOW = ("tinyshakespeare",), 32

OPTIMIZERS = {
    "ap": optim.AlternatingProjections,
    "cp": optim.CyclicProjections,
    "dr": optim.DouglasRachford,
    "cdr": optim.CyclicDouglasRachford,
    "dm": optim.DifferenceMap,
    "ar": optim.AlternatingReflections,
}
#: The learning rate where none is given.
DEFAULT_RATES = {
    "adam": 3e-3,
    "sgd": 0.1,
    "muon": 3e-3,
    "schedule-free": 1e-2,
    "displacement-adam": 3e-3,
    "straight-through": 3e-3,
}
#: Counts beyond this are mistakes.
_LARGEST = 10**9
_LARGEST_FILE = 100_000


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, a network, and how long to train; what `pjax train` and `pjax compare` share."""

    dataset: TaskName = "digits"
    """digits comes with scikit-learn; the others are read from files."""
    data_dir: Maybe[Path] = None
    """Folder with the files (default: $PJAX_DATA_DIR, then the cache; see pjax data list)."""
    split_seed: int = 0
    """Seed of the split into training, validation and test rows."""
    standardise: bool = False
    """Give each channel of the training images mean 0 and deviation 1, and the others the same."""
    model: Literal["mlp", "cnn", "rnn"] = "mlp"
    """A multilayer perceptron, strided 3x3 convolutions for images, a recurrent net for texts."""
    hidden: tuple[int, ...] = (128,)
    """Width of each hidden layer of the perceptron, or of the recurrent net's cell."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of each convolution."""
    skip: bool = False
    """Let the perceptron's last layer read all hidden layers, or add the recurrent net's states."""
    activation: ActivationName = "relu"
    """What follows each hidden layer."""
    weight_levels: int = 0
    """Let the perceptron's layers read weights of so many levels (0: real numbers)."""
    splitting: Literal["layer", "neuron"] = "layer"
    """How finely projection methods cut the network into constraints."""
    projection_steps: Maybe[int] = None
    """Steps of the projection algorithm on each batch (default: the algorithm's own)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What the learning rate, or the relaxation of a projection, does over the run."""
    steps: int = 200
    """Batches."""
    batch_size: int = 128
    """Rows in a batch."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initial parameters and batches; all of them train in one compiled program."""
    seeds_at_once: Told[int] = 0
    """Seeds in one vectorised step (default: as many as memory allows)."""
    measure_every: Maybe[int] = None
    """Batches between measurements (default: a twentieth of all)."""
    patience: int = 0
    """Stop after so many measurements without a better validation accuracy (0: never)."""

    def problem(self) -> tuple[str, str] | None:
        """The first setting that cannot be, and why; nothing if all can."""
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("split_seed", 0),
            ("seeds_at_once", 0),
            ("patience", 0),
            ("weight_levels", 0),
            ("projection_steps", 1),
            ("measure_every", 1),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= _LARGEST:
                return name, f"must be from {least} to {_LARGEST:,}, got {shown(value)}."
        for name in ("hidden", "channels"):
            if not all(1 <= width <= _LARGEST for width in getattr(self, name)):
                return name, f"takes positive widths, got {shown(getattr(self, name))}."
        is_text = self.dataset in TEXTS
        if is_text != (self.model == "rnn"):
            wanted = "rnn for the text" if is_text else "mlp or cnn for"
            return "model", f"must be {wanted} {self.dataset}, got {self.model}."
        if is_text and not self.hidden:
            return "hidden", "needs at least one width for a recurrent net."
        if is_text and self.standardise:
            return "standardise", f"has no meaning for the text {self.dataset}."
        if self.weight_levels == 1 or (self.weight_levels and self.model != "mlp"):
            return "weight_levels", "must be 0, or at least 2 and with model mlp."
        if not self.seeds:
            return "seeds", "needs at least one seed."
        if len(set(self.seeds)) < len(self.seeds):
            return "seeds", f"holds a seed twice, got {shown(self.seeds)}."
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            return "seeds", f"takes seeds from 0 to 2³² − 1, got {shown(self.seeds)}."
        return None

    @property
    def quantizes(self) -> bool:
        """Whether activations or weights have no useful derivative."""
        return self.activation in QUANTIZED or self.weight_levels > 0

    @property
    def measured_every(self) -> int:
        return self.measure_every or max(1, self.steps // 20)


_NEEDS_QUANTIZERS = (
    f"needs the activation {' or '.join(QUANTIZED)}, or weight_levels: others have a gradient."
)


@dataclasses.dataclass(frozen=True)
class TrainConfig(Task):
    """A task and the method that trains it, with what is written on the way."""

    method: MethodName = "projection"
    """projection: pjax.optim.Projection, recommended. displacement-adam: Adam on displacements. By
    gradients: adam, sgd, muon, schedule-free (AdamW), straight-through (Adam, for quantized
    networks). The paper's solvers: ap, alternating projections; cp, cyclic projections; dr,
    Douglas-Rachford; cdr, cyclic Douglas-Rachford; dm, difference map; ar, alternating
    reflections."""
    rate: Maybe[float] = None
    """Learning rate of methods that have one (default: 0.003; sgd 0.1, schedule-free 0.01)."""
    window: Maybe[float] = None
    """Half of the width over which straight-through lets gradients pass (default: 1)."""
    mesh: Maybe[str] = None
    """Devices by axis: data=4,model=2 has rows of a batch on four and columns of weights on two of
    each (default: one device; with several processes data and all of them)."""
    checkpoint_every: Maybe[int] = None
    """Batches between checkpoints (default: as measurements)."""
    keep: int = 3
    """Checkpoints that are kept."""
    tensorboard: bool = False
    """Write TensorBoard's event files too."""

    def problem(self) -> tuple[str, str] | None:
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            return "rate", f"must be positive, got {shown(self.rate)}."
        if self.rate is not None and self.method not in DEFAULT_RATES:
            return "rate", f"has no meaning for {self.method}, which has no learning rate."
        if self.window is not None and not (math.isfinite(self.window) and self.window > 0):
            return "window", f"must be positive, got {shown(self.window)}."
        if self.window is not None and self.method not in WINDOWS:
            return "window", f"has no meaning for {self.method}."
        if self.method in WINDOWS and not self.quantizes:
            return "method", f"{self.method} {_NEEDS_QUANTIZERS}"
        try:
            devices.parse_mesh(self.mesh or "")
        except ValueError as error:
            return "mesh", str(error)
        for name in ("checkpoint_every", "keep"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST:
                return name, f"must be from 1 to {_LARGEST:,}, got {shown(value)}."
        return super().problem()

    @property
    def checkpointed_every(self) -> int:
        return self.checkpoint_every or self.measured_every


@dataclasses.dataclass(frozen=True)
class CompareConfig(Task):
    """A task and the methods that are compared on it."""

    methods: tuple[MethodName, ...] = ("projection", "adam", "displacement-adam", "sgd")
    """Which methods, in this order; their names are in pjax train --help."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initial parameters and batches; a method's seeds train in one compiled program."""
    tuning_seed: int = 1000
    """Seed of the runs that choose learning rates; it must not be one of the others."""

    def problem(self) -> tuple[str, str] | None:
        if not self.methods:
            return "methods", "needs at least one method."
        if len(set(self.methods)) < len(self.methods):
            return "methods", f"holds a method twice, got {shown(self.methods)}."
        if not self.quantizes and any(method in WINDOWS for method in self.methods):
            return "methods", f"straight-through {_NEEDS_QUANTIZERS}"
        if not 0 <= self.tuning_seed < 2**32 or self.tuning_seed in self.seeds:
            return "tuning_seed", (
                f"must be from 0 to 2³² − 1 and none of the seeds, got {shown(self.tuning_seed)}."
            )
        return super().problem()


def single(settings: CompareConfig, method: MethodName, **changes: Any) -> TrainConfig:
    """The training of one method of a comparison, with these settings changed."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Task)}
    return TrainConfig(**(fields | changes), method=method)


AnyConfig = TypeVar("AnyConfig", bound=Task)


def check(config: Task) -> None:
    """Raises `UsageError` for a setting that cannot be, by the name of its option."""
    found = config.problem()
    if found:
        name, text = found
        raise UsageError(f"--{name.replace('_', '-')} {text}")


def check_data(config: Task, dataset: Dataset) -> None:
    """Raises `UsageError` for settings that do not fit the data set."""
    if config.batch_size > len(dataset.train):
        raise UsageError(
            f"--batch-size must be from 1 to {len(dataset.train)} (training rows), "
            f"got {config.batch_size}."
        )


def load_data(config: Task) -> Dataset:
    """The data set of a configuration, checked against it.

    **Raises:** `DataError`, `UsageError`.
    """
    if config.dataset in TEXTS:
        dataset = load_text(config.dataset, config.data_dir).dataset(WINDOW)
    else:
        dataset = load(config.dataset, config.data_dir, config.split_seed)
    check_data(config, dataset)
    return dataset.standardised() if config.standardise else dataset


@typing.runtime_checkable
class Rows(typing.Protocol):
    """What a model needs to know of a data set."""

    @property
    def name(self) -> str: ...

    @property
    def num_features(self) -> int: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def make_model(config: Task, dataset: Rows) -> nn.Module:
    """The network of a configuration for a data set.

    **Raises:** `UsageError` where they do not fit each other, or the parameters do not fit memory.
    """
    model: nn.Module
    if config.model == "cnn":
        shape = image_shape(dataset)
        model = CNN(shape, dataset.num_classes, config.channels, config.activation)
    elif config.model == "rnn":
        model = RNN(dataset.num_classes, config.hidden, config.skip, config.activation)
    else:
        model = MLP(
            dataset.num_features,
            dataset.num_classes,
            config.hidden,
            config.skip,
            config.activation,
            config.weight_levels,
        )
    declared = model._declared().values()
    size = 4 * len(config.seeds) * sum(math.prod(one.shape) for one in declared)
    if size > _LARGEST_PARAMETERS:
        option = "--channels" if config.model == "cnn" else "--hidden"
        raise UsageError(f"{option} asks for {size / 1e9:.3g} GB of parameters.")
    return model


#: Bytes of parameters, all seeds together, that are taken for a mistake.
_LARGEST_PARAMETERS = 8 * 10**9


def image_shape(dataset: Rows) -> tuple[int, int, int]:
    """Height, width and channels of a data set of images.

    **Raises:** `UsageError` for one that has none.
    """
    if len(dataset.shape) == 3:
        height, width, channels = dataset.shape
        return height, width, channels
    raise UsageError(
        f"--model cnn needs images; {dataset.name} has rows of {dataset.num_features} features."
    )


def make_method(config: TrainConfig, num_classes: int) -> Method:
    """The method of a configuration."""
    decay_steps = config.steps if config.schedule == "cosine" else 0
    decay = ", cosine" if decay_steps else ""
    if config.method in OPTIMIZERS:
        optimizer = OPTIMIZERS[config.method](
            config.projection_steps, splitting=config.splitting, check=False
        )
        steps = optimizer.solver.steps
        return Projection(
            config.method,
            f"{config.splitting}, {steps} step{'s' * (steps != 1)} per batch" + decay,
            optimizer,
            num_classes,
            carries_state=True,
            decay_steps=decay_steps,
        )
    if config.method == "projection":
        return PureProjection(f"no learning rate{decay}", num_classes, decay_steps)
    rate = DEFAULT_RATES[config.method] if config.rate is None else config.rate
    name: Any = config.method
    if name == "schedule-free":
        decay_steps = 0
    warmup_steps = warmup(name, config.steps)
    return Descent(name, rate, decay_steps, num_classes, config.window or 1.0, warmup_steps)


def make_training(
    config: TrainConfig, dataset: Dataset, model: nn.Module, seeds_at_once: int | None = None
) -> Training:
    """The training of a configuration, at its start.

    **Arguments:**

    - `seeds_at_once`: in place of the configuration's, see `pjax.lab.train.Training`.
    """
    return Training(
        make_method(config, dataset.num_classes),
        model,
        dataset,
        steps=config.steps,
        batch_size=config.batch_size,
        seeds=config.seeds,
        measure_every=config.measured_every,
        patience=config.patience,
        seeds_at_once=config.seeds_at_once if seeds_at_once is None else seeds_at_once,
        mesh=config.mesh or "",
    )


def read(path: Path, kind: type[AnyConfig], complete: bool = False) -> AnyConfig:
    """The configuration in a TOML file: one table, with the names of the fields.

    **Arguments:**

    - `path`: the file.
    - `kind`: `TrainConfig`, or another task.
    - `complete`: every setting that is not optional must be there, as in the file of a run.

    **Raises:** `RunError`, with a message of one line that names the file and the setting.
    """
    return from_table(path, read_toml(path), kind, complete)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file that holds settings.

    **Raises:** `RunError`, with a message of one line that names the file.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(content) > _LARGEST_FILE:
        raise RunError(f"{path}: too large for a configuration (over {_LARGEST_FILE:,} bytes).")
    try:
        table = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RunError(f"{path}: not a text file (byte {error.start} is not UTF-8).") from error
    except RecursionError as error:
        raise RunError(f"{path}: not TOML that can be read (nested too deeply).") from error
    except ValueError as error:
        raise RunError(f"{path}: not valid TOML ({shown(str(error), 200)[1:-1]}).") from error
    if not table:
        raise RunError(f"{path}: holds no settings.")
    return table


def from_table(
    path: Path | str, table: Mapping[str, Any], kind: type[AnyConfig], complete: bool = False
) -> AnyConfig:
    """The configuration in a table that was read from `path`; see `read`."""
    hints = _hints(kind)
    for name in table:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise RunError(f"{path}: there is no setting {shown(name)}{hint}")
    values = {}
    for name, value in table.items():
        try:
            values[name] = _convert(value, hints[name])
        except ValueError as error:
            raise RunError(f"{path}: {name} must be {error}, got {shown(value)}.") from None
    if complete:
        missing = [
            name for name, hint in hints.items() if name not in table and not _is_optional(hint)
        ]
        if missing:
            raise RunError(f"{path}: {missing[0]} is missing.")
    config = kind(**values)
    found = config.problem()
    if found:
        raise RunError(f"{path}: {found[0]} {found[1]}")
    return config


def to_table(config: Task) -> dict[str, Any]:
    """The settings as TOML has them; those that are `None` are left out."""
    table = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            table[field.name] = list(value) if isinstance(value, tuple) else value
            if isinstance(value, Path):
                table[field.name] = str(value)
    return table


def to_toml(config: Task) -> str:
    """The text of a TOML file from which `read` gets the same configuration."""
    return tomli_w.dumps(to_table(config))


def to_command(config: Task, command: str) -> str:
    """The command line `pjax COMMAND …` with these settings; those at their defaults are left out.

    **Arguments:**

    - `config`: of `pjax train` or `pjax compare`.
    - `command`: `"train"` or `"compare"`.
    """
    return quoted("pjax", command, *changed(config))


def changed(options: Any) -> list[str]:
    """The options of a command's dataclass that are not at their defaults, as words."""
    words: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        option = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, tuple):
            words += [f"--{option}", *map(str, value)]
        else:
            words += [f"--{option}", str(value)]
    return words


def quoted(*words: object) -> str:
    """The words as a shell takes them."""
    return shlex.join(map(str, words))


@functools.cache
def _hints(kind: type[Task]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is_optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _convert(value: object, hint: Any) -> Any:
    """The value as the field has it; `ValueError` says what it must be."""
    arguments = typing.get_args(hint)
    if _is_optional(hint):
        (hint,) = (one for one in arguments if one is not types.NoneType)
        return _convert(value, hint)
    if typing.get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ValueError(_name(hint))
        return value
    if typing.get_origin(hint) is tuple:
        (item, _) = arguments
        if not isinstance(value, list):
            raise ValueError(f"a list, each entry {_name(item)}")
        try:
            return tuple(_convert(one, item) for one in value)
        except ValueError as error:
            raise ValueError(f"a list, each entry {error}") from None
    if hint is float and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    # `True` is an `int` to Python, and not to TOML.
    if type(value) is not (str if hint is Path else hint):
        raise ValueError(_NAMES[hint])
    if isinstance(value, str):
        if not value.isprintable():
            raise ValueError(f"{_NAMES[hint]} on one line")
        return Path(value) if hint is Path else value
    return value


def _name(hint: Any) -> str:
    """What a value of this type is called."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return _NAMES[hint]


_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    Path: "a path",
}
