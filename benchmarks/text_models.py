"""Networks that predict the next character, written as one would without this library.

Each has `init(key)`, a dictionary of parameters, and `network(params, tokens)`: from integers
`(batch, length)` to logits `(batch, length, symbols)`, at each position from the tokens up to it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Params = dict[str, Array]
Tokens = Int[Array, "batch length"]
Logits = Float[Array, "batch length symbols"]

_he = jax.nn.initializers.he_normal()
_lecun = jax.nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """A character RNN like the paper's: an embedding, a cell that is an MLP with a skip, a readout.

    The state goes on as `h ← [relu([h, e] W₁ + b₁), h, e] W₂ + b₂`, from 0.

    **Arguments:**

    - `symbols`: how many characters there are.
    - `context`: the length of the windows.
    - `width`: of embedding, state and hidden layer.
    """

    symbols: int
    context: int
    width: int = 64

    def init(self, key: Array) -> Params:
        keys = jax.random.split(key, 4)
        width, symbols = self.width, self.symbols
        return {
            "embedding": jax.random.normal(keys[0], (symbols, width)),
            "w1": _he(keys[1], (2 * width, width)),
            "b1": jnp.zeros(width),
            "w2": _lecun(keys[2], (3 * width, width)),
            "b2": jnp.zeros(width),
            "head": _lecun(keys[3], (width, symbols)),
            "bias": jnp.zeros(symbols),
        }

    def network(self, params: Params, tokens: Tokens) -> Logits:
        def cell(state: Array, entry: Array) -> tuple[Array, Array]:
            both = jnp.concatenate([state, entry], axis=-1)
            inner = jax.nn.relu(both @ params["w1"] + params["b1"])
            state = jnp.concatenate([inner, both], axis=-1) @ params["w2"] + params["b2"]
            return state, state

        entries = jnp.swapaxes(params["embedding"][tokens], 0, 1)
        _, states = jax.lax.scan(cell, jnp.zeros(entries.shape[1:]), entries)
        return jnp.swapaxes(states, 0, 1) @ params["head"] + params["bias"]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Pre-norm blocks: causal attention and a GELU MLP, each beside a skip.

    **Arguments:**

    - `symbols`, `context`: how many characters, and the longest window.
    - `width`: of the embeddings; the MLP is four times as wide.
    - `heads`: of the attention.
    - `blocks`: how many; names of parameters of further ones end with their number.
    """

    symbols: int
    context: int
    width: int = 64
    heads: int = 4
    blocks: int = 1

    def init(self, key: Array) -> Params:
        keys = jax.random.split(key, 7)
        width, symbols = self.width, self.symbols
        params = {
            "embedding": 0.5 * jax.random.normal(keys[0], (symbols, width)),
            "position": 0.5 * jax.random.normal(keys[1], (self.context, width)),
            "head": _lecun(keys[6], (width, symbols)),
            "bias": jnp.zeros(symbols),
            "norm3_scale": jnp.ones(width),
            "norm3_bias": jnp.zeros(width),
        }
        for block in range(self.blocks):
            # The first block's are those of a network that has no other.
            own = keys[2:6] if not block else jax.random.split(jax.random.fold_in(key, block), 4)
            params |= {_of(block, name): leaf for name, leaf in self._init_block(own).items()}
        return params

    def _init_block(self, keys: Array) -> Params:
        width = self.width
        return {
            "qkv": _lecun(keys[0], (width, 3 * width)),
            "out": _lecun(keys[1], (width, width)),
            "w1": _he(keys[2], (width, 4 * width)),
            "b1": jnp.zeros(4 * width),
            "w2": _lecun(keys[3], (4 * width, width)),
            "b2": jnp.zeros(width),
            **{f"{name}_scale": jnp.ones(width) for name in ("norm1", "norm2")},
            **{f"{name}_bias": jnp.zeros(width) for name in ("norm1", "norm2")},
        }

    def network(self, params: Params, tokens: Tokens) -> Logits:
        x = params["embedding"][tokens] + params["position"][: tokens.shape[1]]
        for block in range(self.blocks):
            x = self._block(params, block, x)
        x = _norm(x, params["norm3_scale"], params["norm3_bias"])
        return x @ params["head"] + params["bias"]

    def _block(self, params: Params, block: int, x: Array) -> Array:
        def own(name: str) -> Array:
            return params[_of(block, name)]

        batch, length, _ = x.shape
        read = _norm(x, own("norm1_scale"), own("norm1_bias"))
        split = (read @ own("qkv")).reshape(batch, length, 3, self.heads, -1)
        query, key, value = (split[:, :, part] for part in range(3))
        found = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + found.reshape(batch, length, -1) @ own("out")
        read = _norm(x, own("norm2_scale"), own("norm2_bias"))
        return x + jax.nn.gelu(read @ own("w1") + own("b1")) @ own("w2") + own("b2")


def _of(block: int, name: str) -> str:
    """The name of a block's parameter."""
    return f"{name}_{block + 1}" if block else name


def _norm(x: Array, scale: Array, bias: Array) -> Array:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * scale + bias
