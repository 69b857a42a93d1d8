"""Small networks and losses after public architectures, each in the way its users write it.

`MODELS` has for each name a function that returns `(loss, params)`; the batch is in the closure.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Model = tuple[Callable[[Any], jax.Array], Any]
MODELS: dict[str, Callable[[], Model]] = {}


def model(make: Callable[[], Model]) -> Callable[[], Model]:
    MODELS[make.__name__] = make
    return make


def normal(name: str, *shape: int, scale: float | None = None) -> jax.Array:
    """Numbers drawn for a name; a matrix in the scale of its rows."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    own = 1 / np.sqrt(shape[-2]) if len(shape) > 1 else 0.1
    return jnp.asarray((own if scale is None else scale) * rng.normal(size=shape))


def data(name: str, *shape: int) -> jax.Array:
    return normal(name, *shape, scale=1.0)


def labels(rows: int, classes: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows).integers(0, classes, rows))


def dense(name: str, inputs: int, outputs: int) -> dict[str, jax.Array]:
    return {"w": normal(name, inputs, outputs), "b": normal(name + "b", outputs)}


def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def mlp(name: str, *widths: int) -> list[dict[str, jax.Array]]:
    pairs = enumerate(itertools.pairwise(widths))
    return [dense(f"{name}{number}", a, b) for number, (a, b) in pairs]


def run(layers: list[dict[str, jax.Array]], x: jax.Array, activation: Any = jnp.tanh) -> jax.Array:
    for layer in layers[:-1]:
        x = activation(apply(layer, x))
    return apply(layers[-1], x)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def layer_norm(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    return normed * p["scale"] + p["bias"]


def norm_params(width: int) -> dict[str, jax.Array]:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


# --- Graphs ---------------------------------------------------------------------------------------


def adjacency(nodes: int) -> jax.Array:
    rng = np.random.default_rng(nodes)
    edges = np.triu(rng.random((nodes, nodes)) < 0.3, 1)
    return jnp.asarray((edges | edges.T | np.eye(nodes, dtype=bool)).astype(float))


@model
def graph_convolution():
    edges = adjacency(12)
    degree = jax.lax.rsqrt(edges.sum(1))
    smoothing = degree[:, None] * edges * degree
    x, y = data("x", 12, 5), labels(12, 3)

    def loss(p):
        h = jax.nn.relu(smoothing @ x @ p["first"])
        return cross_entropy(smoothing @ (h @ p["second"]), y)

    return loss, {"first": normal("a", 5, 8), "second": normal("b", 8, 3)}


@model
def graph_attention():
    edges, x, y = adjacency(10), data("x", 10, 5), labels(10, 3)

    def loss(p):
        h = x @ p["w"]
        scores = jax.nn.leaky_relu((h @ p["to"])[:, None] + (h @ p["from"])[None, :], 0.2)
        attention = jax.nn.softmax(jnp.where(edges > 0, scores, -1e9), -1)
        return cross_entropy(jax.nn.elu(attention @ h) @ p["out"], y)

    return loss, {"w": normal("w", 5, 6), "to": normal("t", 6), "from": normal("f", 6),
                  "out": normal("o", 6, 3)}  # fmt: skip


@model
def message_passing():
    """Messages of pairs, summed over neighbours, and a readout of the whole graph."""
    edges, x, y = adjacency(6), data("x", 4, 6, 3), labels(4, 2)

    def loss(p):
        h = apply(p["in"], x)
        left, right = h[:, :, None], h[:, None, :]
        shape = (*h.shape[:2], *h.shape[1:])
        pairs = jnp.concatenate([jnp.broadcast_to(left, shape), jnp.broadcast_to(right, shape)], -1)
        messages = run(p["message"], pairs, jax.nn.silu) * edges[:, :, None]
        h = run(p["update"], jnp.concatenate([h, messages.sum(2)], -1), jax.nn.silu)
        return cross_entropy(apply(p["out"], h.mean(1)), y)

    return loss, {"in": dense("i", 3, 4), "message": mlp("m", 8, 6, 4), "update": mlp("u", 8, 6, 4),
                  "out": dense("o", 4, 2)}  # fmt: skip


@model
def deep_set_with_maximum():
    x, y = data("x", 8, 7, 3), labels(8, 3)

    def loss(p):
        return cross_entropy(run(p["rho"], jnp.max(run(p["phi"], x, jax.nn.relu), axis=1)), y)

    return loss, {"phi": mlp("p", 3, 8, 6), "rho": mlp("r", 6, 6, 3)}


# --- Generative models ----------------------------------------------------------------------------


@model
def real_nvp():
    x = data("x", 16, 4)

    def loss(p):
        z, log_det = x, 0.0
        for number, coupling in enumerate(p):
            a, b = (z[:, :2], z[:, 2:]) if number % 2 == 0 else (z[:, 2:], z[:, :2])
            shift, log_scale = jnp.split(run(coupling, a), 2, -1)
            log_scale = jnp.tanh(log_scale)
            b = b * jnp.exp(log_scale) + shift
            log_det = log_det + log_scale.sum(-1)
            z = jnp.concatenate([a, b] if number % 2 == 0 else [b, a], -1)
        return jnp.mean(0.5 * jnp.sum(z**2, -1) - log_det)

    return loss, [mlp(f"c{number}", 2, 8, 4) for number in range(3)]


@model
def variational_autoencoder():
    x = jnp.asarray(np.random.default_rng(0).random((12, 6)) > 0.5).astype(float)
    noise = data("noise", 12, 2)

    def loss(p):
        mean, log_variance = jnp.split(run(p["encoder"], x, jax.nn.relu), 2, -1)
        z = mean + jnp.exp(0.5 * log_variance) * noise
        logits = run(p["decoder"], z, jax.nn.relu)
        reconstruction = optax.sigmoid_binary_cross_entropy(logits, x).sum(-1)
        divergence = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), -1)
        return jnp.mean(reconstruction + divergence)

    return loss, {"encoder": mlp("e", 6, 8, 4), "decoder": mlp("d", 2, 8, 6)}


