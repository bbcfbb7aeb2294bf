"""The parts of the decoder: Flax NNX modules.

Shapes: B batch, T time, N tokens of all rows, D model, F hidden, H query heads, K key/value heads, h head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import attention
from lora_jax.models.config import DecoderConfig


class Projection(nnx.Module):
    """x·W; the first `contract` axes of the kernel are the input's, and all are flattened in the product."""

    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs, contract: int = 1):
        init = nnx.initializers.lecun_normal(range(contract), range(contract, len(shape)))
        self.kernel = nnx.Param(init(rngs.params(), shape))

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        """The product of two matrices, in the dtype of x."""
        kernel = self.kernel[...].astype(x_ND.dtype)
        return checkpoint_name(x_ND @ kernel.reshape(x_ND.shape[-1], -1), "kept")


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · scale, in float32."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """The normalised x, in its dtype."""
        return normalised(x, self.scale[...], self.eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def normalised(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm, its backward pass keeping x alone, in its own dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """One row of a table per token."""

    def __init__(self, vocab: int, dim: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab, dim)))


class Layer(nnx.Module):
    """Attention and a gated MLP, each with a norm before it and a residual around it."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F, H, K, h = config.dim, config.hidden, config.heads, config.kv_heads, config.head_dim
        self.head_dim = h
        self.attn_norm = RMSNorm(D, config.norm_eps)
        self.q_proj = Projection((D, H, h), rngs)
        self.k_proj = Projection((D, K, h), rngs)
        self.v_proj = Projection((D, K, h), rngs)
        self.o_proj = Projection((H, h, D), rngs, contract=2)
        self.mlp_norm = RMSNorm(D, config.norm_eps)
        self.gate_proj = Projection((D, F), rngs)
        self.up_proj = Projection((D, F), rngs)
        self.down_proj = Projection((F, D), rngs)

    def __call__(self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array], attend: Callable):
        """The layer's output, and whatever `attend(q, k, v)` returns beside its own."""
        B, T, D = x_BTD.shape
        heads = (B, T, -1, self.head_dim)
        # Products see all tokens as the rows of one matrix: with two row axes, XLA transposes the operands of
        # every gradient product.
        x_ND = x_BTD.reshape(B * T, D)
        n_ND = self.attn_norm(x_ND)
        q_BTHh = attention.rotate(self.q_proj(n_ND).reshape(heads), *angles)
        k_BTKh = attention.rotate(self.k_proj(n_ND).reshape(heads), *angles)
        mixed_BTHh, extra = attend(q_BTHh, k_BTKh, self.v_proj(n_ND).reshape(heads))
        x_ND = x_ND + self.o_proj(checkpoint_name(mixed_BTHh.reshape(B * T, -1), "kept"))
        n_ND = self.mlp_norm(x_ND)
        x_ND = x_ND + self.down_proj(gated(self.gate_proj(n_ND), self.up_proj(n_ND)))
        return x_ND.reshape(B, T, D), extra


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate)·up, its backward pass keeping the two inputs only."""
    return jax.nn.silu(gate) * up


class Decoder(nnx.Module):
    """Embedding, layers stacked on a leading axis, final norm, and a head unless it is tied."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding(config.vocab, config.dim, rngs)
        self.layers = nnx.vmap(lambda r: Layer(config, r))(rngs.split(config.layers))
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.head = Projection((config.dim, config.vocab), rngs)
