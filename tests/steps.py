"""One training step of the scanned decoder in several ways, for the proofs of what a lifted step costs."""

import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lora
from lora_jax.models import decoder, loss, modules
from lora_jax.models.config import DecoderConfig

SMOLLM2 = DecoderConfig(
    family="llama",
    vocab=49152,
    dim=576,
    hidden=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    context=8192,
    rope_base=1e5,
    tied=True,
)
RANK, SCALE = 16, 2.0


class ByHand(nnx.Module):
    """The decoder's linear layer as one would rewrite it for LoRA: x·W + γ (x·a)·b."""

    def __init__(self, shape, rngs, contract=1):
        del rngs
        self.kernel = nnx.Param(jnp.zeros(shape))
        self.a = nnx.Param(jnp.zeros((*shape[:contract], RANK)))
        self.b = nnx.Param(jnp.zeros((*shape[contract:], RANK)))

    def __call__(self, x_ND):
        W, a, b = (param[...].astype(x_ND.dtype) for param in (self.kernel, self.a, self.b))
        low_ND = SCALE * (x_ND @ a.reshape(-1, RANK)) @ b.reshape(-1, RANK).T
        return checkpoint_name(x_ND @ W.reshape(x_ND.shape[-1], -1) + low_ND, "kept")


def rewritten(f):
    """`f` with the decoder's linear layer rewritten by hand."""

    @functools.wraps(f)
    def call(*args):
        # The decoder caches its module; this one is made afresh.
        fresh = mock.patch.object(decoder, "_graph", decoder._graph.__wrapped__)
        with fresh, mock.patch.object(modules, "Projection", ByHand):
            return f(*args)

    return call


class Steps:
    """Functions `(adapters, params, batch) -> (loss, gradients)`: one step of fine-tuning the decoder."""

    def __init__(self, config: DecoderConfig, remat: str):
        self.config, self.remat = config, remat

    def loss(self, params, batch):
        hidden_BTD = decoder.hidden(params, batch["tokens"], self.config, remat=self.remat)
        total, weight = loss.cross_entropy(params, hidden_BTD, batch["targets"], batch["weights"], self.config)
        return total / weight

    def lifted(self, adapters, params, batch):
        """LoRA on the decoder as it is."""
        lifted = lora.lift(self.loss)
        return jax.value_and_grad(lambda adapters: lifted(lora.attach(params, adapters), batch))(adapters)

    def by_hand(self, adapters, params, batch):
        """LoRA written into the decoder."""

        def with_factors(adapters):
            layers = {name: dict(leaves) for name, leaves in params["layers"].items()}
            for path, adapter in adapters.items():
                layers[path.split("/")[1]] |= {"a": adapter.a, "b": adapter.b}
            return rewritten(self.loss)(params | {"layers": layers}, batch)

        return jax.value_and_grad(with_factors)(adapters)

    def merged(self, adapters, params, batch):
        """LoRA by handing W + γ a b to the decoder."""
        return jax.value_and_grad(lambda adapters: self.loss(lora.merge(params, adapters), batch))(adapters)

    def full(self, adapters, params, batch):
        """Full fine-tuning."""
        del adapters
        return jax.value_and_grad(self.loss)(params, batch)


def shapes(config: DecoderConfig, dtype=jnp.float32, batch=4, length=256):
    """Adapters, parameters and batch of a step, as shapes."""
    params = jax.eval_shape(lambda key: decoder.init(key, config, dtype), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    sites = lora.trace(decoder.hidden, params, tokens, config)
    spec = lora.Spec(rank=RANK, alpha=SCALE * RANK)
    adapters = jax.eval_shape(lambda key: lora.init(key, params, sites, spec), jax.random.key(0))
    return adapters, params, {"tokens": tokens, "targets": tokens, "weights": weights}


def values(config: DecoderConfig, batch=2, length=24):
    """The same as arrays, both factors random."""
    rng = np.random.default_rng(0)

    def array(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, config.vocab, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)

    adapters, _, data = shapes(config, batch=batch, length=length)
    adapters = jax.tree.map(lambda leaf: 0.1 * array(leaf), adapters)
    data = {name: array(leaf) for name, leaf in data.items()} | {"weights": jnp.ones((batch, length))}
    return adapters, decoder.init(jax.random.key(1), config), data


def sizes(params) -> set[int]:
    """How many elements the base's weights have: one layer's, and a stack's."""
    layers = {math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(params["layers"])}
    return layers | {math.prod(leaf.shape) for leaf in jax.tree.leaves(params)}
