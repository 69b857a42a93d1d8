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
from benchmarks.text_models import Recurrent, Transformer
from pjax.lab import data

#: A pytree of arrays.
Params = Any
Kind = Literal["gradient", "optax", "pure"]
#: `loss_fn(params, (x, one_hot))`, the mean cross-entropy of a batch.
Loss = Callable[[Params, tuple[Array, Array]], Array]


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
    """

    dataset: str
    hidden: tuple[int, ...] = (128,)
    skip: bool = False
    batch_size: int = 256
    epochs: int = 10
    scale: float = 1.0
    measure_every: int = 0
    compute: Literal["float32", "bfloat16"] = "float32"

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
        return x * self.scale

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
    """

    hidden: tuple[int, ...] = (64,)
    batch_size: int = 64
    model: Literal["rnn", "transformer"] = "rnn"
    context: int = 32
    batches: int = 400

    @property
    def label(self) -> str:
        return f"{self.dataset}-{self.model}"

    def load(self, data_dir: str | None) -> Windows:
        return load_windows(self.dataset, data_dir, self.context)

    def num_batches(self, per_epoch: int) -> int:
        return self.batches

    def inputs(self, x: Array) -> Array:
        return x.astype(jnp.int32)

    def _network(self, symbols: int) -> Recurrent | Transformer:
        kind = {"rnn": Recurrent, "transformer": Transformer}[self.model]
        return kind(symbols, self.context, *self.hidden)

    def init(self, num_features: int, num_classes: int, seed: int) -> Params:
        return self._network(num_classes).init(jax.random.key(seed))

    def network(self, params: Params, x: Array) -> Array:
        return self._network(params["bias"].size).network(params, x)


@dataclasses.dataclass(frozen=True)
class Bound:
    """What is asked of a method beside tuned Adam.

    **Arguments:**

    - `form`: `"error"`: the paired mean is not below Adam's by more than one standard error;
      `"within"`: by more than `amount`; `"at least"`: the mean itself is at least `amount`;
      `"ratio"`: at most `amount` times Adam's batches; `"fewer"`: fewer batches than Adam.
    - `amount`: a fraction (0.002 is 0.2 points), or a factor.
    """

    form: Literal["error", "within", "at least", "ratio", "fewer"]
    amount: float = 0.0

    def describe(self, percent: bool) -> str:
        amount = f"{self.amount:g}"
        match self.form:
            case "error":
                return "within 1 SE"
            case "within":
                return f"within {100 * self.amount:g} points" if percent else f"within {amount}"
            case "at least":
                return f"≥ {100 * self.amount:g} %" if percent else f"≥ {amount}"
            case "ratio":
                return f"≤ {amount} × Adam"
            case "fewer":
                return "< Adam"

    def holds(self, mean: float, baseline: float, difference: float, error: float) -> bool:
        """Whether it holds; `difference` and its standard `error` are paired. NaN never holds."""
        match self.form:
            case "error":
                return difference >= -error
            case "within":
                return difference >= -self.amount
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
    - `optax`, `pure`: what is asked of methods of these kinds.
    - `reach`: the result is the number of batches until validation reaches this accuracy; 0: it is
      the accuracy (AUC) at the end.
    - `part`: on which rows that is measured.
    - `reflecting_only`: pure methods that reflect, and no others; Adam is not needed.
    - `note`: what the reader must know.
    """

    name: str
    task: Task
    optax: Bound | None = None
    pure: Bound | None = None
    reach: float = 0.0
    part: Literal["test", "validation"] = "test"
    reflecting_only: bool = False
    note: str = ""

    def bound(self, kind: Kind) -> Bound | None:
        return {"gradient": None, "optax": self.optax, "pure": self.pure}[kind]


def _within(amount: float) -> Bound:
    return Bound("within", amount)


def _rows() -> list[Row]:
    wide = Task("mnist", measure_every=10)
    rows = [
        Row("mnist-1x128", wide, optax=Bound("error")),
        Row("mnist-1x128-97", wide, Bound("ratio", 1.05), Bound("fewer"), reach=0.97),
    ]
    for name, skip in (("mnist-4x128", False), ("mnist-4x128-skip", True)):
        rows.append(Row(name, Task("mnist", 4 * (128,), skip), _within(0.002), _within(0.003)))
    narrow = Task("mnist", 4 * (128,), compute="bfloat16")
    rows.append(Row("mnist-4x128-bfloat16", narrow, _within(0.002), _within(0.003)))
    for depth in (12, 20):
        task = Task("mnist", depth * (128,), epochs=2)
        rows.append(Row(f"mnist-{depth}x128", task, _within(0.005), _within(0.01)))
    higgs = Task("higgs", (128, 128), epochs=20)
    rows.append(Row("higgs", higgs, Bound("error"), _within(0.01), note="test AUC"))
    for dataset, epochs in (("digits", 20), ("mnist", 2)):
        plain = Task(dataset, epochs=epochs)
        whole = "full batch: 1,077 rows" if dataset == "digits" else ""
        for name, task, note in (
            ("batch-32", dataclasses.replace(plain, batch_size=32), ""),
            ("batch-2048", dataclasses.replace(plain, batch_size=2048), whole),
            ("times-0.01", dataclasses.replace(plain, scale=0.01), ""),
            ("times-100", dataclasses.replace(plain, scale=100.0), ""),
        ):
            half = _within(0.005)
            rows.append(Row(f"{dataset}-{name}", task, half, half, note=note))
    convolutional = ConvolutionalTask("cifar10", epochs=3)
    rows.append(Row("cifar10-cnn", convolutional, _within(0.005), note="channels standardised"))
    recurrent = TextTask("tinyshakespeare", measure_every=100)
    attention = dataclasses.replace(recurrent, model="transformer", batch_size=32)
    for task in (recurrent, attention):
        name, half = f"shakespeare-{task.model}", _within(0.005)
        rows.append(Row(name, task, half, part="validation", note="validation rows"))
        rows.append(Row(f"{name}-test", task, half))
    rows.append(
        Row(
            "mnist-1x128-reflecting",
            Task("mnist", epochs=2),
            pure=Bound("at least", 0.96),
            reflecting_only=True,
        )
    )
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
