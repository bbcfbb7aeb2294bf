"""Prompt tuning and prefix tuning: N trained tokens before every text, the decoder itself frozen.

The tokens are the same for all texts and see none of them, so all that a text sees of them is one array of keys and
one of values. Prefix tuning trains these; prompt tuning trains the vectors that the decoder makes them of, in one
run over N tokens per step, however many rows and packed examples the batch has.

    prompt = soft.init_prompt(key, params, config, n=20)
    tree   = soft.attach(params, prompt, config)                # differentiable in the prompt
    y      = soft.applied(decoder.forward)(tree, tokens, config)

`soft.applied(lora.lift(f))` takes parameters with a prompt, with adapters, with both, and with neither.

Shapes: N trained tokens, D model, L layers, K key/value heads, h head dim.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """Prompt tuning: trained vectors in place of the embedded tokens of a prompt.

    Attributes:
      vectors: [N, D], float32.

    Source: Lester et al. 2021, arXiv 2104.08691.
    """

    vectors: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prefix tuning: trained keys and values in every layer, taken as they are: no rotation is applied to the keys.

    Attributes:
      k: [L, N, K, h], float32.
      v: [L, N, K, h], float32.

    Source: Li & Liang 2021, arXiv 2101.00190, without its reparametrisation by an MLP.
    """

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefixed:
    """Parameters, and the keys and values [L, N, K, h] that every text sees before itself."""

    params: Any
    prefix: decoder.KeysValues


def init_prompt(
    key: jax.Array, params: Any, config: DecoderConfig, n: int, tokens: Sequence[int] | None = None
) -> Prompt:
    """Starts a prompt from rows of the embedding.

    Args:
      key: PRNG key of the random tokens.
      params: the decoder's.
      config: its shape.
      n: N, vectors to train.
      tokens: ids of a text, repeated or cut to n; random ones of the whole vocabulary if None.

    Returns:
      float32 copies of the rows.

    Raises:
      ValueError: n is not between 1 and the context, or a token is not in the vocabulary.
    """
    if not 0 < n < config.context:
        raise ValueError(f"n={n}: this decoder has room for 1 to {config.context - 1} trained tokens before a text")
    ids_N = jax.random.randint(key, (n,), 0, config.vocab) if tokens is None else _fitted(tokens, n, config.vocab)
    return Prompt(params["embed"]["embedding"][ids_N].astype(jnp.float32))


def _fitted(tokens: Sequence[int], n: int, vocab: int) -> np.ndarray:
    """The tokens, repeated or cut to n."""
    if not len(tokens):
        raise ValueError("no tokens to start the prompt from: give the ids of a text, or None for random ones")
    if outside := [int(token) for token in tokens if not 0 <= token < vocab]:
        raise ValueError(f"token {outside[0]} of the prompt is not in the vocabulary of {vocab}")
    return np.resize(np.asarray(tokens), n)


def init_prefix(
    key: jax.Array,
    params: Any,
    config: DecoderConfig,
    n: int,
    tokens: Sequence[int] | None = None,
    keys_values: Callable = decoder.keys_values,
) -> Prefix:
    """Starts a prefix from the key/value cache of a prompt: `init_prompt`'s, with the same arguments and errors.

    Args:
      key: PRNG key of the random tokens.
      params: the decoder's.
      config: its shape.
      n: N, keys and values to train in each layer.
      tokens: ids of a text, repeated or cut to n; random ones of the whole vocabulary if None.
      keys_values: `decoder.keys_values`, or a function that stands for it.

    Returns:
      float32 keys and values, with which the decoder computes what it computes after these tokens.
    """
    k_LNKh, v_LNKh = keys_values(params, init_prompt(key, params, config, n, tokens).vectors, config)
    return Prefix(k_LNKh.astype(jnp.float32), v_LNKh.astype(jnp.float32))


def attach(
    params: Any,
    trained: Prompt | Prefix,
    config: DecoderConfig,
    remat: str = "none",
    keys_values: Callable = decoder.keys_values,
) -> Prefixed:
    """Puts what is trained beside the parameters, as the argument of an `applied` function.

    Differentiate through it with respect to `trained`. A prompt is run through the decoder here, once: generate
    with the result, not with a new one for every token.

    Args:
      params: the decoder's.
      trained: from `init_prompt` or `init_prefix`.
      config: the decoder's shape.
      remat: as `decoder.hidden`, for the run of a prompt.
      keys_values: `decoder.keys_values`, or a function that stands for it.

    Returns:
      A pytree of both.

    Raises:
      ValueError: a prompt that does not fit the decoder; a prefix is checked where it is used.
    """
    if isinstance(trained, Prefix):
        return Prefixed(params, (trained.k, trained.v))
    shape = trained.vectors.shape
    if len(shape) != 2 or shape[1] != config.dim:
        raise ValueError(f"prompt: vectors {shape} do not fit this decoder: they are [N, {config.dim}]")
    return Prefixed(params, keys_values(params, trained.vectors, config, remat))


def applied(f: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `f` accept parameters with a prompt or a prefix attached.

    Args:
      f: a function `f(params, *args, prefix=..., **kwargs)`, such as `decoder.hidden`, `decoder.forward_with_cache`,
        or a function of these that hands `prefix` on.

    Returns:
      A function `(tree, *args, **kwargs)`; given plain parameters it is `f` itself.
    """

    @functools.wraps(f)
    def with_prefix(tree: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tree, Prefixed):
            return f(tree, *args, **kwargs)
        return f(tree.params, *args, prefix=tree.prefix, **kwargs)

    return with_prefix


def room(tree: Any, config: DecoderConfig) -> int:
    """Positions left for a text: the context without what `attach` has put before it.

    Args:
      tree: from `attach`, or plain parameters.
      config: the decoder's shape.

    Returns:
      The most tokens of a text, its answer included.
    """
    return config.context - (tree.prefix[0].shape[1] if isinstance(tree, Prefixed) else 0)
