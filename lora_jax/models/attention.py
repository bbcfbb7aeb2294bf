"""Causal attention, float32 softmax.

Shapes: B batch, T queries, S keys, N keys of a prefix, H query heads, K key/value heads, G = H/K, h head dim.
"""

import functools

import jax
import jax.numpy as jnp

KeysValues = tuple[jax.Array, jax.Array]


def causal(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segments_BT: jax.Array | None,
    prefix_NKh: KeysValues | None = None,
    window: int | jax.Array | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attention of every token to itself and to the earlier tokens of its segment.

    Blocks of queries meet the keys up to their own end only, which leaves out half of the products, and the
    backward pass recomputes the probabilities block by block from q, k and v.

    Args:
      q_BTHh, k_BTKh, v_BTKh: queries, keys and values.
      segments_BT: segment ids; None for one segment per row.
      prefix_NKh: keys and values that every query sees as well.
      window: the last tokens that a query sees, itself included; None for all. Blocks leave out what is before a
        window that is an int; an array, such as one that differs from layer to layer, only masks it.
      scale, cap: as `masked`.

    Returns:
      [B, T, H, h] in the dtype of the queries.
    """
    fixed = window if isinstance(window, int) else None
    blocks = functools.partial(_causal, fixed, scale, cap)
    traced = None if isinstance(window, int) else window
    return jax.checkpoint(blocks, prevent_cse=False)(q_BTHh, k_BTKh, v_BTKh, segments_BT, prefix_NKh, traced)


def _causal(fixed, scale, cap, q_BTHh, k_BTKh, v_BTKh, segments_BT, prefix_NKh, traced) -> jax.Array:
    T = q_BTHh.shape[1]
    window = traced if fixed is None else fixed
    block = min(max(-(-T // 8), 64), 512)
    k_BKTh, v_BKTh = k_BTKh.swapaxes(1, 2), v_BTKh.swapaxes(1, 2)
    index_T = jnp.arange(T)
    outputs = []
    attend = jax.checkpoint(functools.partial(masked, scale=scale, cap=cap))
    for start in range(0, T, block):
        first, end = 0 if fixed is None else max(0, start - fixed + 1), min(start + block, T)
        rows, columns = slice(start, end), slice(first, end)
        same = True if segments_BT is None else segments_BT[:, rows, None] == segments_BT[:, None, columns]
        mask = (index_T[rows, None] >= index_T[columns]) & same
        if window is not None:
            mask = mask & (index_T[rows, None] - index_T[columns] < window)
        mask = jnp.broadcast_to(mask, (q_BTHh.shape[0], *mask.shape[-2:]))
        outputs.append(attend(q_BTHh[:, rows], k_BKTh[:, :, columns], v_BKTh[:, :, columns], mask, prefix_NKh))
    return jnp.concatenate(outputs, axis=1)


def masked(
    q_BTHh: jax.Array,
    k_BKSh: jax.Array,
    v_BKSh: jax.Array,
    mask_BTS: jax.Array,
    prefix_NKh: KeysValues | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(q·kᵀ/√h + mask)·v, every group of H/K query heads sharing a key/value head.

    Args:
      q_BTHh, k_BKSh, v_BKSh: queries, keys and values.
      mask_BTS: True where a query may see a key; a query that sees none averages over all.
      prefix_NKh: keys and values that every query sees as well, the same for all rows: they are neither repeated
        for each row nor copied next to the others.
      scale: in place of 1/√h.
      cap: scores x are cap·tanh(x/cap); None for no cap.

    Returns:
      [B, T, H, h] in the dtype of the queries.
    """
    B, T, H, h = q_BTHh.shape
    K, S = k_BKSh.shape[1:3]
    G = H // K
    # The query heads of a group are rows of one matrix product, not products of their own.
    q_BKQh = q_BTHh.reshape(B, T, K, G, h).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, h)
    q_BKQh = q_BKQh * (h**-0.5 if scale is None else scale)
    scores = jnp.einsum("BKQh,BKSh->BKQS", q_BKQh, k_BKSh, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, G, T, S)
    scores = capped(scores, cap)
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if prefix_NKh is not None:
        k_NKh, v_NKh = (x.astype(v_BKSh.dtype) for x in prefix_NKh)
        before = jnp.einsum("BKQh,NKh->BKQN", q_BKQh, k_NKh, preferred_element_type=jnp.float32)
        scores = jnp.concatenate([capped(before.reshape(B, K, G, T, -1), cap), scores], axis=-1)
    probs = jax.nn.softmax(scores, axis=-1).astype(v_BKSh.dtype).reshape(B, K, G * T, -1)
    mixed = jnp.einsum("BKQS,BKSh->BKQh", probs[..., -S:], v_BKSh)
    if prefix_NKh is not None:
        mixed = mixed + jnp.einsum("BKQN,NKh->BKQh", probs[..., :-S], v_NKh)
    return mixed.reshape(B, K, G, T, h).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap·tanh(x/cap), or x where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
