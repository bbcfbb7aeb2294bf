"""Next-token loss over a large vocabulary.

Shapes: B batch, T time, D model, V vocabulary, N tokens of a chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.models import decoder, partition
from lora_jax.models.config import DecoderConfig


def cross_entropy(
    params: Any,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    config: DecoderConfig,
    chunk: int | None = None,
    once: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Σ w·(log Σ exp z - z_target) with logits z = head(hidden), in float32.

    A step costs two products with the head where it holds all logits or computes them `once`, else three.

    Args:
      params: the decoder's parameters.
      hidden_BTD: from `decoder.hidden`.
      targets_BT: token ids to predict.
      weights_BT: 0 where a token does not count.
      config: the decoder's shape.
      chunk: tokens whose logits are held at once, the last filled up with weights 0; None holds all.
      once: no logits are computed twice: the gradient of `hidden_BTD`, and if it is asked for that of the head, is
        computed in the forward pass, chunk by chunk. The head cannot carry an adapter then: a lifted function says so.

    Returns:
      Sum of weighted losses in nats and sum of weights, float32 scalars.
    """
    weights_BT = weights_BT.astype(jnp.float32)
    chunks = [partition.chunks(x, chunk or targets_BT.size) for x in (hidden_BTD, targets_BT, weights_BT)]
    part = "embed" if config.tied else "head"
    total: Any
    if once:
        total = _in_one_pass(config, {part: params[part]}, *chunks)
    elif chunk is None:
        total = _chunk_loss(params, config, *(x[0] for x in chunks))
    else:
        step = jax.checkpoint(functools.partial(_chunk_loss, params, config), prevent_cse=False)
        total, _ = jax.lax.scan(lambda sum_, xs: (sum_ + step(*xs), None), jnp.float32(0), chunks)
    return total, jnp.sum(weights_BT)


def _chunk_loss(params, config, hidden_ND, targets_N, weights_N) -> jax.Array:
    return _loss(decoder.head(params, hidden_ND, config), targets_N, weights_N)


def _loss(logits_NV, targets_N, weights_N) -> jax.Array:
    # Not a gather: its gradient, a scatter, would need the logits' size once more.
    is_target_NV = jnp.arange(logits_NV.shape[-1]) == targets_N[:, None]
    target_N = jnp.sum(jnp.where(is_target_NV, logits_NV, 0.0), axis=-1)
    return jnp.sum(weights_N * (jax.nn.logsumexp(logits_NV, axis=-1) - target_N))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_one_pass(config, params, hidden_CND, targets_CN, weights_CN) -> jax.Array:
    step = functools.partial(_chunk_loss, params, config)
    return jax.lax.scan(
        lambda sum_, xs: (sum_ + step(*xs), None), jnp.float32(0), (hidden_CND, targets_CN, weights_CN)
    )[0]


def _forward(config, params, hidden_CND, targets_CN, weights_CN):
    def primal(x):
        return hasattr(x, "perturbed")

    learned = any(x.perturbed for x in jax.tree.leaves(params, is_leaf=primal))
    params = jax.tree.map(lambda x: x.value, params, is_leaf=primal)
    gradient = jax.value_and_grad(_chunk_loss, argnums=(2, 0) if learned else (2,))

    def step(sums, xs):
        loss, (of_hidden_ND, *of_head) = gradient(params, config, *xs)
        return jax.tree.map(lambda sum_, x: sum_ + x.astype(sum_.dtype), sums, (loss, of_head)), of_hidden_ND

    zeros = [jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)] if learned else []
    xs = hidden_CND.value, targets_CN.value, weights_CN.value
    (total, of_head), of_hidden_CND = jax.lax.scan(step, (jnp.float32(0), zeros), xs)
    return total, (jax.tree.map(lambda g, w: g.astype(w.dtype), of_head, [params] * learned), of_hidden_CND)


def _backward(config, gradients, cotangent):
    def scaled(x):
        return cotangent.astype(x.dtype) * x

    of_head, of_hidden_CND = jax.tree.map(scaled, gradients)
    return of_head[0] if of_head else None, of_hidden_CND, None, None


_in_one_pass.defvjp(_forward, _backward, symbolic_zeros=True)