@model
def vector_quantized_autoencoder():
    """The nearest of a codebook, straight through, with codebook and commitment losses."""
    x = data("x", 12, 5)

    def loss(p):
        z = run(p["encoder"], x, jax.nn.relu)
        book = p["book"]
        distance = jnp.sum((jax.lax.stop_gradient(z)[:, None] - book[None]) ** 2, -1)
        chosen = book[jnp.argmin(distance, -1)]
        through = z + jax.lax.stop_gradient(chosen - z)
        commitment = jnp.mean((jax.lax.stop_gradient(chosen) - z) ** 2)
        codebook = jnp.mean((chosen - jax.lax.stop_gradient(z)) ** 2)
        out = run(p["decoder"], through, jax.nn.relu)
        return jnp.mean((out - x) ** 2) + codebook + 0.25 * commitment

    return loss, {"encoder": mlp("e", 5, 8, 3), "book": data("book", 6, 3),
                  "decoder": mlp("d", 3, 8, 5)}  # fmt: skip


def leaky(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2)


@model
def gan_generator():
    noise, critic = data("z", 12, 3), mlp("critic", 4, 8, 1)

    def loss(p):
        return jnp.mean(jax.nn.softplus(-run(critic, run(p, noise, jax.nn.relu), leaky)))

    return loss, mlp("g", 3, 8, 4)


@model
def gan_discriminator():
    real, fake = data("real", 12, 4), data("fake", 12, 4) + 1

    def loss(p):
        of_real, of_fake = run(p, real, leaky), run(p, fake, leaky)
        return jnp.mean(jax.nn.softplus(-of_real)) + jnp.mean(jax.nn.softplus(of_fake))

    return loss, mlp("d", 4, 8, 8, 1)


@model
def wgan_critic_with_gradient_penalty():
    real, fake = data("real", 12, 3), data("fake", 12, 3) + 1
    mixed = 0.3 * real + 0.7 * fake

    def loss(p):
        def critic(x):
            return run(p, x)[0]

        slope = jax.vmap(jax.grad(critic))(mixed)
        penalty = jnp.mean((jnp.sqrt(jnp.sum(slope**2, -1) + 1e-12) - 1) ** 2)
        return jnp.mean(run(p, fake)) - jnp.mean(run(p, real)) + 10 * penalty

    return loss, mlp("d", 3, 8, 1)


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def kernel(name: str, size: int, inputs: int, outputs: int) -> jax.Array:
    return normal(name, size, size, inputs, outputs, scale=1 / np.sqrt(size * size * inputs))


def group_norm(p: dict[str, jax.Array], x: jax.Array, groups: int = 2) -> jax.Array:
    parts = x.reshape(*x.shape[:-1], groups, -1)
    mean = parts.mean((1, 2, 4), keepdims=True)
    variance = jnp.mean((parts - mean) ** 2, (1, 2, 4), keepdims=True)
    normed = ((parts - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
    return normed * p["scale"] + p["bias"]


@model
def diffusion_with_a_unet():
    x, noise = data("x", 4, 8, 8, 1), data("noise", 4, 8, 8, 1)
    time = jnp.asarray([0.1, 0.4, 0.6, 0.9])
    signal = jnp.cos(0.5 * jnp.pi * time)[:, None, None, None]
    noised = signal * x + jnp.sqrt(1 - signal**2) * noise
    angles = time[:, None] * jnp.exp(jnp.linspace(0.0, 3.0, 4))
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

    def block(p, x, time):
        h = conv(jax.nn.silu(group_norm(p["norm"], x)), p["first"])
        h = h + (jax.nn.silu(time) @ p["time"])[:, None, None]
        return x + conv(jax.nn.silu(h), p["second"])

    def block_params(name, width):
        return {
            "norm": norm_params(width),
            "first": kernel(name + "1", 3, width, width),
            "second": kernel(name + "2", 3, width, width),
            "time": normal(name + "t", 6, width),
        }

    def loss(p):
        time = run(p["time"], embedding, jax.nn.silu)
        top = block(p["down"], conv(noised, p["in"]), time)
        low = block(p["middle"], conv(top, p["shrink"], 2), time)
        up = jnp.repeat(jnp.repeat(low, 2, 1), 2, 2)
        h = block(p["up"], conv(jnp.concatenate([up, top], -1), p["join"]), time)
        return jnp.mean((conv(jax.nn.silu(h), p["out"]) - noise) ** 2)

    return loss, {
        "time": mlp("t", 8, 6, 6),
        "in": kernel("in", 3, 1, 4),
        "down": block_params("d", 4),
        "shrink": kernel("s", 3, 4, 4),
        "middle": block_params("m", 4),
        "join": kernel("j", 1, 8, 4),
        "up": block_params("u", 4),
        "out": kernel("o", 3, 4, 1),
    }


@model
def mixture_density():
    x, y = data("x", 16, 2), data("y", 16, 1)

    def loss(p):
        logits, mean, log_sigma = jnp.split(run(p, x), 3, -1)
        density = -0.5 * ((y - mean) * jnp.exp(-log_sigma)) ** 2 - log_sigma
        return -jnp.mean(jax.nn.logsumexp(jax.nn.log_softmax(logits) + density, axis=-1))

    return loss, mlp("p", 2, 8, 9)


# --- Attention ------------------------------------------------------------------------------------


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Any = 0.0) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)


def causal(length: int) -> jax.Array:
    return jnp.where(jnp.tril(jnp.ones((length, length))) > 0, 0.0, -1e9)


