"""Models in Flax and in frameworks built on it, written for nobody in particular.

Each function returns `(f, params, x, rows)`. `rows` says by pattern how many rows of data meet a weight, all its layers
and experts together: a number, or two where the input and the output of its factors differ in it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])  # 8 tokens
X = jnp.cos(jnp.arange(2 * 4 * 16.0)).reshape(2, 4, 16)


def nnx_scanned_and_rematerialised():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)
            self.up = nnx.Linear(16, 32, rngs=rngs)
            self.down = nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.down(jax.nn.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 16, rngs=rngs)
            self.blocks = nnx.vmap(Block)(rngs.split(3))
            self.head = nnx.Linear(16, 11, rngs=rngs)

        def __call__(self, ids):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def run(x, block):
                return block(x)

            return self.head(run(self.embed(ids), self.blocks))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, ids: nnx.merge(graph, params, rest)(ids), params, IDS, {"blocks": 3 * 8, "": 8}


def nnx_by_hand():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.sin(jnp.arange(384.0)).reshape(16, 24))
            self.v = nnx.Param(jnp.cos(jnp.arange(384.0)).reshape(16, 24))

        def __call__(self, x):
            return jnp.dot(jnp.tanh(x @ self.w[...]), self.v[...].T)

    graph, params = nnx.split(Model())
    return lambda params, x: nnx.merge(graph, params)(x), params, X, {"": 8}


def linen_scanned_with_tied_head():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.SelfAttention(2, deterministic=True)(nn.RMSNorm()(x))
            return x + nn.Dense(16)(nn.silu(nn.Dense(32)(x))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 16)
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return embed.attend(stack()(embed(ids), None)[0])

    model = Model()
    return model.apply, model.init(jax.random.key(0), IDS), IDS, {"Embed": 8, "": 3 * 8}


def linen_vision_transformer():
    image = jnp.sin(jnp.arange(2 * 8 * 8 * 3.0)).reshape(2, 8, 8, 3)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, image):
            x = nn.Conv(16, (4, 4), strides=4)(image)
            x = x.reshape(x.shape[0], -1, 16)
            x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
            x = x + nn.MultiHeadDotProductAttention(2, deterministic=True)(nn.LayerNorm()(x))
            x = x + nn.Dense(16, name="down")(nn.gelu(nn.Dense(32, name="up")(x)))
            return nn.Dense(5, name="head")(jnp.mean(x, axis=1))

    model = Model()
    return model.apply, model.init(jax.random.key(0), image), image, {"head": 2, "": 2 * 4}


def linen_convolutional_network():
    """Dilated, grouped, depthwise and pointwise."""
    image = jnp.sin(jnp.arange(2 * 6 * 6 * 8.0)).reshape(2, 6, 6, 8)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(12, (3, 3), kernel_dilation=2, name="dilated")(x))
            x = nn.relu(nn.Conv(12, (3, 3), strides=2, feature_group_count=3, name="grouped")(x))
            x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=12, name="depthwise")(x))
            x = nn.relu(nn.Conv(16, (1, 1), name="pointwise")(x))
            return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))

    model = Model()
    rows = {
        "dilated": 2 * 36,
        "grouped": (3 * 2 * 9, 2 * 9),
        "depthwise": (12 * 2 * 9, 2 * 9),
        "pointwise": 18,
        "head": 2,
    }
    return model.apply, model.init(jax.random.key(0), image), image, rows


def linen_audio_network():
    """Convolutions of one dimension: strided, and back up by a transposed one."""
    wave = jnp.sin(jnp.arange(2 * 12 * 8.0)).reshape(2, 12, 8)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Conv(16, (5,), strides=2, padding="CAUSAL", name="down")(x))
            return nn.ConvTranspose(8, (4,), strides=(2,), name="up")(x)

    model = Model()
    return model.apply, model.init(jax.random.key(0), wave), wave, {"down": 2 * 6, "up": 2 * 12}


def gemma_transformer():
    """Google DeepMind's own, with sliding windows, grouped queries, soft caps and a tied head."""
    modules = pytest.importorskip("gemma.modules", reason="gemma, which `make` installs without its dependencies")
    transformer = pytest.importorskip("gemma.transformer", reason="gemma, which `make` installs without dependencies")
    config = transformer.TransformerConfig(
        num_layers=2,
        num_embed=32,
        embed_dim=16,
        hidden_dim=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        attention_types=(modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL),
        sliding_window_size=2,
        attn_logits_soft_cap=50.0,
        final_logit_softcap=30.0,
        use_qk_norm=True,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
    )
    model = transformer.Transformer(config)
    positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((4, 4), bool)), (2, 4, 4))

    def f(params, ids):
        return model.apply(params, ids, positions, None, mask)[0]

    params = model.init(jax.random.key(0), IDS, positions, None, mask)
    return f, params, IDS, {"": 8}


MODELS = [
    nnx_scanned_and_rematerialised,
    nnx_by_hand,
    linen_scanned_with_tied_head,
    linen_vision_transformer,
    linen_convolutional_network,
    linen_audio_network,
    gemma_transformer,
]
