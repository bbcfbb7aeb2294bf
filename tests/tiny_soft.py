"""A tiny decoder with prompts and prefixes as training might leave them."""

import functools

import jax
import numpy as np
import optax

from lora_jax import soft
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig

TINY = DecoderConfig("llama", 61, 32, 48, 2, 4, 2, 8, context=64)
N, T = 5, 12
KINDS = ["prompt", "prefix"]
REMATS = list(decoder.REMAT)
forward = jax.jit(soft.applied(decoder.forward), static_argnames=("config", "remat"))
speak = soft.applied(decoder.forward_with_cache)


def texts(batch=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(3, TINY.vocab, (batch, length))


def trained(kind, config=TINY):
    """A prompt or a prefix far from any start."""
    key = jax.random.key(7)
    if kind == "prompt":
        return soft.Prompt(jax.random.normal(key, (N, config.dim)))
    shape = (config.layers, N, config.kv_heads, config.head_dim)
    return soft.Prefix(*(jax.random.normal(key, shape) for key in jax.random.split(key)))


@functools.partial(jax.jit, static_argnames=("config", "remat"))
def gradient(small, params, tokens_BT, config, remat):
    """Of the mean loss of each text's tokens but the first."""

    def mean(small):
        tree = soft.attach(params, small, config, remat)
        logits_BTV = soft.applied(decoder.forward)(tree, tokens_BT, config, remat=remat)
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV[:, :-1], tokens_BT[:, 1:]).mean()

    return jax.grad(mean)(small)
