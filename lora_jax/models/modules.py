"""The parts of the decoder: Flax NNX modules.

Shapes: B batch, T time, N tokens of all rows, D model, F hidden, H query heads, K key/value heads, h head dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import moe, partition, rope
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


class Biased(Projection):
    """x·W + b; b has the kernel's output axes."""

    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs, contract: int = 1):
        super().__init__(shape, rngs, contract)
        self.bias = nnx.Param(jnp.zeros(shape[contract:]))

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        """The product and the bias, in the dtype of x."""
        return super().__call__(x_ND) + self.bias[...].astype(x_ND.dtype).reshape(1, -1)


def _projection(shape: tuple[int, ...], rngs: nnx.Rngs, contract: int = 1, bias: bool = False) -> Projection:
    return (Biased if bias else Projection)(shape, rngs, contract)


class RMSNorm(nnx.Module):
    """x / √(mean x² + ε) · (scale + offset), in float32."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(dim, 1.0 - offset))
        self.eps, self.offset = eps, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """The normalised x, in its dtype."""
        return normalised(x, self.scale[...], self.eps, self.offset)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def normalised(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """RMSNorm, its backward pass keeping x alone, in its own dtype."""
    x32, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * (scale + offset if offset else scale)).astype(x.dtype)


class Embedding(nnx.Module):
    """One row of a table per token."""

    def __init__(self, vocab: int, dim: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (vocab, dim)))


class Shared(nnx.Module):
    """A gated MLP beside a layer's experts, for all tokens."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, S = config.dim, config.shared_experts * config.hidden
        self.gate_proj, self.up_proj, self.down_proj = (Projection(s, rngs) for s in ((D, S), (D, S), (S, D)))
        self.score = Projection((D, 1), rngs) if config.shared_gate else None
        self.activation = config.activation

    def __call__(self, x_ND: jax.Array) -> jax.Array:
        """What it adds to what the experts give."""
        y_ND = self.down_proj(gated(self.gate_proj(x_ND), self.up_proj(x_ND), self.activation))
        if self.score is None:
            return y_ND
        # A product with a vector: no matrix that factors of a lower rank could adapt.
        score_N = x_ND @ self.score.kernel[...].astype(x_ND.dtype).reshape(-1)
        return jax.nn.sigmoid(score_N)[:, None] * y_ND


