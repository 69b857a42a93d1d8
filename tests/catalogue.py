"""The layers of Flax NNX and of Equinox, each as a small network whose input can move.

A *case* is one way to use a public layer: its name, and a function that makes `(params, forward,
x)`. `forward(params, x + shift)` is the layer's output, any pytree of arrays; `shift`, which can
move, is what stands before the layer in a network. What the libraries export is found by looking:
a layer that has no case fails the test of the catalogue.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.linen import pooling
from flax.nnx.nn import activations, attention

FLAX, EQUINOX = "flax.nnx", "equinox.nn"
ROWS = 3  # of a batch


@dataclass(frozen=True)
class Case:
    """A way to use a layer; `make()` gives its parameters, its forward pass and a batch."""

    library: str
    layer: str
    variant: str
    make: Callable[[], tuple[Any, Callable[[Any, Any], Any], np.ndarray]]
    slow: bool = False

    def __str__(self) -> str:
        variant = f"-{self.variant.replace(' ', '_')}" if self.variant else ""
        return f"{self.library.partition('.')[0]}-{self.layer}{variant}"


#: Public names that compute nothing from an array of numbers, and why.
NO_FORWARD_PASS = {
    FLAX: {
        "Module": "a base class",
        "RNNCellBase": "a base class",
        "Dict": "a container",
        "List": "a container",
        "combine_masks": "of masks, which are data",
        "make_attention_mask": "of masks, which are data",
        "make_causal_mask": "of a shape",
        "one_hot": "of integers, which are data",
    },
    EQUINOX: {
        "State": "a container",
        "StateIndex": "a container",
        "StatefulLayer": "a base class",
        "delete_init_state": "of layers",
        "inference_mode": "of layers",
        "make_with_state": "of layers",
    },
}

#: Layers that have no graph of constraints, and why.
NOT_SUPPORTED: dict[str, dict[str, str]] = {FLAX: {}, EQUINOX: {}}


def exported(library: str) -> set[str]:
    """The public names of layers and of functions of layers, as the installed library has them."""
    if library == EQUINOX:
        return {name for name in dir(eqx.nn) if not name.startswith("_")}
    modules = {
        name
        for name in dir(nnx)
        if inspect.isclass(getattr(nnx, name)) and issubclass(getattr(nnx, name), nnx.Module)
    }
    functions = {
        name
        for name in dir(nnx)
        if getattr(getattr(nnx, name), "__module__", "") in (pooling.__name__, attention.__name__)
        and inspect.isfunction(getattr(nnx, name))
    }
    return modules | functions | (set(activations.__all__) & set(dir(nnx)))


def batch(*shape: int) -> np.ndarray:
    """Numbers of which no two are equal, and none is near a kink."""
    size = int(np.prod((ROWS, *shape)))
    grid = (np.arange(size) + 0.5) * (3.0 / size) - 1.5
    return np.random.default_rng(0).permutation(grid).reshape(ROWS, *shape).astype(np.float32)


def _filled(shapes: Any, numbers: Callable[[int, tuple[int, ...]], np.ndarray]) -> Any:
    """Values for a tree of shapes; to run the initialisers would take longer than the tests."""
    count = itertools.count()

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(next(count))
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(numbers(next(count), leaf.shape), leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, shapes)


def _parameters(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.3, 1.0, shape) * np.where(
        np.random.default_rng(seed + 1).random(shape) < 0.3, -1, 1
    )


def _statistics(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape)


def _flax(
    layer: str,
    make: Callable[[nnx.Rngs], Any],
    *shape: int,
    call: Callable[..., Any] = lambda module, x: module(x),
    variant: str = "",
    x: Any = None,
    slow: bool = False,
) -> Case:
    def build() -> Any:
        definitions = []

        def split() -> Any:
            definition, *states = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
            definitions.append(definition)
            return states

        params, rest = jax.eval_shape(split)
        params, rest = _filled(params, _parameters), _filled(rest, _statistics)
        (definition,) = definitions

        def forward(params: Any, x: Any) -> Any:
            return call(nnx.merge(definition, params, rest, copy=True), x)

        return params, forward, batch(*shape) if x is None else x

    return Case(FLAX, layer, variant, build, slow)


def _flax_function(
    name: str, *shape: int, call: Callable[..., Any] = lambda f, x: f(x), variant: str = ""
) -> Case:
    def build() -> Any:
        return {}, lambda params, x: call(getattr(nnx, name), x), batch(*shape)

    return Case(FLAX, name, variant, build)


def _cell(module: Any, x: Any) -> Any:
    """A step of a recurrent cell from a state that depends on parameters, as in a sequence."""
    carry = module.initialize_carry(x.shape, nnx.Rngs(1))
    return module(jax.tree.map(lambda zeros: zeros + 0.5 * x, carry), x)


def _masked(module: Any, x: Any) -> Any:
    return module(x, mask=nnx.make_causal_mask(jnp.ones(x.shape[:2])), decode=False)


def _masked_kernel(module: Any, x: Any) -> Any:
    module.mask = nnx.data(jnp.tri(2)[:, :, None] * jnp.ones(3))
    return module(x)


def _wrapped(wrapper: Any, **options: Any) -> Callable[[nnx.Rngs], Any]:
    return lambda r: wrapper(nnx.Linear(4, 3, rngs=r), rngs=r, **options)


def flax_cases() -> Iterator[Case]:
    tokens = np.array([[0, 2, 2], [1, 0, 4], [2, 3, 0]])
    # Dense layers, convolutions, embeddings.
    yield _flax("Linear", lambda r: nnx.Linear(4, 3, rngs=r), 4)
    yield _flax(
        "LinearGeneral", lambda r: nnx.LinearGeneral((2, 3), (3, 2), axis=(1, 2), rngs=r), 2, 3
    )
    yield _flax(
        "LinearGeneral",
        lambda r: nnx.LinearGeneral(4, 3, axis=-1, batch_axis={0: ROWS}, rngs=r),
        2, 4, variant="batch axis",
    )  # fmt: skip
    yield _flax("Einsum", lambda r: nnx.Einsum("nta,abc->ntbc", (4, 2, 3), (2, 3), rngs=r), 2, 4)
    yield _flax("Embed", lambda r: nnx.Embed(5, 3, rngs=r), x=tokens)
    yield _flax(
        "Embed", lambda r: nnx.Embed(5, 3, rngs=r), 3, variant="attend",
        call=lambda m, x: m.attend(x) + m(tokens[:, 0]) @ jnp.ones((3, 5)),
    )  # fmt: skip
    yield _flax("Conv", lambda r: nnx.Conv(2, 3, (2, 3), rngs=r), 4, 5, 2)
    yield _flax(
        "Conv",
        lambda r: nnx.Conv(2, 4, 3, 2, padding="CIRCULAR", feature_group_count=2, rngs=r),
        6, 2, variant="circular groups strides",
    )  # fmt: skip
    yield _flax(
        "Conv",
        lambda r: nnx.Conv(2, 3, (2, 2, 2), kernel_dilation=2, rngs=r),
        3, 3, 3, 2, variant="3d dilated",
    )  # fmt: skip
    yield _flax(
        "Conv",
        lambda r: nnx.Conv(2, 3, (2,), rngs=r), 4, 2, call=_masked_kernel, variant="masked",
    )  # fmt: skip
    yield _flax(
        "ConvTranspose", lambda r: nnx.ConvTranspose(2, 3, (3, 3), strides=(2, 2), rngs=r), 3, 3, 2
    )
    yield _flax(
        "ConvTranspose",
        lambda r: nnx.ConvTranspose(
            2, 3, (3,), strides=2, padding="CIRCULAR", transpose_kernel=True, rngs=r
        ),
        4, 2, variant="circular transposed",
    )  # fmt: skip
    yield _flax("PReLU", lambda r: nnx.PReLU(0.1), 4)
    yield _flax(
        "LoRA",
        lambda r: nnx.LoRA(4, 2, 3, base_module=nnx.Linear(4, 3, rngs=r), rngs=r), 4,
    )  # fmt: skip
    yield _flax("LoRALinear", lambda r: nnx.LoRALinear(4, 3, lora_rank=2, rngs=r), 4)
    yield _flax(
        "Sequential",
        lambda r: nnx.Sequential(nnx.Linear(4, 5, rngs=r), nnx.relu, nnx.Linear(5, 3, rngs=r)), 4,
    )  # fmt: skip
    # Norms.
    yield _flax("BatchNorm", lambda r: nnx.BatchNorm(4, rngs=r), 4, variant="training")
    yield _flax(
        "BatchNorm", lambda r: nnx.BatchNorm(2, rngs=r), 3, 3, 2, variant="training of images"
    )
    yield _flax(
        "BatchNorm", lambda r: nnx.BatchNorm(4, use_running_average=True, rngs=r), 4,
        variant="evaluation",
    )  # fmt: skip
    yield _flax("LayerNorm", lambda r: nnx.LayerNorm(4, rngs=r), 4)
    yield _flax(
        "LayerNorm", lambda r: nnx.LayerNorm(4, use_fast_variance=False, rngs=r), 2, 4,
        variant="slow variance",
    )  # fmt: skip
    yield _flax(
        "LayerNorm", lambda r: nnx.LayerNorm(4, use_scale=False, use_bias=False, rngs=r), 4,
        variant="without parameters",
    )  # fmt: skip
    yield _flax("RMSNorm", lambda r: nnx.RMSNorm(4, rngs=r), 4)
    yield _flax("GroupNorm", lambda r: nnx.GroupNorm(4, 2, rngs=r), 2, 2, 4)
    yield _flax("InstanceNorm", lambda r: nnx.InstanceNorm(2, rngs=r), 3, 3, 2)
    for training in (True, False):
        yield _flax(
            "SpectralNorm", _wrapped(nnx.SpectralNorm), 4,
            call=lambda m, x, training=training: m(x, update_stats=training),
            variant="training" if training else "evaluation",
        )  # fmt: skip
    yield _flax("WeightNorm", _wrapped(nnx.WeightNorm), 4)
    # Dropout.
    yield _flax("Dropout", lambda r: nnx.Dropout(0.4, rngs=r), 6, variant="training")
    yield _flax("Dropout", lambda r: nnx.Dropout(0.4, deterministic=True), 6, variant="evaluation")

    # Attention.
    def attend(r: nnx.Rngs, **options: Any) -> Any:
        return nnx.MultiHeadAttention(2, 4, decode=False, rngs=r, **options)

    yield _flax("MultiHeadAttention", attend, 3, 4)
    yield _flax("MultiHeadAttention", attend, 3, 4, call=_masked, variant="causal mask", slow=True)
    # Heads of four features: a norm of two is nearly a sign, and its float32 gradient rounding.
    yield _flax(
        "MultiHeadAttention",
        lambda r: attend(r, qkv_features=8, dropout_rate=0.3, normalize_qk=True), 3, 4,
        call=lambda m, x: m(x, deterministic=False), slow=True,
        variant="dropout and normalised",
    )  # fmt: skip
    yield _flax(
        "MultiHeadAttention", attend, 3, 4, call=lambda m, x: m(x, x[:, :2], x[:, 1:]),
        variant="crossed", slow=True,
    )  # fmt: skip

    def decode(module: Any, x: Any) -> Any:
        module.init_cache(x.shape, x.dtype)
        return [module(x[:, t : t + 1], decode=True) for t in range(x.shape[1])]

    yield _flax("MultiHeadAttention", attend, 2, 4, call=decode, variant="decoding", slow=True)
    yield _flax_function("dot_product_attention", 3, 2, 4, call=lambda f, x: f(x, x + 1, x - 1))
    rope: Any = getattr(nnx, "RoPE", None)  # from Flax 0.12.9 on
    if rope is not None:
        yield _flax("RoPE", lambda r: rope(), 3, 4)
        yield _flax_function(
            "dot_product_attention_with_rope", 3, 2, 4,
            call=lambda f, x: f(x, x + 1, x - 1, rope=rope()),
        )  # fmt: skip
    # Recurrence.
    for name in ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"):
        cell = getattr(nnx, name)
        yield _flax(name, lambda r, cell=cell: cell(4, 4, rngs=r), 4, call=_cell)

    def rnn(r: nnx.Rngs, **options: Any) -> Any:
        return nnx.RNN(nnx.SimpleCell(3, 4, rngs=r), rngs=r, **options)

    yield _flax("RNN", lambda r: rnn(r), 3, 3)
    yield _flax(
        "RNN", lambda r: rnn(r, return_carry=True, reverse=True, keep_order=True), 3, 3,
        call=lambda m, x: m(x, seq_lengths=jnp.array([3, 1, 2])), variant="reversed lengths",
        slow=True,
    )  # fmt: skip
    yield _flax("Bidirectional", lambda r: nnx.Bidirectional(rnn(r), rnn(r), rngs=r), 2, 3)
    # Functions.
    for name in activations.__all__:
        if name not in ("PReLU", "one_hot"):
            yield _flax_function(name, 6)
    yield _flax_function("gelu", 6, call=lambda f, x: f(x, approximate=False), variant="exact")
    for name in ("avg_pool", "max_pool", "min_pool"):
        yield _flax_function(
            name, 4, 4, 2, call=lambda f, x: f(x, (2, 2), strides=(2, 2), padding="SAME")
        )
        yield _flax_function(
            name, 5, 2, call=lambda f, x: f(x, (3,), strides=(1,)), variant="overlapping"
        )
    yield _flax_function(
        "avg_pool", 4, 2, variant="without padding in the mean",
        call=lambda f, x: f(x, (3,), (2,), "SAME", count_include_pad=False),
    )  # fmt: skip
    yield _flax_function(
        "pool", 4, 2, call=lambda f, x: f(x, 0.0, jax.lax.add, (2,), (2,), "VALID")
    )


def _equinox(
    layer: str,
    make: Callable[[Any], Any],
    *shape: int,
    call: Callable[..., Any] = lambda layer, x: jax.vmap(layer)(x),
    variant: str = "",
    x: Any = None,
    slow: bool = False,
) -> Case:
    def build() -> Any:
        layer = _filled(eqx.filter_eval_shape(make, jax.random.key(0)), _parameters)
        params, static = eqx.partition(layer, eqx.is_inexact_array)

        def forward(params: Any, x: Any) -> Any:
            return call(eqx.combine(params, static), x)

        return params, forward, batch(*shape) if x is None else x

    return Case(EQUINOX, layer, variant, build, slow)


def _stateful(
    layer: str,
    make: Callable[[Any], Any],
    *shape: int,
    variant: str = "",
    inference: bool = False,
) -> Case:
    """A layer with a state, which the batch before it has filled."""

    def build() -> Any:
        shapes, state = eqx.filter_eval_shape(eqx.nn.make_with_state(make), jax.random.key(0))
        module, state = _filled(shapes, _parameters), _filled(state, _statistics)
        params, static = eqx.partition(module, eqx.is_inexact_array)

        def forward(params: Any, x: Any) -> Any:
            module = eqx.nn.inference_mode(eqx.combine(params, static), inference)
            run = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            return run(x, state)[0]

        return params, forward, batch(*shape)

    return Case(EQUINOX, layer, variant, build)


def equinox_cases() -> Iterator[Case]:
    nn = eqx.nn
    tokens = np.array([0, 2, 2])
    yield _equinox("Linear", lambda k: nn.Linear(4, 3, key=k), 4)
    yield _equinox("Linear", lambda k: nn.Linear("scalar", 3, key=k), variant="scalar")
    yield _equinox("Identity", lambda k: nn.Identity(), 4)
    yield _equinox("MLP", lambda k: nn.MLP(4, 3, 5, 2, activation=jax.nn.tanh, key=k), 4)
    yield _equinox("Lambda", lambda k: nn.Lambda(jnp.sin), 4)
    yield _equinox(
        "Sequential",
        lambda k: nn.Sequential([nn.Linear(4, 5, key=k), nn.Lambda(jax.nn.relu), nn.LayerNorm(5)]),
        4,
    )  # fmt: skip
    yield _equinox("PReLU", lambda k: nn.PReLU(0.2), 4)
    yield _equinox("Embedding", lambda k: nn.Embedding(5, 3, key=k), x=tokens)

    def tied(k: Any) -> Any:
        pair = nn.Embedding(5, 3, key=k), nn.Linear(3, 5, key=k)
        return nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def use_tied(shared: Any, x: Any) -> Any:
        embedding, linear = shared()
        return jax.vmap(linear)(jax.vmap(embedding)(tokens) + x)

    yield _equinox("Shared", tied, 3, call=use_tied)
    # Convolutions and pooling.
    for dims in (1, 2, 3):
        shape = (2, *(4,) * dims)
        conv, transpose = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        yield _equinox(
            f"Conv{dims}d",
            lambda k, conv=conv: conv(2, 3, 2, stride=2, padding=1, key=k), *shape,
        )  # fmt: skip
        yield _equinox(
            f"ConvTranspose{dims}d",
            lambda k, conv=transpose: conv(2, 3, 2, stride=2, key=k), 2, *(3,) * dims,
        )  # fmt: skip
        for kind in ("Avg", "Max"):
            pool = getattr(nn, f"{kind}Pool{dims}d")
            adaptive = getattr(nn, f"Adaptive{kind}Pool{dims}d")
            yield _equinox(f"{kind}Pool{dims}d", lambda k, pool=pool: pool(2, 2), *shape)
            to = {1: 2, 2: (2, 2), 3: (2, 2, 1)}[dims]
            yield _equinox(
                f"Adaptive{kind}Pool{dims}d",
                lambda k, pool=adaptive, to=to: pool(to),
                2, *(3,) * dims,
            )  # fmt: skip
    yield _equinox(
        "AvgPool2d", lambda k: nn.AvgPool2d(3, 1, padding=1, use_ceil=True), 2, 3, 3,
        variant="overlapping and padded",
    )  # fmt: skip
    yield _equinox(
        "MaxPool2d", lambda k: nn.MaxPool2d(2, 1, padding=1), 2, 3, 3,
        variant="overlapping and padded",
    )  # fmt: skip
    yield _equinox("Pool", lambda k: nn.Pool(0.0, jax.lax.add, 1, 2, 1), 2, 4)
    yield _equinox("AdaptivePool", lambda k: nn.AdaptivePool(2, 1, jnp.max), 2, 5)
    yield _equinox(
        "Conv", lambda k: nn.Conv(1, 4, 4, 2, dilation=2, groups=2, padding_mode="REFLECT",
                                  padding=1, key=k), 4, 5,
    )  # fmt: skip
    yield _equinox(
        "ConvTranspose", lambda k: nn.ConvTranspose(1, 4, 4, 3, 2, output_padding=1, groups=2,
                                                    key=k), 4, 3,
    )  # fmt: skip
    # Norms.
    yield _equinox("LayerNorm", lambda k: nn.LayerNorm(4), 4)
    yield _equinox("RMSNorm", lambda k: nn.RMSNorm(4), 4)
    yield _equinox("GroupNorm", lambda k: nn.GroupNorm(2, 4), 4, 3)
    for mode in ("batch", "ema"):
        for inference in (False, True):
            yield _stateful(
                "BatchNorm",
                lambda k, mode=mode: nn.BatchNorm(4, "batch", mode=mode, momentum=0.5), 4,
                inference=inference,
                variant=f"{mode} {'evaluation' if inference else 'training'}",
            )  # fmt: skip
    for inference in (False, True):
        yield _stateful(
            "SpectralNorm",
            lambda k: nn.SpectralNorm(nn.Linear(4, 3, key=k), "weight", key=k), 4,
            inference=inference, variant="evaluation" if inference else "training",
        )  # fmt: skip
    yield _equinox("WeightNorm", lambda k: nn.WeightNorm(nn.Linear(4, 3, key=k)), 4)
    # Dropout.
    yield _equinox(
        "Dropout", lambda k: nn.Dropout(0.4), 6, variant="training",
        call=lambda layer, x: layer(x, key=jax.random.key(3)),
    )  # fmt: skip
    yield _equinox("Dropout", lambda k: nn.Dropout(0.4, inference=True), 6, variant="evaluation")
    # Attention.
    yield _equinox(
        "MultiheadAttention", lambda k: nn.MultiheadAttention(2, 4, key=k), 3, 4,
        call=lambda layer, x: jax.vmap(layer)(x, x, x),
    )  # fmt: skip
    yield _equinox(
        "MultiheadAttention",
        lambda k: nn.MultiheadAttention(2, 4, use_query_bias=True, dropout_p=0.3, key=k), 3, 4,
        call=lambda layer, x: jax.vmap(
            lambda row: layer(row, row, row, mask=jnp.tri(3, dtype=bool), key=jax.random.key(1))
        )(x),
        variant="causal mask and dropout", slow=True,
    )  # fmt: skip
    yield _equinox("RotaryPositionalEmbedding", lambda k: nn.RotaryPositionalEmbedding(4), 3, 4)

    # Recurrence.
    def step(cell: Any, x: Any) -> Any:
        lstm = isinstance(cell, nn.LSTMCell)
        return jax.vmap(lambda row: cell(row, (0.5 * row, -row) if lstm else 0.5 * row))(x)

    yield _equinox("GRUCell", lambda k: nn.GRUCell(4, 4, key=k), 4, call=step)
    yield _equinox("LSTMCell", lambda k: nn.LSTMCell(4, 4, key=k), 4, call=step)


CASES = [*flax_cases(), *equinox_cases()]