def block_params(width: int, name: str = "") -> dict[str, Any]:
    return {"norm1": norm_params(width), "qkv": normal(name + "qkv", width, 3 * width),
            "out": normal(name + "o", width, width), "norm2": norm_params(width),
            "mlp": mlp(name + "mlp", width, 2 * width, width)}  # fmt: skip


def block(p: Any, x: jax.Array, turn: Any = lambda x: x, bias: Any = 0.0) -> jax.Array:
    h = layer_norm(p["norm1"], x) @ p["qkv"]
    q, k, v = jnp.split(h.reshape(*h.shape[:2], 2, -1), 3, -1)
    x = x + attend(turn(q), turn(k), v, bias).reshape(x.shape) @ p["out"]
    return x + run(p["mlp"], layer_norm(p["norm2"], x), jax.nn.gelu)


@model
def vision_transformer():
    images, y = data("x", 4, 8, 8, 1), labels(4, 3)
    patches = images.reshape(4, 2, 4, 2, 4).swapaxes(2, 3).reshape(4, 4, 16)

    def loss(p):
        h = apply(p["embed"], patches)
        first = jnp.broadcast_to(p["class"], (4, 1, 8))
        h = block(p["block"], jnp.concatenate([first, h], 1) + p["position"])
        return cross_entropy(apply(p["head"], layer_norm(p["norm"], h)[:, 0]), y)

    return loss, {"embed": dense("e", 16, 8), "class": normal("c", 1, 1, 8),
                  "position": normal("p", 5, 8, scale=0.1), "block": block_params(8),
                  "norm": norm_params(8), "head": dense("h", 8, 3)}  # fmt: skip


TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 7, (3, 7)))