class Layer(nnx.Module):
    """Attention and a gated MLP, or several for the tokens to choose from, each with its norms and a residual."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = self.config = config
        D, F, H, K, h = c.dim, c.hidden, c.heads, c.kv_heads, c.head_dim
        norm = functools.partial(RMSNorm, eps=c.norm_eps, offset=c.norm_offset)
        if c.pre_norm:
            self.attn_norm, self.mlp_norm = norm(D), norm(D)
        if c.post_norm:
            self.attn_post_norm, self.mlp_post_norm = norm(D), norm(D)
        width = {"head": (h, h), "all": (H * h, K * h)}.get(c.qk_norm or "")
        self.q_norm, self.k_norm = map(norm, width) if width else (None, None)
        self.q_proj = _projection((D, H, h), rngs, bias=c.qkv_bias)
        self.k_proj = _projection((D, K, h), rngs, bias=c.qkv_bias)
        self.v_proj = _projection((D, K, h), rngs, bias=c.qkv_bias)
        self.o_proj = _projection((H, h, D), rngs, contract=2, bias=c.o_bias)
        into, out = (D, F), (F, D)
        if c.shared_experts:
            self.shared = Shared(c, rngs)
        if c.experts:
            self.router = Projection((D, c.experts), rngs)
            self.gate_proj, self.up_proj, self.down_proj = (moe.Experts(c.experts, s, rngs) for s in (into, into, out))
        else:
            self.gate_proj, self.up_proj, self.down_proj = (
                _projection(shape, rngs, bias=c.mlp_bias) for shape in (into, into, out)
            )

    def __call__(self, x_BTD: jax.Array, angles: rope.Angles, attend: Callable):
        """The layer's output, and whatever `attend(q, k, v)` returns beside its own."""
        c = self.config
        B, T, D = x_BTD.shape
        heads = (B, T, -1, c.head_dim)
        # Products see all tokens as the rows of one matrix: with two row axes, XLA transposes the operands of
        # every gradient product.
        x_ND = x_BTD.reshape(B * T, D)
        n_ND = self.attn_norm(x_ND) if c.pre_norm else x_ND
        q_BTHh = self._placed(_by_width(self.q_norm, self.q_proj(n_ND)).reshape(heads), angles)
        k_BTKh = self._placed(_by_width(self.k_norm, self.k_proj(n_ND)).reshape(heads), angles)
        if angles.growth is not None:
            q_BTHh = (angles.growth * q_BTHh).astype(q_BTHh.dtype)
        mixed, extra = attend(q_BTHh, k_BTKh, self.v_proj(n_ND).reshape(heads))
        new_ND = self.o_proj(mixed.reshape(B * T, -1))
        x_ND = self._added(x_ND, self.attn_post_norm(new_ND) if c.post_norm else new_ND)
        n_ND = self.mlp_norm(x_ND) if c.pre_norm else x_ND
        if c.experts:
            graph, weights = nnx.split((self.gate_proj, self.up_proj, self.down_proj))

            def routed(n_ND, scores_NE, weights, along):
                mlp = functools.partial(_mlp, *nnx.merge(graph, weights), c.activation)
                how = c.active_experts, c.normalised_experts, c.router, c.weighted_inputs
                return moe.routed(mlp, n_ND, scores_NE, *how, along)

            new_ND = partition.apart(routed, (n_ND, self.router(n_ND)), weights)
        else:
            new_ND = _mlp(self.gate_proj, self.up_proj, self.down_proj, c.activation, n_ND)
        if c.shared_experts:
            new_ND = new_ND + self.shared(n_ND)
        x_ND = self._added(x_ND, self.mlp_post_norm(new_ND) if c.post_norm else new_ND)
        return x_ND.reshape(B, T, D), extra

    def _placed(self, x_BTHh: jax.Array, angles: rope.Angles) -> jax.Array:
        """Rotated, and normalised where the layer rotates and the norm comes after."""
        c = self.config
        turned = rope.rotate(x_BTHh, angles, c.rope_neighbours)
        if c.qk_norm != "rotated":
            return turned
        normed = normalised(turned, jnp.ones(()), c.norm_eps, 0.0)
        return normed if angles.rotated is None else jnp.where(angles.rotated, normed, turned)

    def _added(self, x_ND: jax.Array, new_ND: jax.Array) -> jax.Array:
        return x_ND + (new_ND if self.config.residual_scale == 1 else self.config.residual_scale * new_ND)


def _mlp(
    gate_proj: Callable, up_proj: Callable, down_proj: Callable, activation: str, x: jax.Array, *expert_G: jax.Array
) -> jax.Array:
    """Of rows, or of groups of them, if the expert of each is given."""
    return down_proj(gated(gate_proj(x, *expert_G), up_proj(x, *expert_G), activation), *expert_G)


def _by_width(norm: RMSNorm | None, x_ND: jax.Array) -> jax.Array:
    """The norm of every run of numbers that is as wide as its scale."""
    return x_ND if norm is None else norm(x_ND.reshape(-1, norm.scale[...].size)).reshape(x_ND.shape)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, activation: str = "silu") -> jax.Array:
    """act(gate)·up, its backward pass keeping the two inputs only."""
    return ACTIVATIONS[activation](gate) * up


class Decoder(nnx.Module):
    """Embedding, layers stacked on a leading axis, final norm, and a head unless it is tied."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding(config.vocab, config.dim, rngs)
        self.layers = nnx.vmap(lambda r: Layer(config, r))(rngs.split(config.layers))
        self.final_norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        if not config.tied:
            self.head = Projection((config.dim, config.vocab), rngs)
