"""The loss of supervised fine-tuning.

Shapes: B rows, T places in a row, S of them learned, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import decoder, loss
from lora_jax.models.config import DecoderConfig

Tree = Any
Batch = dict[str, jax.Array]


def negative_log_likelihood(
    params: Tree,
    batch: Batch,
    *,
    shape: DecoderConfig,
    learned: int,
    remat: str = "none",
    chunk: int = 0,
    once: bool = False,
    packed: bool = False,
    prefix: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Σ w·(-log p(target)) and Σ w over a batch.

    Args:
      params: of the decoder.
      batch: arrays [B, T] as `packing.batch` makes them.
      shape: the decoder's.
      learned: S, the most targets with a weight in a row: only these need logits.
      remat: as `decoder.hidden`.
      chunk: positions whose logits are held at once; 0 holds all.
      once: as `loss.cross_entropy`.
      packed: whether a row holds several examples.
      prefix: as `decoder.hidden`.

    Returns:
      The sums, float32 scalars.
    """
    apart = (batch["positions"], batch["segments"]) if packed else (None, None)
    hidden_BTD = decoder.hidden(params, batch["tokens"], shape, *apart, remat=remat, prefix=prefix)
    weights_BS, index_BS = largest(batch["weights"], learned)
    hidden_BSD = jnp.take_along_axis(hidden_BTD, index_BS[..., None], axis=1)
    targets_BS = jnp.take_along_axis(batch["targets"], index_BS, axis=1)
    return loss.cross_entropy(params, hidden_BSD, targets_BS, weights_BS, shape, chunk or None, once)


def largest(weights_BT: jax.Array, learned: int) -> tuple[jax.Array, jax.Array]:
    """The S largest weights of every row and their places, as `jax.lax.top_k`, which would gather rows of all devices."""
    index_BS = jnp.argsort(weights_BT, axis=1, descending=True)[:, :learned]
    return jnp.take_along_axis(weights_BT, index_BS, axis=1), index_BS
