"""Rotary positions and causal attention, float32 softmax.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, h head dim.
"""

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig


def rotary(positions_BT: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines [B, T, 1, h/2] of the rotary angles, float32."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_factors is not None:
        frequency = frequency / jnp.asarray(config.rope_factors, jnp.float32)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BTHh: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + h/2) of every head by the angles of its position."""
    a, b = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)


def attention(q_BTHh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """softmax(q·kᵀ/√h + mask)·v, every group of H/K query heads sharing a key/value head.

    Args:
      q_BTHh, k_BSKh, v_BSKh: queries, keys and values.
      mask_BTS: True where a query may see a key; a query that sees none averages over all.

    Returns:
      [B, T, H, h] in the dtype of the queries.
    """
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    q = q_BTHh.reshape(B, T, K, H // K, h) * h**-0.5
    scores = jnp.einsum("BTKGh,BSKh->BKGTS", q, k_BSKh, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BSKh.dtype)
    return jnp.einsum("BKGTS,BSKh->BTKGh", probs, v_BSKh).reshape(B, T, H, h)
