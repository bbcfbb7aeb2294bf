"""Rotary positions and causal attention, float32 softmax.

Shapes: B batch, T queries, S keys, N keys of a prefix, H query heads, K key/value heads, G = H/K, h head dim.
"""

import functools

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig

KeysValues = tuple[jax.Array, jax.Array]


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


@functools.partial(jax.checkpoint, prevent_cse=False)
def causal(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segments_BT: jax.Array | None,
    prefix_NKh: KeysValues | None = None,
) -> jax.Array:
    """Attention of every token to itself and to the earlier tokens of its segment.

    Blocks of queries meet the keys up to their own end only, which leaves out half of the products, and the
    backward pass recomputes the probabilities block by block from q, k and v.

    Args:
      q_BTHh, k_BTKh, v_BTKh: queries, keys and values.
      segments_BT: segment ids; None for one segment per row.
      prefix_NKh: keys and values that every query sees as well.

    Returns:
      [B, T, H, h] in the dtype of the queries.
    """
    T = q_BTHh.shape[1]
    block = min(max(-(-T // 8), 64), 512)
    k_BKTh, v_BKTh = k_BTKh.swapaxes(1, 2), v_BTKh.swapaxes(1, 2)
    index_T = jnp.arange(T)
    outputs = []
    for start in range(0, T, block):
        rows, end = slice(start, start + block), min(start + block, T)
        same = True if segments_BT is None else segments_BT[:, rows, None] == segments_BT[:, None, :end]
        mask = (index_T[rows, None] >= index_T[:end]) & same
        mask = jnp.broadcast_to(mask, (q_BTHh.shape[0], *mask.shape[-2:]))
        outputs.append(_checkpointed(q_BTHh[:, rows], k_BKTh[:, :, :end], v_BKTh[:, :, :end], mask, prefix_NKh))
    return jnp.concatenate(outputs, axis=1)


def masked(
    q_BTHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    mask_BTS: jax.Array,
    prefix_NKh: KeysValues | None = None,
) -> jax.Array:
    """softmax(q·kᵀ/√h + mask)·v, every group of H/K query heads sharing a key/value head.

    Args:
      q_BTHh, k_BKSh, v_BKSh: queries, keys and values.
      mask_BTS: True where a query may see a key; a query that sees none averages over all.
      prefix_NKh: keys and values that every query sees as well, the same for all rows: they are neither repeated
        for each row nor copied next to the others.

    Returns:
      [B, T, H, h] in the dtype of the queries.
    """
    B, T, H, h = q_BTHh.shape
    K, S = k_BKSh.shape[1:3]
    G = H // K
    # The query heads of a group are rows of one matrix product, not products of their own.
    q_BKQh = q_BTHh.reshape(B, T, K, G, h).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, h) * h**-0.5
    scores = jnp.einsum("BKQh,BKSh->BKQS", q_BKQh, k_BKSh, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, S)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if prefix_NKh is not None:
        k_NKh, v_NKh = (x.astype(v_BKSh.dtype) for x in prefix_NKh)
        before = jnp.einsum("BKQh,NKh->BKQN", q_BKQh, k_NKh, preferred_element_type=jnp.float32)
        scores = jnp.concatenate([before.reshape(B, K, G, T, -1), scores], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BKSh.dtype).reshape(B, K, G * T, -1)
    mixed = jnp.einsum("BKQS,BKSh->BKQh", probs[..., -S:], v_BKSh)
    if prefix_NKh is not None:
        mixed = mixed + jnp.einsum("BKQN,NKh->BKQh", probs[..., :-S], v_NKh)
    return mixed.reshape(B, K, G, T, h).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


_checkpointed = jax.checkpoint(masked)
