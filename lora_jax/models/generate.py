"""Batched generation with a key/value cache, the prompt and all new tokens in one jit."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig


class Samples(NamedTuple):
    """What a model says.

    Attributes:
      tokens_BN: token ids, zeros after a row's end token.
      counts_B: tokens of a row up to and with its end token.
      log_probs_BN: log softmax(logits / temperature) of each token, float32, 0 after the end; of the logits
        themselves where the temperature is 0.
    """

    tokens_BN: jax.Array
    counts_B: jax.Array
    log_probs_BN: jax.Array


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
    """`tokens_BN` and `counts_B` of `sample`, whose arguments and errors these are."""
    drawn = sample(params, config, prompt_BT, prompt_lengths_B, max_new, eos_ids, key, temperature, apply)
    return drawn.tokens_BN, drawn.counts_B


def sample(
    params: Any,
    config: DecoderConfig,
    prompt_BT: jax.Array,
    prompt_lengths_B: jax.Array,
    max_new: int,
    eos_ids: Sequence[int],
    key: jax.Array | None = None,
    temperature: float = 1.0,
    apply: Callable = decoder.forward_with_cache,
    left: bool = False,
) -> Samples:
    """Continues every prompt until an end token or `max_new` tokens.

    Args:
      params: whatever `apply` takes first: the parameters, or anything that stands for them.
      config: the decoder's shape.
      prompt_BT: token ids, padded with any id.
      prompt_lengths_B: how many of them are the prompt, at least 1.
      max_new: most tokens to add, at least 1.
      eos_ids: tokens that end a row.
      key: PRNG key, or keys_B, one for each row, which then draws the same beside whatever other rows; needed
        where temperature > 0.
      temperature: tokens are drawn from softmax(logits / temperature); 0 takes the likeliest.
      apply: `decoder.forward_with_cache`, or a function that stands for it. Calls with the same object share
        one compiled program.
      left: the prompts are padded on the left, not on the right.

    Returns:
      The tokens, with the log-probability of each.

    Raises:
      ValueError: a temperature without a key, an empty prompt, or no token to add.
    """
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens: give generate a key, or temperature=0.0")
    if max_new < 1:
        raise ValueError(f"max_new={max_new}: generate adds at least 1 token")
    if not isinstance(prompt_lengths_B, Tracer) and np.min(prompt_lengths_B) < 1:
        raise ValueError(f"prompt_lengths_B={np.asarray(prompt_lengths_B)}: every prompt needs at least 1 token")
    if key is not None and key.ndim == 0:
        key = jax.random.split(key, len(prompt_BT))
    return _sample(
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
        left=left,
    )


@functools.partial(jax.jit, static_argnames=("config", "max_new", "eos_ids", "sampled", "apply", "left"))
def _sample(
    params, config, prompt_BT, lengths_B, keys_B, temperature, *, max_new, eos_ids, sampled, apply, left
) -> Samples:
    B, T = prompt_BT.shape

    def choose(logits_BV, step):
        if sampled:
            logits_BV = logits_BV / temperature
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            token_B = jax.vmap(jax.random.categorical)(keys, logits_BV)
        else:
            token_B = jnp.argmax(logits_BV, axis=-1)
        picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        return token_B.astype(jnp.int32), picked_B - jax.nn.logsumexp(logits_BV, axis=-1)

    def ends(token_B):
        return jnp.isin(token_B, jnp.asarray(eos_ids, jnp.int32))

    def running(state):
        step, _, _, ended_B, _ = state
        return (step < max_new) & ~jnp.all(ended_B)

    def advance(state):
        step, drawn, token_B, ended_B, cache = state
        positions_B = jnp.where(ended_B, -1, lengths_B + step - 1)
        logits_BV, cache = apply(params, token_B[:, None], config, positions_B[:, None], cache)
        token_B, log_prob_B = (jnp.where(ended_B, 0, x) for x in choose(logits_BV, step))
        drawn = Samples(
            jax.lax.dynamic_update_slice(drawn.tokens_BN, token_B[:, None], (0, step)),
            jnp.where(ended_B, drawn.counts_B, step + 1),
            jax.lax.dynamic_update_slice(drawn.log_probs_BN, log_prob_B[:, None], (0, step)),
        )
        return step + 1, drawn, token_B, ended_B | ends(token_B), cache

    positions_BT = jnp.arange(T) - (T - lengths_B[:, None] if left else 0)
    positions_BT = jnp.where(positions_BT < lengths_B[:, None], jnp.maximum(positions_BT, -1), -1)
    cache = decoder.init_cache(config, B, T + max_new - 1, _activation_dtype(params))
    logits_BV, cache = apply(params, prompt_BT, config, positions_BT, cache)
    token_B, log_prob_B = choose(logits_BV, 0)
    drawn = Samples(
        jnp.zeros((B, max_new), jnp.int32).at[:, 0].set(token_B),
        jnp.ones(B, jnp.int32),
        jnp.zeros((B, max_new), jnp.float32).at[:, 0].set(log_prob_B),
    )
    return jax.lax.while_loop(running, advance, (1, drawn, token_B, ends(token_B), cache))[1]


def _activation_dtype(params: Any) -> jnp.dtype:
    """The dtype of the largest floating leaf: adapters are smaller than what they adapt."""
    leaves = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return max(leaves, key=lambda x: x.size).dtype
