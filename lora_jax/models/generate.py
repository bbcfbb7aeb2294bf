"""Batched generation with a key/value cache, the prompt and all new tokens in one jit."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig


def generate(
    params: Any,
    config: DecoderConfig,
    prompt_BT: jax.Array,
    prompt_lengths_B: jax.Array,
    max_new: int,
    eos_ids: Sequence[int],
    key: jax.Array | None = None,
    temperature: float = 0.0,
    apply: Callable = decoder.forward_with_cache,
) -> tuple[jax.Array, jax.Array]:
    """Continues every prompt until an end token or `max_new` tokens.

    Args:
      params: whatever `apply` takes first: the parameters, or anything that stands for them.
      config: the decoder's shape.
      prompt_BT: token ids, padded on the right with any id.
      prompt_lengths_B: how many of them are the prompt, at least 1.
      max_new: most tokens to add, at least 1.
      eos_ids: tokens that end a row.
      key: PRNG key, needed where temperature > 0.
      temperature: tokens are drawn from softmax(logits / temperature); 0 takes the likeliest.
      apply: `decoder.forward_with_cache`, or a function that stands for it. Calls with the same object share
        one compiled program.

    Returns:
      tokens_BN [B, max_new], zeros after a row's end token, and counts_B, tokens up to and with it.

    Raises:
      ValueError: a temperature without a key, an empty prompt, or no token to add.
    """
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens: give generate a key, or temperature=0.0")
    if max_new < 1:
        raise ValueError(f"max_new={max_new}: generate adds at least 1 token")
    if not isinstance(prompt_lengths_B, Tracer) and np.min(prompt_lengths_B) < 1:
        raise ValueError(f"prompt_lengths_B={np.asarray(prompt_lengths_B)}: every prompt needs at least 1 token")
    return _generate(
        params,
        config,
        jnp.asarray(prompt_BT, jnp.int32),
        jnp.asarray(prompt_lengths_B, jnp.int32),
        key,
        temperature,
        max_new=max_new,
        eos_ids=tuple(eos_ids),
        sampled=temperature > 0,
        apply=apply,
    )


@functools.partial(jax.jit, static_argnames=("config", "max_new", "eos_ids", "sampled", "apply"))
def _generate(
    params, config, prompt_BT, lengths_B, key, temperature, *, max_new, eos_ids, sampled, apply
) -> tuple[jax.Array, jax.Array]:
    B, T = prompt_BT.shape

    def choose(logits_BV, step):
        if not sampled:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), logits_BV / temperature)
        return drawn.astype(jnp.int32)

    def ends(token_B):
        return jnp.isin(token_B, jnp.asarray(eos_ids, jnp.int32))

    def running(state):
        step, _, _, ended_B, _, _ = state
        return (step < max_new) & ~jnp.all(ended_B)

    def advance(state):
        step, tokens_BN, token_B, ended_B, counts_B, cache = state
        positions_B = jnp.where(ended_B, -1, lengths_B + step - 1)
        logits_BV, cache = apply(params, token_B[:, None], config, positions_B[:, None], cache)
        token_B = jnp.where(ended_B, 0, choose(logits_BV, step))
        tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, step))
        counts_B = jnp.where(ended_B, counts_B, step + 1)
        return step + 1, tokens_BN, token_B, ended_B | ends(token_B), counts_B, cache

    index_T = jnp.arange(T)
    positions_BT = jnp.where(index_T < lengths_B[:, None], index_T, -1)
    cache = decoder.init_cache(config, B, T + max_new - 1, _activation_dtype(params))
    logits_BV, cache = apply(params, prompt_BT, config, positions_BT, cache)
    token_B = choose(logits_BV, 0)
    tokens_BN = jnp.zeros((B, max_new), jnp.int32).at[:, 0].set(token_B)
    state = (1, tokens_BN, token_B, ends(token_B), jnp.ones(B, jnp.int32), cache)
    _, tokens_BN, _, _, counts_B, _ = jax.lax.while_loop(running, advance, state)
    return tokens_BN, counts_B


def _activation_dtype(params: Any) -> jnp.dtype:
    """The dtype of the largest floating leaf: adapters are smaller than what they adapt."""
    leaves = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return max(leaves, key=lambda x: x.size).dtype
