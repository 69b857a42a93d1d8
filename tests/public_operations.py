"""Operations and losses that public models use, each as a function of a hidden value.

An *operation* is `function(h, p, d)` of a hidden value `h` of `ROWS × WIDTH` numbers, of parameters
and of data; a *loss* is `function(p, d)`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROWS, WIDTH = 6, 4

X = np.random.default_rng(0).normal(size=(ROWS, 3))
SEGMENTS = np.array([0, 2, 2, 0, 3, 2])  # nothing is in segment 1
BEYOND = np.array([0, 2, 9, 0, -1, 2])
PAIRS = np.array([[0, 1], [2, 3], [0, 1], [5, 0]])
#: One that jumps at no value of the network.
GRID = np.linspace(-2.0, 2.0, 6) + 0.013


def params():
    rng = np.random.default_rng(1)
    shapes = {"w": (3, WIDTH), "u": (WIDTH,), "scale": ()}
    return {name: jnp.asarray(rng.normal(size=s) + (s == ())) for name, s in shapes.items()}


def data():
    """What a training script hands over: arrays that are no constants of the program."""
    return {"segments": jnp.asarray(SEGMENTS), "beyond": jnp.asarray(BEYOND), "x": jnp.asarray(X)}


def segment(reduce, ids="segments", **options):
    return lambda h, p, d: reduce(h, d[ids], num_segments=4, **options)


def _finite(x):
    return jnp.where(jnp.isfinite(x), x, 0.0)


#: Functions of a hidden value `h`, of the parameters, and of data.
SCATTERS: dict[str, Any] = {
    "sum": segment(jax.ops.segment_sum),
    "sum of sorted": lambda h, p, d: jax.ops.segment_sum(
        h[jnp.argsort(d["segments"])], jnp.sort(d["segments"]), 4, indices_are_sorted=True
    ),
    "sum by constants": lambda h, p, d: jax.ops.segment_sum(h, SEGMENTS, 4),
    "sum, out of bounds": segment(jax.ops.segment_sum, "beyond"),
    "sum in buckets": segment(jax.ops.segment_sum, bucket_size=2),
    "mean": lambda h, p, d: (
        segment(jax.ops.segment_sum)(h, p, d)
        / jnp.maximum(jax.ops.segment_sum(jnp.ones(ROWS), d["segments"], 4), 1)[:, None]
    ),
    "maximum": lambda h, p, d: _finite(segment(jax.ops.segment_max)(h, p, d)),
    "maximum of ties": lambda h, p, d: _finite(
        jax.ops.segment_max(jnp.concatenate([h, h]), jnp.tile(d["segments"], 2), 4)
    ),
    "minimum": lambda h, p, d: _finite(segment(jax.ops.segment_min)(h, p, d)),
    "softmax": lambda h, p, d: _segment_softmax(h @ p["u"], d["segments"]),
    "messages": lambda h, p, d: (
        jnp.zeros((ROWS, WIDTH)).at[d["segments"]].add(jax.nn.relu(h[::-1] * p["u"])) + h
    ),
    "sum of sums by vmap": lambda h, p, d: jax.vmap(
        lambda c: jax.ops.segment_sum(c, d["segments"], 4), 1, 1
    )(h),
    "indices by vmap": lambda h, p, d: jax.vmap(
        lambda c, i: jnp.zeros(4).at[i].add(c), (0, None)
    )(h, jnp.array([1, 1, 0, 2])),
    "add": lambda h, p, d: h.at[d["segments"]].add(h[::-1]),
    "add to data": lambda h, p, d: d["x"].at[:, d["segments"][:WIDTH]].add(h),
    "add data": lambda h, p, d: h.at[d["segments"], 1].add(d["x"][:, 0]),
    "add entries": lambda h, p, d: h.at[PAIRS[:, 0], PAIRS[:, 1]].add(p["u"]),
    "add what is read": lambda h, p, d: h.at[d["segments"]].add(h),
    "subtract": lambda h, p, d: h.at[d["segments"]].subtract(2 * h),
    "set": lambda h, p, d: h.at[d["segments"]].set(h[::-1] ** 2),
    "set to a number": lambda h, p, d: h.at[d["segments"], 2].set(0.5),
    "set entries": lambda h, p, d: h.at[PAIRS[:, 0], PAIRS[:, 1]].set(p["u"]),
    "set in data": lambda h, p, d: jnp.zeros((9, WIDTH)).at[d["segments"]].set(h),
    "set beyond": lambda h, p, d: jnp.zeros((4, WIDTH)).at[d["beyond"]].set(h, mode="drop"),
    "set a slice": lambda h, p, d: h.at[1:3, ::2].set(h[3:5, 1::2]),
    "set by a mask": lambda h, p, d: h.at[X[:, 0] > 0].set(0.5),
    "max": lambda h, p, d: h.at[d["segments"]].max(h[::-1]),
    "min with data": lambda h, p, d: h.at[d["segments"], 0].min(d["x"][:, 0]),
    "multiply by data": lambda h, p, d: h.at[d["segments"], 0].multiply(d["x"][:, 0]),
    "multiply": lambda h, p, d: h.at[PAIRS[1:, 0], PAIRS[1:, 1]].multiply(
        p["u"][1:], unique_indices=True
    ),
    "divide by data": lambda h, p, d: h.at[d["segments"], 0].divide(d["x"][:, 0] + 3),
    "power": lambda h, p, d: jnp.abs(h).at[:, 1].power(3),
}  # fmt: skip


def _segment_softmax(scores, segments):
    largest = jax.ops.segment_max(jax.lax.stop_gradient(scores), segments, 4)
    weights = jnp.exp(scores - largest[segments])
    return weights / jax.ops.segment_sum(weights, segments, 4)[segments]


MATH: dict[str, Any] = {
    "free power": lambda h, p, d: jnp.abs(h) ** p["u"],
    "power of rows": lambda h, p, d: (
        (1 + jax.nn.softplus(h)) ** jax.nn.softplus(h @ p["u"])[:, None]
    ),
    "power of a number": lambda h, p, d: 1.3**h,
    "generalised mean": lambda h, p, d: jnp.mean(jax.nn.softplus(h) ** p["scale"], -1) ** (
        1 / p["scale"]
    ),
    "product": lambda h, p, d: jnp.prod(h, -1),
    "product of all": lambda h, p, d: jnp.prod(1 + 0.1 * h),
    "cumprod": lambda h, p, d: jnp.cumprod(h, -1),
    "cumprod of rows": lambda h, p, d: jnp.cumprod(1 - jax.nn.sigmoid(h), 0),
    "cumlogsumexp": lambda h, p, d: jax.lax.cumlogsumexp(h, 1, reverse=True),
    "cummax": lambda h, p, d: jax.lax.cummax(h, axis=1),
    "cummin": lambda h, p, d: jax.lax.cummin(h, axis=0, reverse=True),
    "cumsum": lambda h, p, d: jnp.cumsum(h, 0),
    "arctan2": lambda h, p, d: jnp.arctan2(h, p["u"]),
    "logaddexp": lambda h, p, d: jnp.logaddexp(h, p["u"]),
    "hypot": lambda h, p, d: jnp.hypot(h, p["u"]),
    "remainder": lambda h, p, d: jnp.mod(h, 0.7),
    "floor": lambda h, p, d: h - jnp.floor(h),
    "gamma": lambda h, p, d: jax.scipy.special.gammaln(1 + jnp.abs(h)),
    "beta": lambda h, p, d: jax.scipy.special.betaln(1 + jnp.abs(h), 2 + jnp.abs(p["u"])),
    "incomplete gamma": lambda h, p, d: jax.scipy.special.gammainc(2.0, 1 + jnp.abs(h)),
    "bessel": lambda h, p, d: jax.scipy.special.i0e(h),
    "sample of a gamma": lambda h, p, d: jax.random.gamma(jax.random.key(0), 1 + jnp.abs(h)),
    "interpolation": lambda h, p, d: jnp.interp(h, jnp.linspace(-2.0, 2.0, WIDTH), p["u"]),
    "quantile": lambda h, p, d: jnp.quantile(h, 0.3, axis=-1),
    "transport": lambda h, p, d: jax.lax.fori_loop(
        0, 3, lambda i, m: (m / m.sum(1, keepdims=True)) / m.sum(0), jnp.exp(h)
    ),
    "derivative": lambda h, p, d: jax.grad(lambda h: jnp.sum(jnp.tanh(h) ** 2 * p["u"]))(h),
    "prefix of products": lambda h, p, d: jax.lax.associative_scan(jnp.multiply, h, axis=1),
    "linear recurrence": lambda h, p, d: jax.lax.associative_scan(
        lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (jax.nn.sigmoid(h), h), axis=0
    )[1],
}  # fmt: skip

MASKS: dict[str, Any] = {
    "where": lambda h, p, d: jnp.where(h > 0, h, 0.1 * h),
    "product with a comparison": lambda h, p, d: h * (h > 0),
    "product with a number": lambda h, p, d: h * (h > 0).astype(h.dtype),
    "whole numbers": lambda h, p, d: h * jnp.where(h > 0, 1, 0),
    "two comparisons": lambda h, p, d: h * ((h > -1) & (h < 1)),
    "by data": lambda h, p, d: h * (h > d["x"][:, :1]),
    "experts": lambda h, p, d: jnp.einsum(
        "ne,nde->nd",
        jnp.where(h >= jax.lax.top_k(h, 2)[0][:, 1:], jax.nn.softmax(h), 0.0),
        h[:, :, None] * p["u"],
    ),
    "by another value": lambda h, p, d: h * (h > p["u"]),
    "between two": lambda h, p, d: jnp.where(h > p["u"], h, p["u"] ** 2),
    "of another": lambda h, p, d: jnp.where(h[:, :1] > 0, h, h * p["u"]),
    "counted": lambda h, p, d: h / jnp.maximum((h > 0).sum(-1, keepdims=True), 1),
    "not finite": lambda h, p, d: jnp.where(jnp.isfinite(h) & ~jnp.isnan(h), h, p["u"]),
    "of the largest": lambda h, p, d: h * (h == h.max(-1, keepdims=True)),
    "above the median": lambda h, p, d: h * (h >= jnp.sort(h, -1)[:, 2:3]),
    "top two": lambda h, p, d: (
        h[..., None, :] * jax.nn.one_hot(jax.lax.top_k(h, 2)[1], WIDTH)
    ).sum(1),
    "spline": lambda h, p, d: _spline(h),
    "bucket": lambda h, p, d: jnp.take(p["u"], jnp.clip(h.astype(int), 0, 3)) * h,
    "digitize": lambda h, p, d: jnp.take(p["u"], jnp.clip(jnp.digitize(h, GRID), 0, 3)) * h,
    "piecewise": lambda h, p, d: jnp.piecewise(
        h, [h < -0.5, h > 0.5], [-1, jnp.square, lambda x: x]
    ),
    "select": lambda h, p, d: jnp.select([h < -0.5, h > 0.5], [h * p["u"], h**2], h),
}  # fmt: skip


def _spline(h):
    """Basis functions of order 1, as a Kolmogorov-Arnold network has them."""
    inside = ((h[..., None] >= GRID[:-1]) & (h[..., None] < GRID[1:])).astype(h.dtype)
    rising = (h[..., None] - GRID[:-2]) * inside[..., :-1]
    return (rising + (GRID[2:] - h[..., None]) * inside[..., 1:]).sum(-1)


def _gram(h, batched=False):
    """Positive definite matrices, one or several."""
    h = h.reshape(2, 3, WIDTH) if batched else h[:WIDTH]
    return h.mT @ h + 0.5 * jnp.eye(WIDTH)


LINEAR: dict[str, Any] = {
    "solve": lambda h, p, d: jnp.linalg.solve(_gram(h), p["u"]),
    "solve of a matrix": lambda h, p, d: jnp.linalg.solve(_gram(h), h.T),
    "batched solve": lambda h, p, d: jnp.linalg.solve(_gram(h, True), h.reshape(2, WIDTH, 3)),
    "inverse": lambda h, p, d: jnp.linalg.inv(_gram(h, True)),
    "cholesky": lambda h, p, d: jnp.linalg.cholesky(_gram(h)),
    "batched cholesky": lambda h, p, d: jnp.linalg.cholesky(_gram(h, True)),
    "triangular": lambda h, p, d: jax.scipy.linalg.solve_triangular(
        jnp.tril(h[:WIDTH]) + 3 * jnp.eye(WIDTH), p["u"], lower=True
    ),
    "cho_solve": lambda h, p, d: jax.scipy.linalg.cho_solve(
        jax.scipy.linalg.cho_factor(_gram(h)), p["u"]
    ),
    "slogdet": lambda h, p, d: jnp.linalg.slogdet(_gram(h))[1],
    "batched slogdet": lambda h, p, d: jnp.linalg.slogdet(_gram(h, True))[1],
    "determinant": lambda h, p, d: jnp.linalg.det(_gram(h)),
    "eigenvalues": lambda h, p, d: jnp.linalg.eigvalsh(_gram(h)),
    "eigh": lambda h, p, d: (lambda e: e[1] * e[0] @ e[1].T)(jnp.linalg.eigh(_gram(h))),
    "singular values": lambda h, p, d: jnp.linalg.svd(h, compute_uv=False),
    "svd": lambda h, p, d: (lambda s: s[0] * s[1] @ s[2])(jnp.linalg.svd(h, full_matrices=False)),
    "qr": lambda h, p, d: jnp.linalg.qr(h)[1],
    "expm": lambda h, p, d: jax.scipy.linalg.expm(0.1 * h[:WIDTH]),
    "lu": lambda h, p, d: jax.scipy.linalg.lu(h[:WIDTH])[2],
    "pseudoinverse": lambda h, p, d: jnp.linalg.pinv(h),
    "conjugate gradients": lambda h, p, d: jax.scipy.sparse.linalg.cg(
        jnp.eye(WIDTH) + jnp.outer(p["u"], p["u"]), h[0]
    )[0],
    "least squares of data": lambda h, p, d: jnp.linalg.lstsq(d["x"], h)[0],
}  # fmt: skip


def _recurrence(h, p):
    """A diagonal state space with complex states, as in S5 and LRU, by `associative_scan`."""
    decay = jnp.exp(-jnp.exp(p["u"]) + 1j * p["u"] ** 2)
    inputs = h * jnp.sqrt(1 - jnp.abs(decay) ** 2)

    def join(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    decays = jnp.broadcast_to(decay, inputs.shape)
    states = jax.lax.associative_scan(join, (decays, inputs.astype(complex)))[1]
    return (states @ (jnp.ones((WIDTH, 2)) + 1j)).real


def _scanned(h, p):
    decay = jnp.exp(-jnp.exp(p["u"]) + 1j * p["u"])

    def step(state, entry):
        state = decay * state + entry
        return state, state.real + state.imag

    return jax.lax.scan(step, jnp.zeros(WIDTH, complex), h)[1]


COMPLEX: dict[str, Any] = {
    "spectral layer": lambda h, p, d: jnp.fft.irfft(
        jnp.fft.rfft(h, axis=0) * (p["u"] + 1j), n=ROWS, axis=0
    ),
    "spectral mixing": lambda h, p, d: jnp.fft.fft2(h).real,
    "power spectrum": lambda h, p, d: jnp.abs(jnp.fft.rfft(h, axis=-1)) ** 2,
    "magnitude": lambda h, p, d: jnp.abs(jnp.fft.fft(h, axis=0)),
    "phase": lambda h, p, d: jnp.angle(h + 1j * (jnp.abs(p["u"]) + 1)),
    "inverse": lambda h, p, d: jnp.fft.ifft(h + 0j, axis=0).imag,
    "shifted": lambda h, p, d: jnp.fft.fftshift(jnp.fft.fftn(h)).imag,
    "convolution": lambda h, p, d: jnp.fft.irfft(
        jnp.fft.rfft(h, 8) * jnp.fft.rfft(p["u"], 8), 8
    )[:, :WIDTH],
    "rotation": lambda h, p, d: ((h[:, :2] + 1j * h[:, 2:]) * jnp.exp(1j * p["u"][:2])).imag,
    "product": lambda h, p, d: jnp.einsum("ij,jk->ik", h + 1j, (1j * h.T + 2).conj()).real,
    "quotient": lambda h, p, d: (1 / (p["u"] + 1j * h)).real,
    "bilinear step": lambda h, p, d: ((1 + 1j * h) / (2 - 1j * p["u"])).imag,
    "resolvent": lambda h, p, d: jnp.sum(p["u"] / (1j * h + jnp.exp(p["u"])), -1).real,
    "vandermonde": lambda h, p, d: (
        jnp.exp(jnp.arange(5)[:, None] * (-jnp.abs(p["u"]) + 1j * h[:1])).sum(-1).real
    ),
    "powers": lambda h, p, d: ((0.5 * h + 1j) ** 3).real,
    "norm": lambda h, p, d: jnp.linalg.norm(h + 1j * p["u"], axis=-1),
    "wired": lambda h, p, d: jnp.where(
        d["x"][:, :1] > 0, jnp.concatenate([h[:3] * 1j, h[3:] * (1 + 2j)])[::-1], 0
    ).imag,
    "solve": lambda h, p, d: jnp.linalg.solve(
        3 * jnp.eye(WIDTH) + 1j * h[:WIDTH], p["u"] + 0j
    ).real,
    "short transforms": lambda h, p, d: jnp.abs(
        jax.scipy.signal.stft(h.ravel(), nperseg=8, noverlap=4)[2][:, 1:-1]
    ),
    "segments": lambda h, p, d: jax.ops.segment_sum(h * (1 + 1j), d["segments"], 4).imag,
    "recurrence": lambda h, p, d: _recurrence(h, p),
    "loop": lambda h, p, d: _scanned(h, p),
}  # fmt: skip


FLOW: dict[str, Any] = {
    "cond on data": lambda h, p, d: jax.lax.cond(d["x"][0, 0] > 0, jnp.sin, lambda z: 2 * z, h),
    "cond on a value": lambda h, p, d: jax.lax.cond(h[0, 0] > 0, jnp.sin, lambda z: z * p["u"], h),
    "cond of several": lambda h, p, d: sum(
        jax.lax.cond(
            h[0, 0] > 0, lambda a, b: (a, b * a), lambda a, b: (b + a, a), h, p["u"] + 0 * h
        )
    ),
    "switch on data": lambda h, p, d: jax.lax.switch(
        d["segments"][1], [jnp.sin, jnp.cos, lambda z: 2 * z], h
    ),
    "switch by row": lambda h, p, d: jax.vmap(
        lambda i, z: jax.lax.switch(i, [jnp.sin, jnp.cos, lambda z: 2 * z], z)
    )(d["segments"], h),
    "best expert": lambda h, p, d: jax.lax.switch(
        jnp.argmax(h[0]), [lambda z, i=i: z * (i + p["u"]) for i in range(WIDTH)], h
    ),
    "cond in a loop": lambda h, p, d: jax.lax.scan(
        lambda c, x: (jax.lax.cond(x.sum() > 0, lambda c: c + x, lambda c: 0.5 * c, c),) * 2,
        jnp.zeros(WIDTH), h,
    )[1],
    "fori_loop": lambda h, p, d: jax.lax.fori_loop(0, 3, lambda i, z: jnp.tanh(z + h), h),
}  # fmt: skip

GROUPS = {
    "scatters": SCATTERS,
    "math": MATH,
    "masks": MASKS,
    "linear": LINEAR,
    "complex": COMPLEX,
    "flow": FLOW,
}


def loss_of(function):
    """The squared error of what an operation makes of a layer, scaled by a parameter."""

    def loss(p, d):
        out = function(d["x"] @ p["w"], p, d)
        target = jnp.cos(1.0 + jnp.arange(out.size)).reshape(out.shape)
        return jnp.mean((p["scale"] * out - target) ** 2)

    return loss


def _ctc(p, d):
    labels = jnp.array([[1, 2], [3, 1]])
    logits = (d["x"] @ p["w"]).reshape(2, 3, WIDTH)
    return optax.ctc_loss(logits, jnp.zeros((2, 3)), labels, jnp.zeros((2, 2))).mean()


def _ctc_padded(p, d):
    labels = jnp.array([[1, 0], [3, 1]])
    logits = (d["x"] @ p["w"]).reshape(2, 3, WIDTH)
    padded = (labels == 0).astype(float)
    return optax.ctc_loss(logits, jnp.array([[0.0, 0, 0], [0, 0, 1]]), labels, padded).mean()


def _contrastive(p, d):
    """InfoNCE over all pairs but those of an example with itself."""
    z = d["x"] @ p["w"]
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    scores = (z @ z.T) / 0.3
    places = jnp.arange(ROWS)
    scores = scores.at[places, places].set(-1e9)
    return -jnp.mean(jax.nn.log_softmax(scores)[places, (places + 3) % ROWS])


def _forward_algorithm(p, d):
    """The likelihood of a hidden Markov model, by a scan of sums of logarithms."""
    transitions = jax.nn.log_softmax(jnp.outer(p["u"], p["u"]))

    def step(alpha, emission):
        return jax.nn.logsumexp(alpha[:, None] + transitions, 0) + emission, None

    alpha, _ = jax.lax.scan(step, jnp.zeros(WIDTH), jax.nn.log_softmax(d["x"] @ p["w"]))
    return -jax.nn.logsumexp(alpha)


def _conditional_field(p, d):
    """The negative log-likelihood of one sequence of tags."""
    emissions, transitions = d["x"] @ p["w"], jnp.outer(p["u"], jnp.ones(WIDTH))
    tags = jnp.array([0, 3, 1, 1, 2, 0])

    def step(alpha, emission):
        return jax.nn.logsumexp(alpha[:, None] + transitions, 0) + emission, None

    alpha, _ = jax.lax.scan(step, emissions[0], emissions[1:])
    score = emissions[jnp.arange(ROWS), tags].sum() + transitions[tags[:-1], tags[1:]].sum()
    return jax.nn.logsumexp(alpha) - score


def _gaussian_process(p, d):
    features = jnp.tanh(d["x"] @ p["w"])
    kernel = features @ features.T + 0.3 * jnp.eye(ROWS)
    residual = jnp.sin(d["x"][:, 0])
    fit = residual @ jnp.linalg.solve(kernel, residual)
    return 0.5 * fit + 0.5 * jnp.linalg.slogdet(kernel)[1]


def _full_covariance(p, d):
    """A Gaussian whose covariance is made of a triangle."""
    triangle = jnp.tril(jnp.outer(p["u"], p["u"])) + jnp.eye(WIDTH)
    error = d["x"] @ p["w"] - jnp.ones(WIDTH)
    white = jax.scipy.linalg.solve_triangular(triangle, error.T, lower=True)
    return 0.5 * jnp.mean(jnp.sum(white**2, 0)) + jnp.sum(jnp.log(jnp.diagonal(triangle)))


def _graph_classes(p, d):
    """Classes of graphs: messages along edges, and the mean of the nodes of each graph."""
    h = jax.nn.relu(d["x"] @ p["w"])
    ends, starts = jnp.array([0, 1, 2, 3, 4, 5, 0]), jnp.array([1, 2, 0, 4, 5, 3, 2])
    h = jax.nn.relu(h + jax.ops.segment_sum(h[starts] * p["u"], ends, ROWS))
    graphs = jnp.array([0, 0, 0, 1, 1, 1])
    logits = jax.ops.segment_sum(h, graphs, 2) / 3
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, 3])).mean()


LOSSES: dict[str, Any] = {
    "ctc": _ctc,
    "ctc of padded": _ctc_padded,
    "sparsemax": lambda p, d: optax.losses.multiclass_sparsemax_loss(
        d["x"] @ p["w"], jnp.arange(ROWS) % WIDTH
    ).mean(),
    "ranking": lambda p, d: optax.losses.ranking_softmax_loss(
        d["x"] @ p["w"], jax.nn.one_hot(jnp.arange(ROWS) % WIDTH, WIDTH)
    ).mean(),
    "ranking with a mask": lambda p, d: optax.losses.ranking_softmax_loss(
        d["x"] @ p["w"],
        jax.nn.one_hot(jnp.arange(ROWS) % 2, WIDTH),
        where=jnp.arange(WIDTH)[None] < 3 + jnp.zeros((ROWS, 1)),
    ).mean(),
    "pairs in order": lambda p, d: jnp.mean(
        jax.nn.relu(1 - (d["x"] @ p["w"])[:, :1] + (d["x"] @ p["w"])[:, 1:])
    ),
    "contrastive": _contrastive,
    "hidden Markov model": _forward_algorithm,
    "conditional random field": _conditional_field,
    "Gaussian process": _gaussian_process,
    "Gaussian of full covariance": _full_covariance,
    "log-determinant": lambda p, d: (
        jnp.linalg.slogdet(_gram(d["x"] @ p["w"]))[1] + jnp.sum(p["w"] ** 2)
    ),
    "classes of graphs": _graph_classes,
}