@model
def rotary_attention_with_a_tied_softmax():
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    angles = jnp.arange(6.0)[:, None] * jnp.asarray([1.0, 0.1])
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def turn(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def loss(p):
        h = block(p["block"], p["table"][inputs], turn, causal(6))
        return cross_entropy(layer_norm(p["norm"], h) @ p["table"].T, targets)

    return loss, {"table": normal("t", 7, 8), "block": block_params(8), "norm": norm_params(8)}


@model
def alibi_attention():
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    distance = jnp.arange(6)[None] - jnp.arange(6)[:, None]
    bias = causal(6) + jnp.asarray([0.5, 0.25])[:, None, None] * distance

    def loss(p):
        return cross_entropy(block(p["block"], p["table"][inputs], bias=bias) @ p["out"], targets)

    return loss, {"table": normal("t", 7, 8), "block": block_params(8), "out": normal("o", 8, 7)}


@model
def mixture_of_experts():
    """The two best of four experts, weighed by their gates."""
    x, y = data("x", 12, 5), labels(12, 3)

    def loss(p):
        gates = jax.nn.softmax(x @ p["gate"], -1)
        _, best = jax.lax.top_k(gates, 2)
        chosen = gates * jax.nn.one_hot(best, 4).sum(1)
        chosen = chosen / chosen.sum(-1, keepdims=True)
        h = jax.nn.relu(jnp.einsum("bi,eio->beo", x, p["up"]))
        out = jnp.einsum("beo,eoc->bec", h, p["down"])
        balance = jnp.sum(gates.mean(0) ** 2)
        return cross_entropy(jnp.einsum("be,bec->bc", chosen, out), y) + 0.01 * balance

    return loss, {"gate": normal("g", 5, 4), "up": normal("u", 4, 5, 6),
                  "down": normal("d", 4, 6, 3)}  # fmt: skip


# --- Weights made of weights ----------------------------------------------------------------------


@model
def low_rank_adapters():
    frozen, x, y = mlp("frozen", 5, 8, 3), data("x", 12, 5), labels(12, 3)

    def loss(p):
        h = jnp.tanh(apply(frozen[0], x) + x @ p[0]["a"] @ p[0]["b"])
        return cross_entropy(apply(frozen[1], h) + h @ p[1]["a"] @ p[1]["b"], y)

    return loss, [
        {"a": normal(f"a{n}", i, 2), "b": 0.1 * normal(f"b{n}", 2, o)}
        for n, (i, o) in enumerate([(5, 8), (8, 3)])
    ]


@model
def hypernetwork():
    x, y, tasks = data("x", 3, 8, 4), labels(24, 2).reshape(3, 8), data("t", 3, 3)

    def loss(p):
        weights = run(p["hyper"], tasks)
        first, last = weights[:, :20].reshape(3, 4, 5), weights[:, 20:].reshape(3, 5, 2)
        h = jax.nn.relu(jnp.einsum("tni,tio->tno", x, first) + p["bias"])
        return cross_entropy(jnp.einsum("tno,toc->tnc", h, last), y)

    return loss, {"hyper": mlp("h", 3, 6, 30), "bias": normal("b", 5)}


@model
def weight_norm():
    x, y = data("x", 12, 5), labels(12, 3)

    def layer(p, x):
        length = jnp.sqrt(jnp.sum(p["v"] ** 2, 0, keepdims=True))
        return x @ (p["g"] * p["v"] / length) + p["b"]

    def loss(p):
        return cross_entropy(layer(p[1], jax.nn.relu(layer(p[0], x))), y)

    return loss, [
        {"v": normal(f"v{n}", i, o), "g": jnp.ones(o), "b": jnp.zeros(o)}
        for n, (i, o) in enumerate([(5, 8), (8, 3)])
    ]


@model
def spectral_norm():
    x, y = data("x", 12, 5), labels(12, 3)

    def normed(w, u):
        for _ in range(2):
            v = w.T @ u
            v = v / jnp.linalg.norm(v)
            u = w @ v
            u = u / jnp.linalg.norm(u)
        u, v = jax.lax.stop_gradient((u, v))
        return w / (u @ w @ v)

    starts = [data("u0", 5), data("u1", 8)]

    def loss(p):
        h = jax.nn.relu(x @ normed(p[0], starts[0]))
        return cross_entropy(h @ normed(p[1], starts[1]), y)

    return loss, [normal("w0", 5, 8), normal("w1", 8, 3)]


@model
def kolmogorov_arnold():
    """Functions of single numbers on edges: radial bases and a silu."""
    x, y, grid = data("x", 12, 3), data("y", 12, 1), jnp.linspace(-2.0, 2.0, 5)

    def layer(p, x):
        bases = jnp.exp(-((x[..., None] - grid) ** 2))
        return jnp.einsum("nig,igo->no", bases, p["spline"]) + jax.nn.silu(x) @ p["base"]

    def loss(p):
        return jnp.mean((layer(p[1], layer(p[0], x)) - y) ** 2)

    return loss, [
        {"spline": normal(f"s{n}", i, 5, o, scale=0.3), "base": normal(f"b{n}", i, o)}
        for n, (i, o) in enumerate([(3, 4), (4, 1)])
    ]


@model
def sine_network():
    x, y = data("x", 16, 2), data("y", 16, 1)
    return lambda p: jnp.mean((run(p, x, lambda h: jnp.sin(3.0 * h)) - y) ** 2), mlp(
        "p", 2, 8, 8, 1
    )


# --- Sequences ------------------------------------------------------------------------------------


@jax.custom_jvp
def spike(v: jax.Array) -> jax.Array:
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_surrogate(primals, tangents):
    (v,), (t,) = primals, tangents
    return spike(v), t / (1 + 3 * jnp.abs(v)) ** 2


@model
def spiking_network():
    x, y = jnp.abs(data("x", 5, 8, 4)), labels(8, 3)

    def loss(p):
        def step(carry, x):
            v, out = carry
            v = 0.8 * v + x @ p["w"]
            s = spike(v - 1.0)
            return (v - jax.lax.stop_gradient(s), 0.9 * out + s @ p["out"]), None

        (_, out), _ = jax.lax.scan(step, (jnp.zeros((8, 6)), jnp.zeros((8, 3))), x)
        return cross_entropy(out, y)

    return loss, {"w": normal("w", 4, 6, scale=1.0), "out": normal("o", 6, 3)}


@model
def linear_recurrent_unit():
    """Diagonal and complex, as pairs of real numbers."""
    x, y = data("x", 6, 4, 3), labels(4, 2)

    def loss(p):
        size = jnp.exp(-jnp.exp(p["nu"]))
        real, imaginary = size * jnp.cos(p["theta"]), size * jnp.sin(p["theta"])
        gain = jnp.sqrt(1 - size**2)

        def step(h, x):
            a, b = h
            u = x @ p["in"] * gain
            return (real * a - imaginary * b + u, imaginary * a + real * b), None

        (a, b), _ = jax.lax.scan(step, (jnp.zeros((4, 5)), jnp.zeros((4, 5))), x)
        return cross_entropy(jnp.tanh(a @ p["re"] - b @ p["im"]) @ p["out"], y)

    return loss, {"nu": normal("nu", 5) - 1, "theta": jnp.linspace(0.2, 1.5, 5),
                  "in": normal("in", 3, 5), "re": normal("re", 5, 4), "im": normal("im", 5, 4),
                  "out": normal("out", 4, 2)}  # fmt: skip


@model
def selective_state_space():
    x, y = data("x", 5, 4, 3), labels(4, 2)

    def loss(p):
        def step(h, x):
            dt = jax.nn.softplus(x @ p["dt"] + p["bias"])
            decay = jnp.exp(-dt[..., None] * jnp.exp(p["log_a"]))
            h = decay * h + (dt * x)[..., None] * (x @ p["b"])[:, None]
            return h, jnp.sum(h * (x @ p["c"])[:, None], -1) + p["skip"] * x

        _, out = jax.lax.scan(step, jnp.zeros((4, 3, 2)), x)
        return cross_entropy(out.mean(0) @ p["out"], y)

    return loss, {"dt": normal("dt", 3, 3), "bias": normal("bias", 3), "log_a": normal("a", 3, 2),
                  "b": normal("b", 3, 2), "c": normal("c", 3, 2), "skip": jnp.ones(3),
                  "out": normal("out", 3, 2)}  # fmt: skip


@model
def neural_ode():
    """Four steps of Runge-Kutta."""
    x, y = data("x", 12, 2), labels(12, 2)

    def loss(p):
        def rate(z):
            return run(p["rate"], z)

        def step(z, _):
            k1 = rate(z)
            k2 = rate(z + 0.125 * k1)
            k3 = rate(z + 0.125 * k2)
            k4 = rate(z + 0.25 * k3)
            return z + 0.25 / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        z, _ = jax.lax.scan(step, x, None, length=4)
        return cross_entropy(apply(p["out"], z), y)

    return loss, {"rate": mlp("r", 2, 6, 2), "out": dense("o", 2, 2)}


@model
def deep_equilibrium():
    """A fixed point that rests, and one more step from it that moves."""
    x, y = data("x", 12, 4), labels(12, 3)

    def loss(p):
        def step(z, p):
            return jnp.tanh(z @ p["z"] + x @ p["x"])

        rest = jax.lax.stop_gradient(p)
        z = jax.lax.fori_loop(0, 20, lambda _, z: step(z, rest), jnp.zeros((12, 5)))
        return cross_entropy(step(jax.lax.stop_gradient(z), p) @ p["out"], y)

    return loss, {"z": 0.5 * normal("z", 5, 5), "x": normal("x", 4, 5), "out": normal("o", 5, 3)}


@model
def conditional_random_field():
    x, tags = data("x", 3, 5, 4), labels(15, 3).reshape(3, 5)

    def loss(p):
        scores = apply(p["emit"], x)

        def step(alpha, score):
            reached = jax.nn.logsumexp(alpha[:, :, None] + p["move"], axis=1)
            return reached + score, None

        first = scores[:, 0] + p["start"]
        alpha, _ = jax.lax.scan(step, first, jnp.swapaxes(scores[:, 1:], 0, 1))
        hot = jax.nn.one_hot(tags, 3)
        path = jnp.sum(scores * hot, (1, 2)) + hot[:, 0] @ p["start"]
        path = path + jnp.einsum("nti,ij,ntj->n", hot[:, :-1], p["move"], hot[:, 1:])
        return jnp.mean(jax.nn.logsumexp(alpha, axis=-1) - path)

    return loss, {"emit": dense("e", 4, 3), "move": normal("m", 3, 3), "start": normal("s", 3)}


# --- Other losses ---------------------------------------------------------------------------------


def gumbel(sample: Any) -> Any:
    """A classifier by a code of five classes, of which `sample` takes one."""
    x, y = data("x", 12, 4), labels(12, 3)
    noise = jnp.asarray(np.random.default_rng(2).gumbel(size=(12, 5)))

    def loss(p):
        soft = jax.nn.softmax((run(p["encoder"], x) + noise) / 0.7, -1)
        return cross_entropy(run(p["decoder"], sample(soft)), y)

    return loss, {"encoder": mlp("e", 4, 6, 5), "decoder": mlp("d", 5, 6, 3)}


@model
def gumbel_softmax():
    return gumbel(lambda soft: soft)


@model
def straight_through_gumbel_softmax():
    def sample(soft):
        hard = jax.nn.one_hot(jnp.argmax(soft, -1), 5)
        return soft + jax.lax.stop_gradient(hard - soft)

    return gumbel(sample)


def log_probability(p: Any, x: jax.Array, actions: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(run(p, x))[jnp.arange(len(actions)), actions]


@model
def preference_optimisation():
    x, good, bad = data("x", 12, 4), labels(12, 5), (labels(12, 5) + 2) % 5
    reference = mlp("reference", 4, 6, 5)
    of_reference = log_probability(reference, x, good) - log_probability(reference, x, bad)

    def loss(p):
        margin = log_probability(p, x, good) - log_probability(p, x, bad) - of_reference
        return -jnp.mean(jax.nn.log_sigmoid(0.5 * margin))

    return loss, mlp("p", 4, 6, 5)


@model
def policy_gradient_with_entropy():
    x, actions, advantage = data("x", 16, 4), labels(16, 3), data("advantage", 16)

    def loss(p):
        log_p = jax.nn.log_softmax(run(p, x))
        chosen = jnp.take_along_axis(log_p, actions[:, None], 1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return -jnp.mean(advantage * chosen) - 0.1 * jnp.mean(entropy)

    return loss, mlp("p", 4, 6, 3)


@model
def clipped_policy_with_a_critic():
    x, actions, advantage = data("x", 16, 4), labels(16, 3), data("advantage", 16)
    before, returns = log_probability(mlp("old", 4, 6, 3), x, actions), data("returns", 16)

    def loss(p):
        h = jnp.tanh(apply(p["body"], x))
        log_p = jax.nn.log_softmax(apply(p["policy"], h))[jnp.arange(16), actions]
        ratio = jnp.exp(log_p - before)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        value = apply(p["value"], h)[:, 0]
        return -jnp.mean(gain) + 0.5 * jnp.mean((value - returns) ** 2)

    return loss, {"body": dense("b", 4, 6), "policy": dense("p", 6, 3), "value": dense("v", 6, 1)}


@model
def physics_informed():
    """`u'' + sin u = 0` with values at the ends; derivatives inside of the loss."""
    inside, ends = jnp.linspace(-1.0, 1.0, 12), jnp.asarray([-1.0, 1.0])

    def loss(p):
        def u(t):
            return run(p, t[None])[0]

        second = jax.vmap(jax.grad(jax.grad(u)))(inside)
        equation = jnp.mean((second + jnp.sin(jax.vmap(u)(inside))) ** 2)
        return equation + jnp.mean((jax.vmap(u)(ends) - ends) ** 2)

    return loss, mlp("p", 1, 8, 1)


@model
def contrastive_views():
    """InfoNCE of two views of each row, without a row's likeness to itself."""
    x = data("x", 6, 4)
    views = jnp.concatenate([x + 0.1 * data("n1", 6, 4), x + 0.1 * data("n2", 6, 4)])

    def loss(p):
        z = run(p, views, jax.nn.relu)
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        likeness = jnp.where(jnp.eye(12) > 0, -1e9, z @ z.T / 0.5)
        return cross_entropy(likeness, (jnp.arange(12) + 6) % 12)

    return loss, mlp("p", 4, 8, 4)


@model
def image_and_text():
    """CLIP's loss: both ways, with a learned temperature."""
    images, texts = data("images", 8, 5), data("texts", 8, 4)

    def loss(p):
        a, b = run(p["image"], images), run(p["text"], texts)
        a = a * jax.lax.rsqrt(jnp.sum(a**2, -1, keepdims=True))
        b = b * jax.lax.rsqrt(jnp.sum(b**2, -1, keepdims=True))
        logits = jnp.exp(p["scale"]) * a @ b.T
        same = jnp.arange(8)
        return 0.5 * (cross_entropy(logits, same) + cross_entropy(logits.T, same))

    return loss, {"image": mlp("i", 5, 6, 3), "text": mlp("t", 4, 6, 3), "scale": jnp.asarray(0.5)}


@model
def triplets():
    anchor, near, far = (data(name, 10, 4) for name in ("anchor", "near", "far"))

    def loss(p):
        a, b, c = (run(p, x) for x in (anchor, near, far))
        return jnp.mean(jax.nn.relu(jnp.sum((a - b) ** 2, -1) - jnp.sum((a - c) ** 2, -1) + 2.0))

    return loss, mlp("p", 4, 6, 3)


@model
def prototypes():
    support, query, y = data("support", 3, 4, 5), data("query", 9, 5), labels(9, 3)

    def loss(p):
        centres = run(p, support).mean(1)
        distance = jnp.sum((run(p, query)[:, None] - centres[None]) ** 2, -1)
        return cross_entropy(-distance, y)

    return loss, mlp("p", 5, 6, 3)


@model
def redundancy_reduction():
    """Barlow twins, with the variances of VICReg."""
    x = data("x", 10, 4)
    views = x + 0.1 * data("n1", 10, 4), x + 0.1 * data("n2", 10, 4)

    def loss(p):
        a, b = (run(p, view, jax.nn.relu) for view in views)
        spread = jnp.sqrt(jnp.var(a, 0) + 1e-4)
        a, b = ((z - z.mean(0)) / (z.std(0) + 1e-3) for z in (a, b))
        likeness = a.T @ b / 10
        on = jnp.sum((jnp.diagonal(likeness) - 1) ** 2)
        off = jnp.sum(likeness**2) - jnp.sum(jnp.diagonal(likeness) ** 2)
        return on + 0.1 * off + jnp.mean(jax.nn.relu(1 - spread))

    return loss, mlp("p", 4, 8, 3)


@model
def own_latents():
    """BYOL: a predictor of the other view's target, which rests."""
    a, b, target = data("a", 10, 4), data("b", 10, 4), mlp("target", 4, 6, 3)

    def loss(p):
        predicted = run(p["predictor"], run(p["online"], a))
        wanted = jax.lax.stop_gradient(run(target, b))
        return jnp.mean(optax.cosine_distance(predicted, wanted))

    return loss, {"online": mlp("o", 4, 6, 3), "predictor": mlp("p", 3, 4, 3)}


@model
def meta_learning():
    """MAML: the loss after a gradient step of its own."""
    x, y, test_x, test_y = (
        data("x", 3, 6, 2),
        data("y", 3, 6, 1),
        data("t", 3, 5, 2),
        data("u", 3, 5, 1),
    )

    def error(p, x, y):
        return jnp.mean((run(p, x) - y) ** 2)

    def loss(p):
        def of_task(x, y, test_x, test_y):
            step = jax.grad(error)(p, x, y)
            return error(jax.tree.map(lambda w, g: w - 0.1 * g, p, step), test_x, test_y)

        return jnp.mean(jax.vmap(of_task)(x, y, test_x, test_y))

    return loss, mlp("p", 2, 5, 1)


@model
def hamiltonian_network():
    state, rates = data("s", 12, 2), data("r", 12, 2)

    def loss(p):
        def energy(s):
            return jnp.sum(jnp.tanh(apply(p["in"], s)) * p["out"])

        slope = jax.vmap(jax.grad(energy))(state)
        return jnp.mean((slope @ jnp.asarray([[0.0, -1.0], [1.0, 0.0]]) - rates) ** 2)

    return loss, {"in": dense("i", 2, 8), "out": normal("o", 8, scale=0.5)}


@model
def sliced_score_matching():
    x, ways = data("x", 12, 3), data("v", 12, 3)

    def loss(p):
        score, turn = jax.jvp(lambda x: run(p, x), (x,), (ways,))
        return jnp.mean(jnp.sum(ways * turn, -1) + 0.5 * jnp.sum(score**2, -1))

    return loss, mlp("p", 3, 6, 3)


@model
def capsules():
    """Two rounds of routing by agreement, and a margin loss of lengths."""
    x, y = data("x", 6, 4, 3), jax.nn.one_hot(labels(6, 2), 2)

    def squash(v):
        square = jnp.sum(v**2, -1, keepdims=True)
        return square / (1 + square) * v / jnp.sqrt(square + 1e-8)

    def loss(p):
        votes = jnp.einsum("nid,iocd->nioc", x, p)
        logits = jnp.zeros((6, 4, 2))
        for _ in range(2):
            weights = jax.nn.softmax(logits, -1)
            out = squash(jnp.einsum("nio,nioc->noc", weights, votes))
            logits = logits + jnp.einsum("nioc,noc->nio", votes, out)
        length = jnp.sqrt(jnp.sum(out**2, -1) + 1e-8)
        on, off = jax.nn.relu(0.9 - length) ** 2, jax.nn.relu(length - 0.1) ** 2
        return jnp.mean(jnp.sum(y * on + 0.5 * (1 - y) * off, -1))

    return loss, normal("p", 4, 2, 4, 3, scale=0.5)


@model
def skip_gram():
    centre, other, wrong = labels(20, 9), (labels(20, 9) + 1) % 9, labels(60, 9).reshape(20, 3)

    def loss(p):
        of_centre = p["in"][centre]
        right = jnp.sum(of_centre * p["out"][other], -1)
        negative = jnp.einsum("nd,nkd->nk", of_centre, p["out"][wrong])
        return -jnp.mean(jax.nn.log_sigmoid(right) + jax.nn.log_sigmoid(-negative).sum(-1))

    return loss, {"in": normal("i", 9, 4, scale=0.5), "out": normal("o", 9, 4, scale=0.5)}


@model
def factorization_machine():
    x, y = data("x", 16, 6), jnp.asarray(labels(16, 2), float)

    def loss(p):
        pairs = 0.5 * jnp.sum((x @ p["v"]) ** 2 - x**2 @ p["v"] ** 2, -1)
        logits = p["bias"] + x @ p["w"] + pairs
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    return loss, {"bias": jnp.zeros(()), "w": normal("w", 6), "v": normal("v", 6, 3)}


@model
def knowledge_graph():
    """TransE: a margin between distances of true triples and false ones."""
    head, relation, tail, wrong = (
        labels(15, 7),
        labels(16, 3)[:15],
        labels(17, 7)[:15],
        labels(18, 7)[:15],
    )

    def loss(p):
        start = p["entity"][head] + p["relation"][relation]
        true, false = (
            jnp.sqrt(jnp.sum((start - p["entity"][t]) ** 2, -1) + 1e-6) for t in (tail, wrong)
        )
        return jnp.mean(jax.nn.relu(1.0 + true - false))

    return loss, {"entity": data("e", 7, 4), "relation": data("r", 3, 4)}


@model
def angular_margin():
    """ArcFace: a margin is added to the angle with the class of a row."""
    x, y = data("x", 10, 4), labels(10, 3)

    def loss(p):
        z = run(p["net"], x, jax.nn.relu)
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        w = p["class"] / jnp.linalg.norm(p["class"], axis=0)
        cosine = jnp.clip(z @ w, -0.999, 0.999)
        wider = jnp.cos(jnp.arccos(cosine) + 0.3)
        return cross_entropy(4 * jnp.where(jax.nn.one_hot(y, 3) > 0, wider, cosine), y)

    return loss, {"net": mlp("n", 4, 6, 3), "class": data("c", 3, 3)}


@model
def segmentation():
    """Focal and Dice losses of a small convolutional network."""
    x = data("x", 3, 6, 6, 2)
    y = jnp.asarray(labels(108, 2).reshape(3, 6, 6), float)

    def loss(p):
        h = jax.nn.relu(conv(x, p["first"]))
        squeezed = jax.nn.sigmoid(run(p["gate"], h.mean((1, 2)), jax.nn.relu))
        logits = conv(h * squeezed[:, None, None], p["last"])[..., 0]
        probability = jax.nn.sigmoid(logits)
        right = y * probability + (1 - y) * (1 - probability)
        focal = jnp.mean((1 - right) ** 2 * optax.sigmoid_binary_cross_entropy(logits, y))
        both = jnp.sum(probability * y, (1, 2))
        dice = 1 - (2 * both + 1) / (jnp.sum(probability, (1, 2)) + jnp.sum(y, (1, 2)) + 1)
        return focal + jnp.mean(dice)

    return loss, {"first": kernel("f", 3, 2, 4), "gate": mlp("g", 4, 2, 4),
                  "last": kernel("l", 3, 4, 1)}  # fmt: skip


@model
def linear_attention():
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]

    def loss(p):
        x = p["table"][inputs]
        q, k, v = (x @ p[name] for name in ("q", "k", "v"))
        q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
        read = jnp.cumsum(jnp.einsum("btk,btv->btkv", k, v), 1)
        total = jnp.einsum("btk,btk->bt", q, jnp.cumsum(k, 1))
        h = jnp.einsum("btk,btkv->btv", q, read) / (total[..., None] + 1e-6)
        return cross_entropy((x + h) @ p["out"], targets)

    return loss, {"table": normal("t", 7, 6), "q": normal("q", 6, 4), "k": normal("k", 6, 4),
                  "v": normal("v", 6, 6), "out": normal("o", 6, 7)}  # fmt: skip


@model
def receptance_weighted():
    """RWKV's mixing of time: a running softmax, kept stable by a running maximum."""
    x, targets = jnp.swapaxes(data("x", 3, 5, 4), 0, 1), labels(15, 3).reshape(5, 3)

    def loss(p):
        decay = -jnp.exp(p["decay"])

        def step(carry, x):
            top, bottom, largest = carry
            k, v, r = x @ p["k"], x @ p["v"], jax.nn.sigmoid(x @ p["r"])
            now = jnp.maximum(largest, p["first"] + k)
            a, b = jnp.exp(largest - now), jnp.exp(p["first"] + k - now)
            out = r * (a * top + b * v) / (a * bottom + b)
            after = jnp.maximum(largest + decay, k)
            a, b = jnp.exp(largest + decay - after), jnp.exp(k - after)
            return (a * top + b * v, a * bottom + b, after), out

        begin = jnp.zeros((3, 4)), jnp.zeros((3, 4)), jnp.full((3, 4), -1e4)
        _, out = jax.lax.scan(step, begin, x)
        return cross_entropy(out @ p["out"], targets)

    return loss, {"k": normal("k", 4, 4), "v": normal("v", 4, 4), "r": normal("r", 4, 4),
                  "decay": normal("d", 4), "first": normal("f", 4),
                  "out": normal("o", 4, 3)}  # fmt: skip


@model
def masked_autoencoder_for_densities():
    """MADE: masked weights, each output of the inputs before it."""
    x = jnp.asarray(np.random.default_rng(3).random((12, 5)) > 0.5).astype(float)
    degree = jnp.arange(8) % 4
    first = (degree[None] >= jnp.arange(5)[:, None]).astype(float)
    last = (jnp.arange(5)[None] > degree[:, None]).astype(float)

    def loss(p):
        h = jax.nn.relu(x @ (p["w"] * first) + p["b"])
        logits = h @ (p["v"] * last) + p["c"]
        return optax.sigmoid_binary_cross_entropy(logits, x).sum(-1).mean()

    return loss, {
        "w": normal("w", 5, 8),
        "b": normal("b", 8),
        "v": normal("v", 8, 5),
        "c": normal("c", 5),
    }


@model
def planar_flow():
    x = data("x", 16, 3)

    def loss(p):
        z, log_det = x, 0.0
        for layer in p:
            h = jnp.tanh(z @ layer["w"] + layer["b"])
            z = z + h[:, None] * layer["u"]
            turn = (1 - h**2)[:, None] * layer["w"]
            log_det = log_det + jnp.log(jnp.abs(1 + turn @ layer["u"]) + 1e-6)
        return jnp.mean(0.5 * jnp.sum(z**2, -1) - log_det)

    return loss, [
        {"w": normal(f"w{n}", 3, scale=0.5), "b": jnp.zeros(()), "u": normal(f"u{n}", 3, scale=0.5)}
        for n in range(2)
    ]


@model
def proportional_hazards():
    """Cox's partial likelihood: a running logsumexp over those who are still at risk."""
    x, seen = data("x", 12, 4), jnp.asarray(labels(12, 2), float)

    def loss(p):
        risk = run(p, x)[:, 0]
        at_risk = jax.lax.cumlogsumexp(risk, reverse=True)
        return jnp.sum(seen * (at_risk - risk)) / jnp.sum(seen)

    return loss, mlp("p", 4, 6, 1)


@model
def addressed_memory():
    """Reading by content as a neural Turing machine does: likeness, a gate, a sharpened softmax."""
    x, y, memory = data("x", 8, 4), labels(8, 3), data("m", 5, 3)

    def loss(p):
        h = run(p["control"], x)
        key, strength, sharp = h[:, :3], jax.nn.softplus(h[:, 3:4]), 1 + jax.nn.softplus(h[:, 4:5])
        lengths = jnp.linalg.norm(key, axis=-1)[:, None] * jnp.linalg.norm(memory, axis=-1)
        weights = jax.nn.softmax(strength * (key @ memory.T) / (lengths + 1e-6), -1)
        weights = jnp.exp(sharp * jnp.log(weights + 1e-9))
        weights = weights / weights.sum(-1, keepdims=True)
        return cross_entropy(apply(p["out"], weights @ memory), y)

    return loss, {"control": mlp("c", 4, 6, 5), "out": dense("o", 3, 3)}


@model
def sequence_to_sequence():
    """Two LSTMs; the second one attends to the states of the first."""
    source, target = jnp.swapaxes(data("s", 3, 4, 3), 0, 1), labels(12, 4).reshape(4, 3)
    previous = jax.nn.one_hot(jnp.concatenate([jnp.zeros((1, 3), int), target[:-1]]), 4)

    def cell(p, carry, x):
        h, c = carry
        i, f, g, o = jnp.split(apply(p, jnp.concatenate([x, h], -1)), 4, -1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def loss(p):
        zero = jnp.zeros((3, 4)), jnp.zeros((3, 4))
        carry, states = jax.lax.scan(lambda c, x: cell(p["encoder"], c, x), zero, source)

        def step(carry, x):
            carry, h = cell(p["decoder"], carry, x)
            weights = jax.nn.softmax(jnp.einsum("tbd,bd->tb", states, h @ p["query"]), 0)
            read = jnp.einsum("tb,tbd->bd", weights, states)
            return carry, apply(p["out"], jnp.concatenate([h, read], -1))

        _, logits = jax.lax.scan(step, carry, previous)
        return cross_entropy(logits, target)

    return loss, {"encoder": dense("e", 7, 16), "decoder": dense("d", 8, 16),
                  "query": normal("q", 4, 4), "out": dense("o", 8, 4)}  # fmt: skip


@model
def operator_network():
    functions, places, y = data("f", 6, 5), data("t", 7, 1), data("y", 6, 7)

    def loss(p):
        return jnp.mean((run(p["branch"], functions) @ run(p["trunk"], places).T + p["b"] - y) ** 2)

    return loss, {"branch": mlp("b", 5, 6, 4), "trunk": mlp("t", 1, 6, 4), "b": jnp.zeros(())}


@model
def ordinal_regression():
    """Ordered thresholds by sums of softplus."""
    x, y = data("x", 12, 4), labels(12, 4)

    def loss(p):
        steps = jnp.concatenate([p["first"][None], jax.nn.softplus(p["steps"])])
        below = jax.nn.sigmoid(jnp.cumsum(steps) - run(p["net"], x))
        edges = jnp.concatenate([jnp.zeros((12, 1)), below, jnp.ones((12, 1))], -1)
        return -jnp.mean(jnp.log(jnp.take_along_axis(jnp.diff(edges), y[:, None], 1) + 1e-6))

    return loss, {"net": mlp("n", 4, 6, 1), "first": jnp.asarray(-1.0), "steps": jnp.zeros(2)}


@model
def quantiles():
    x, y, levels = data("x", 12, 3), data("y", 12, 1), jnp.asarray([0.1, 0.5, 0.9])

    def loss(p):
        off = y - run(p, x, jax.nn.silu)
        return jnp.mean(jnp.maximum(levels * off, (levels - 1) * off))

    return loss, mlp("p", 3, 6, 3)


@model
def distillation():
    x, y, teacher = data("x", 12, 4), labels(12, 3), mlp("teacher", 4, 8, 3)
    wanted = jax.nn.softmax(run(teacher, x) / 2)

    def loss(p):
        logits = run(p, x, jax.nn.relu)
        soft = optax.kl_divergence(jax.nn.log_softmax(logits / 2), wanted).mean()
        return 0.5 * cross_entropy(logits, y) + 2.0 * soft

    return loss, mlp("p", 4, 6, 3)


@model
def highway_with_counts():
    """Gated layers, and a Poisson likelihood."""
    x, counts = data("x", 12, 4), jnp.asarray(labels(12, 5), float)

    def loss(p):
        h = x
        for layer in p["layers"]:
            gate = jax.nn.sigmoid(apply(layer["gate"], h) - 1)
            h = gate * jnp.tanh(apply(layer["body"], h)) + (1 - gate) * h
        log_rate = apply(p["out"], h)[:, 0]
        return jnp.mean(jnp.exp(log_rate) - counts * log_rate)

    return loss, {
        "layers": [{"gate": dense(f"g{n}", 4, 4), "body": dense(f"b{n}", 4, 4)} for n in range(2)],
        "out": dense("o", 4, 1),
    }
