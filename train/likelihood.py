"""What a model makes of the tokens to learn in a batch: their hidden states, and their log-probabilities.

Shapes: B rows, T places in a row, S of them learned, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import decoder, loss
from lora_jax.models.config import DecoderConfig
from train.objective import Batch, Tree, largest


def learned_hidden(
    params: Tree, batch: Batch, *, shape: DecoderConfig, learned: int, remat: str = "none", prefix: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The states that the tokens to learn are predicted from, in the order of their places.

    Args:
      params: of the decoder.
      batch: arrays [B, T] as `packing.batch` makes them, an example a row.
      shape: the decoder's.
      learned: S, the most targets with a weight in a row: only these need logits.
      remat: as `decoder.hidden`.
      prefix: as `decoder.hidden`.

    Returns:
      `(hidden_BSD, targets_BS, weights_BS)`; where a row has fewer than S, weights of 0 follow.
    """
    hidden_BTD = decoder.hidden(params, batch["tokens"], shape, remat=remat, prefix=prefix)
    weights_BS, index_BS = largest(batch["weights"], learned)
    hidden_BSD = jnp.take_along_axis(hidden_BTD, index_BS[..., None], axis=1)
    return hidden_BSD, jnp.take_along_axis(batch["targets"], index_BS, axis=1), weights_BS


def log_probs(
    params: Tree, batch: Batch, *, shape: DecoderConfig, learned: int, chunk: int = 0, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Σ w·log p(target) and Σ w of every row.

    Args:
      params: of the decoder.
      batch: as `learned_hidden`, and so for what is not named here.
      shape: the decoder's.
      learned: S.
      chunk: positions whose logits are held at once, of all rows together; 0 holds all.
      **options: `remat` and `prefix`.

    Returns:
      The sums, float32 [B].
    """
    states = learned_hidden(params, batch, shape=shape, learned=learned, **options)

    def row(hidden_SD, targets_S, weights_S):
        places = max(1, chunk // len(batch["tokens"])) if chunk else None
        nll, tokens = loss.cross_entropy(params, hidden_SD[None], targets_S[None], weights_S[None], shape, places)
        return -nll, tokens

    return jax.vmap(row)(*states)
