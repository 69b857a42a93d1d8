"""What `benchmarks.accuracy` compares: the training tasks, and the rows that are read off them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, UInt8

import pjax
from benchmarks.loss_models import ActorCritic, Autoencoder, LossModel, Poisson
from benchmarks.text_models import Recurrent, Transformer
from pjax.lab import data

#: A pytree of arrays.
Params = Any
Kind = Literal["gradient", "optax", "pure"]
#: What the network reads of some rows, and their targets: one-hot labels of classes, else a pytree.
Batch = tuple[Any, Any]
#: `loss_fn(params, batch)`, a mean over the rows of the batch.
Loss = Callable[[Params, Batch], Array]
#: Of all pixels of the training images.
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
#: Marks settings of tasks that came after runs were cached: at their default they are no part of
#: what runs are found by.
LATER = {"later": True}


@dataclasses.dataclass(frozen=True)
class Task:
    """One way to train: data, network, batches. Runs are cached by task, so rows can share them.

    **Arguments:**

    - `dataset`: `"digits"`, `"mnist"` or `"higgs"`, split the same way for every seed.
    - `hidden`: the widths of the hidden layers.
    - `skip`: the last layer reads the outputs of all hidden layers.
    - `batch_size`: at most; a smaller training set is one batch.
    - `epochs`: passes over the training rows; what is left over after the last whole batch of an
      epoch sits it out.
    - `scale`: a factor on the inputs.
    - `measure_every`: validation is measured after so many batches; 0: after each epoch.
    - `compute`: the type in which the network computes its logits.
    - `standardise`: MNIST's pixels get mean 0 and deviation 1, all with the same two numbers.
    """

    dataset: str
    hidden: tuple[int, ...] = (128,)
    skip: bool = False
    batch_size: int = 256
    epochs: int = 10
    scale: float = 1.0
    measure_every: int = 0
    compute: Literal["float32", "bfloat16"] = "float32"
    standardise: bool = dataclasses.field(default=False, metadata=LATER)

    def key(self) -> dict[str, Any]:
        """What cached runs are found by."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata.get("later") or getattr(self, field.name) != field.default
        }

    @property
    def uses_auc(self) -> bool:
        return self.dataset == "higgs"

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of all layers but the last."""
        return self.hidden

    @property
    def in_loop(self) -> bool:
        """Whether batches are looped over in compiled code."""
        return True

    @property
    def label(self) -> str:
        """The folder of its cached runs."""
        return f"{self.dataset}-{'x'.join(str(width) for width in self.widths)}"

    def load(self, data_dir: str | None) -> data.Dataset | Windows:
        """The rows, from files."""
        return load(self.dataset, data_dir)

    def num_batches(self, per_epoch: int) -> int:
        """How many batches a run has, if there are so many in an epoch."""
        return self.epochs * per_epoch

    def inputs(self, x: Array) -> Array:
        """What the network reads of rows."""
        if self.standardise:
            x = (x - MNIST_MEAN) / MNIST_DEVIATION
        return x * self.scale

    def batch(self, x: Array, y: Any, num_classes: int, key: Array) -> Batch:
        """Rows of the data set as the loss takes them; a loss with noise draws it from `key`."""
        return self.inputs(x), jax.nn.one_hot(y, num_classes)

    def init(self, num_features: int, num_classes: int, seed: int) -> Params:
        """He-normal weights and zero biases, on every layer."""
        widths = [num_features, *self.hidden]
        read = sum(self.hidden) if self.skip else widths[-1]
        shapes = [*itertools.pairwise(widths), (read, num_classes)]
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        he = jax.nn.initializers.he_normal()
        return {
            "w": [he(key, shape) for key, shape in zip(keys, shapes, strict=True)],
            "b": [jnp.zeros(shape[1]) for shape in shapes],
        }

    def network(self, params: Params, x: Array) -> Array:
        """The logits, in the type of the parameters."""
        *layers, (last_weight, last_bias) = zip(params["w"], params["b"], strict=True)
        outputs = []
        for weight, bias in layers:
            x = jax.nn.relu(x @ weight + bias)
            outputs.append(x)
        if self.skip:
            x = jnp.concatenate(outputs, axis=-1)
        return x @ last_weight + last_bias

    def loss(self, kind: Kind) -> Loss:
        """The mean cross-entropy, in Optax's words for gradients, in pjax's for projections."""
        rows = optax.softmax_cross_entropy if kind == "gradient" else pjax.cross_entropy
        return lambda params, batch: jnp.mean(rows(self.logits(params, batch[0]), batch[1]))

    def logits(self, params: Params, x: Array) -> Array:
        """What the network gives in the type in which it computes, in float32."""
        if self.compute == "float32":
            return self.network(params, x)
        params, x = jax.tree.map(lambda leaf: leaf.astype(self.compute), (params, x))
        return self.network(params, x).astype(jnp.float32)

    def evaluate(self, params: Params, rows: Any) -> tuple[float, float]:
        """The score of rows and their loss, see `score` and `cross_entropy`."""
        logits = np.asarray(_compiled_logits(self)(params, rows.x))
        return score(self, logits, rows.y), cross_entropy(logits, rows.y)


@functools.cache
def _compiled_logits(task: Task) -> Callable[[Params, Any], Array]:
    return jax.jit(lambda params, x: task.logits(params, task.inputs(x)))


@dataclasses.dataclass(frozen=True)
class ConvolutionalTask(Task):
    """Strided 3x3 convolutions with relu, and a dense layer, on CIFAR-10.

    **Arguments:**

    - `channels`: of the convolutions.
    """

    hidden: tuple[int, ...] = ()
    channels: tuple[int, ...] = (32, 64)

    @property
    def widths(self) -> tuple[int, ...]:
        return self.channels

    @property
    def in_loop(self) -> bool:
        # XLA on a CPU runs a convolution in a loop several times slower.
        return jax.default_backend() != "cpu"

    def init(self, num_features: int, num_classes: int, seed: int) -> Params:
        side = -(-round((num_features // 3) ** 0.5) // 2 ** len(self.channels))
        kernels = [(3, 3, *pair) for pair in itertools.pairwise((3, *self.channels))]
        shapes = [*kernels, (side * side * self.channels[-1], num_classes)]
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        he = jax.nn.initializers.he_normal()
        return {
            "w": [he(key, shape) for key, shape in zip(keys, shapes, strict=True)],
            "b": [jnp.zeros(shape[-1]) for shape in shapes],
        }

    def network(self, params: Params, x: Array) -> Array:
        side = round((x.shape[-1] // 3) ** 0.5)
        *layers, (last_weight, last_bias) = zip(params["w"], params["b"], strict=True)
        x = x.reshape(len(x), side, side, 3)
        for kernel, bias in layers:
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + bias)
        return x.reshape(len(x), -1) @ last_weight + last_bias


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
    """The next character at every position of windows of a text.

    **Arguments:**

    - `hidden`: the width of embedding and state.
    - `model`: which of `benchmarks.text_models`.
    - `context`: the length of the windows.
    - `batches`: how many, in the place of `epochs`.
    - `blocks`: of the transformer.
    """

    hidden: tuple[int, ...] = (64,)
    batch_size: int = 64
    model: Literal["rnn", "transformer"] = "rnn"
    context: int = 32
    batches: int = 400
    blocks: int = dataclasses.field(default=1, metadata=LATER)

    @property
    def label(self) -> str:
        blocks = f"-{self.blocks}-blocks" if self.blocks > 1 else ""
        return f"{self.dataset}-{self.model}{blocks}"

    def load(self, data_dir: str | None) -> Windows:
        return load_windows(self.dataset, data_dir, self.context)

    def num_batches(self, per_epoch: int) -> int:
        return self.batches

    def inputs(self, x: Array) -> Array:
        return x.astype(jnp.int32)

    def _network(self, symbols: int) -> Recurrent | Transformer:
        if self.model == "rnn":
            return Recurrent(symbols, self.context, *self.hidden)
        return Transformer(symbols, self.context, *self.hidden, blocks=self.blocks)

    def init(self, num_features: int, num_classes: int, seed: int) -> Params:
        return self._network(num_classes).init(jax.random.key(seed))

    def network(self, params: Params, x: Array) -> Array:
        return self._network(params["bias"].size).network(params, x)


@dataclasses.dataclass(frozen=True)
class LossTask(Task):
    """A loss that is no classification's; it is the score itself, so smaller is better.

    **Arguments:**

    - `hidden`: the widths of the hidden layers.
    - `model`: which of `benchmarks.loss_models`.
    - `batches`: how many, in the place of `epochs`.
    """

    hidden: tuple[int, ...] = (64,)
    batch_size: int = 64
    model: Literal["vae", "ppo", "poisson"] = "vae"
    batches: int = 400

    @property
    def label(self) -> str:
        return f"{self.dataset}-{self.model}"

    @property
    def _model(self) -> LossModel:
        return {"vae": Autoencoder, "ppo": ActorCritic, "poisson": Poisson}[self.model](self.hidden)

    def load(self, data_dir: str | None) -> Any:
        return self._model.load(data_dir)

    def num_batches(self, per_epoch: int) -> int:
        return self.batches

    def init(self, num_features: int, num_classes: int, seed: int) -> Params:
        return self._model.init(jax.random.key(seed))

    def batch(self, x: Array, y: Any, num_classes: int, key: Array) -> Batch:
        return self._model.batch(x, y, key)

    def loss(self, kind: Kind) -> Loss:
        """The same words for all methods."""
        return self._model.loss

    def evaluate(self, params: Params, rows: Any) -> tuple[float, float]:
        """The loss of all rows as one batch, twice; infinite if it is not finite."""
        # Training's noise comes from the key 0.
        value = float(_compiled_loss(self)(params, rows.x, rows.y, jax.random.key(1)))
        value = value if np.isfinite(value) else float("inf")
        return value, value


@functools.cache
def _compiled_loss(task: LossTask) -> Callable[..., Array]:
    loss = task.loss("gradient")
    return jax.jit(lambda params, x, y, key: loss(params, task.batch(x, y, 0, key)))


@dataclasses.dataclass(frozen=True)
class Bound:
    """What is asked of a method, most often beside a tuned baseline.

    **Arguments:**

    - `form`: `"error"`: the paired mean is not worse than the baseline's by more than one standard
      error; `"within"`: by more than `amount`; `"above"`: it is better by `amount` or more, so with
      0 at least as good; `"at least"`: the mean itself is at least `amount`; `"ratio"`: at most
      `amount` times the baseline's batches; `"fewer"`: fewer batches than the baseline.
    - `amount`: a fraction (0.002 is 0.2 points), or a factor.
    - `beside`: the name of the baseline.
    """

    form: Literal["error", "within", "above", "at least", "ratio", "fewer"]
    amount: float = 0.0
    beside: str = "adam"

    def describe(self, percent: bool, smaller: bool = False) -> str:
        """In a few words; `smaller`: smaller results are better."""
        amount = f"{self.amount:g}"
        points = f"{100 * self.amount:g} points" if percent else amount
        name = self.beside.capitalize()
        of = "" if self.beside == "adam" else f" of {name}"
        match self.form:
            case "error":
                return f"within 1 SE{of}"
            case "within":
                return f"within {points}{of}"
            case "above":
                further = f" {'−' if smaller else '+'} {points}" if self.amount else ""
                return f"{'≤' if smaller else '≥'} {name}{further}"
            case "at least":
                return f"≥ {100 * self.amount:g} %" if percent else f"≥ {amount}"
            case "ratio":
                return f"≤ {amount} × {name}"
            case "fewer":
                return f"< {name}"

    @property
    def paired(self) -> bool:
        """Whether it needs the baseline's runs."""
        return self.form != "at least"

    def holds(self, mean: float, baseline: float, difference: float, error: float) -> bool:
        """Whether it holds. NaN never holds.

        **Arguments:**

        - `mean`, `baseline`: results, of the method and of the baseline.
        - `difference`, `error`: how much better the method is, and the standard error; paired.
        """
        match self.form:
            case "error":
                return difference >= -error
            case "within":
                return difference >= -self.amount
            case "above":
                return difference >= self.amount
            case "at least":
                return mean >= self.amount
            case "ratio":
                return mean <= self.amount * baseline
            case "fewer":
                return mean < baseline


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison for each method.

    **Arguments:**

    - `name`, `task`: how it is called and what is trained.
    - `optax`, `pure`: all that is asked of methods of these kinds.
    - `reach`: the result is the number of batches until validation reaches this accuracy; 0: it is
      the score at the end.
    - `smaller`: smaller scores are better.
    - `part`: on which rows that is measured.
    - `reflecting_only`: pure methods that reflect, and no others; Adam is not needed.
    - `note`: what the reader must know.
    """

    name: str
    task: Task
    optax: tuple[Bound, ...] = ()
    pure: tuple[Bound, ...] = ()
    reach: float = 0.0
    smaller: bool = False
    part: Literal["test", "validation"] = "test"
    reflecting_only: bool = False
    note: str = ""

    def bounds(self, kind: Kind) -> tuple[Bound, ...]:
        return {"gradient": (), "optax": self.optax, "pure": self.pure}[kind]

    @property
    def sign(self) -> int:
        """1 if larger results are better, −1 if smaller ones are."""
        return -1 if self.smaller or self.reach else 1


#: Not worse than tuned Adam by more than one standard error; at least as good as tuned Adam; and
#: as tuned Muon.
_ERROR, _ADAM, _MUON = Bound("error"), Bound("above"), Bound("above", beside="muon")


def _within(amount: float) -> tuple[Bound, ...]:
    return (Bound("within", amount),)


def _rows() -> list[Row]:
    """All rows; `optax` bounds are of Adam on displacements."""
    return [
        *_image_rows(),
        *_short_rows(),
        *_variation_rows(),
        *_text_rows(),
        *_loss_rows(),
        Row(
            "mnist-1x128-reflecting",
            Task("mnist", epochs=2),
            pure=(Bound("at least", 0.96),),
            reflecting_only=True,
        ),
    ]


def _image_rows() -> list[Row]:
    """Perceptrons on MNIST and HIGGS and convolutions on CIFAR-10."""
    wide = Task("mnist", measure_every=10)
    rows = [
        Row("mnist-1x128", wide, (_ERROR,), (_ERROR,)),
        Row("mnist-1x128-97", wide, (Bound("ratio", 1.05),), (Bound("ratio", 0.6),), reach=0.97),
    ]
    for name, skip in (("mnist-4x128", False), ("mnist-4x128-skip", True)):
        rows.append(Row(name, Task("mnist", 4 * (128,), skip), _within(0.002), (_ERROR,)))
    narrow = Task("mnist", 4 * (128,), compute="bfloat16")
    rows.append(Row("mnist-4x128-bfloat16", narrow, _within(0.002), (_ERROR,)))
    for depth in (12, 20):
        task = Task("mnist", depth * (128,), epochs=2)
        rows.append(Row(f"mnist-{depth}x128", task, _within(0.005), (_ERROR,)))
    higgs = Task("higgs", (128, 128), epochs=20)
    rows.append(Row("higgs", higgs, (_ERROR,), (_ERROR,), note="test AUC"))
    convolutional = ConvolutionalTask("cifar10", epochs=3)
    asked = _ERROR, Bound("at least", 0.653), _MUON
    note = "channels standardised"
    rows.append(Row("cifar10-cnn", convolutional, _within(0.005), asked, note=note))
    return rows


def _short_rows() -> list[Row]:
    """How far a few epochs of MNIST go, on pixels from 0 to 1 and on standardised ones."""
    rows = []
    for depth, standardise in itertools.product((1, 4, 12), (False, True)):
        # An epoch has 195 batches of 256.
        task = Task("mnist", depth * (128,), epochs=1, standardise=standardise)
        name = f"mnist-{depth}x128-1-epoch" + standardise * "-standardised"
        asked = Bound("above", 0.005), Bound("error", beside="muon")
        rows.append(Row(name, task, pure=asked))
    for depth, epochs in itertools.product((1, 4), (5, 10)):
        task = Task("mnist", depth * (128,), epochs=epochs, standardise=True)
        name = f"mnist-{depth}x128-{epochs}-epochs-standardised"
        rows.append(Row(name, task, pure=(_ADAM, Bound("within", 0.001, beside="muon"))))
    return rows


def _variation_rows() -> list[Row]:
    """Other sizes of batches and scales of inputs."""
    rows = []
    for dataset, epochs in (("digits", 20), ("mnist", 2)):
        plain = Task(dataset, epochs=epochs)
        whole = "full batch: 1,077 rows" if dataset == "digits" else ""
        for name, task, note in (
            ("batch-32", dataclasses.replace(plain, batch_size=32), ""),
            ("batch-2048", dataclasses.replace(plain, batch_size=2048), whole),
            ("times-0.01", dataclasses.replace(plain, scale=0.01), ""),
            ("times-100", dataclasses.replace(plain, scale=100.0), ""),
        ):
            rows.append(Row(f"{dataset}-{name}", task, _within(0.005), (_ERROR,), note=note))
    return rows


def _text_rows() -> list[Row]:
    """The next character, after 400 batches."""
    recurrent = TextTask("tinyshakespeare", measure_every=100)
    attention = dataclasses.replace(recurrent, model="transformer", batch_size=32)
    rows = []
    for name, task, asked in (
        ("rnn", recurrent, (Bound("above", 0.02), _MUON)),
        ("transformer", attention, (_ADAM,)),
        ("transformer-2-blocks", dataclasses.replace(attention, blocks=2), (_ADAM,)),
    ):
        name, half = f"shakespeare-{name}", _within(0.005)
        rows.append(Row(name, task, half, asked, part="validation", note="validation rows"))
        rows.append(Row(f"{name}-test", task, half, asked))
    return rows


def _loss_rows() -> list[Row]:
    """Losses that are no classification's."""
    rows = []
    for name, task, note in (
        (
            "digits-vae",
            LossTask("digits", measure_every=100),
            "loss of validation rows, a squared error and a divergence",
        ),
        (
            "ppo",
            LossTask("rollouts", (64, 64), batch_size=256, model="ppo", measure_every=100),
            "loss of validation rows; one fixed set of synthetic rollouts, no environment and no "
            "new ones",
        ),
        (
            "poisson",
            LossTask("points", (32, 32), batch_size=128, model="poisson", measure_every=100),
            "loss of validation points",
        ),
    ):
        row = Row(name, task, (_ERROR,), (_ADAM,), smaller=True, part="validation", note=note)
        rows.append(row)
    return rows


