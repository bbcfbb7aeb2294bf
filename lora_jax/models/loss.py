"""Next-token losses over a large vocabulary.

Shapes: B batch, T time, D model, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig


def cross_entropy(
    params: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: DecoderConfig,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Σ w·(log Σ exp z - z_target), z = head(hidden), in float32.

    Args:
      params: the decoder's parameters.
      hidden_BTD: from `decoder.hidden`.
      targets_BT: token ids to predict.
      weights_BT: 0 where a token does not count.
      config: the decoder's shape.
      chunk: tokens whose logits are held at once, recomputed in the backward pass; None holds all.

    Returns:
      Sum of weighted losses in nats and sum of weights, float32 scalars.

    Raises:
      ValueError: `chunk` does not divide the number of tokens.
    """
    weights = weights_BT.astype(jnp.float32)

    def total(hidden, targets, weights):
        logits = decoder.head(params, hidden, config)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - picked))

    if chunk is None:
        return total(hidden_BTD, targets_BT, weights), jnp.sum(weights)
    tokens = targets_BT.size
    if tokens % chunk:
        raise ValueError(f"chunk={chunk} does not divide the {tokens} tokens of the batch")
    chunks = [x.reshape(-1, chunk, *x.shape[2:]) for x in (hidden_BTD, targets_BT, weights)]
    body = jax.checkpoint(lambda sum_, xs: (sum_ + total(*xs), None), prevent_cse=False)
    return jax.lax.scan(body, jnp.float32(0), chunks)[0], jnp.sum(weights)