#: Every row of the table, by name.
ROWS: dict[str, Row] = {row.name: row for row in _rows()}


@functools.cache
def load(name: str, data_dir: str | None) -> data.Dataset:
    """The data set as the rows of the table have it.

    MNIST's validation rows are the last 10,000 of the 60,000, CIFAR-10's channels are standardised,
    and HIGGS is the sample.
    """
    if name == "cifar10":
        return data.load(name, data_dir).standardised()
    dataset = data.load("higgs-sample" if name == "higgs" else name, data_dir)
    if name != "mnist":
        return dataset
    # `data.load` permutes the training rows; the permutation that it draws is undone here.
    order = np.random.default_rng(0).permutation(len(dataset.train) + len(dataset.validation))
    rows = {
        field: np.concatenate([getattr(dataset.validation, field), getattr(dataset.train, field)])
        for field in ("x", "y")
    }
    back = np.argsort(order)
    cut = len(dataset.train)
    train, validation = (
        data.Split(rows["x"][part], rows["y"][part]) for part in (back[:cut], back[cut:])
    )
    return dataclasses.replace(dataset, train=train, validation=validation)


class Examples(NamedTuple):
    """Windows of tokens, and the token behind each of theirs."""

    x: UInt8[np.ndarray, "rows context"]
    y: UInt8[np.ndarray, "rows context"]

    @classmethod
    def of(cls, windows: np.ndarray) -> Examples:
        tokens = windows.astype(np.uint8)
        return cls(tokens[:, :-1], tokens[:, 1:])


class Windows(NamedTuple):
    """A text as rows: all windows of the training part, those side by side of the others."""

    train: Examples
    validation: Examples
    test: Examples
    num_features: int
    num_classes: int


@functools.cache
def load_windows(name: str, data_dir: str | None, context: int) -> Windows:
    """The windows of a text; of validation and test, each character is predicted once."""
    text = data.load_text(name, data_dir)
    train = Examples.of(text.windows("train", context + 1))
    validation = Examples.of(text.windows("validation", context + 1, stride=context))
    test = Examples.of(text.windows("test", context + 1, stride=context))
    return Windows(train, validation, test, context, len(text.vocabulary))


def score(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """The accuracy, or the AUC; outputs that are not finite count as wrong (an AUC of 0.5)."""
    finite = np.isfinite(logits).all(axis=-1)
    if not task.uses_auc:
        return float(np.mean((np.argmax(logits, axis=-1) == labels) & finite))
    from sklearn.metrics import roc_auc_score

    if not finite.all():
        return 0.5
    return float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy, infinite for outputs that are not finite; it breaks ties in tuning."""
    if not np.isfinite(logits).all():
        return float("inf")
    rows: Any = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return float(jnp.mean(rows))
