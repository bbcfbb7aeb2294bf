"""Rotary positions: the angles, and the rotation.

Shapes: B batch, T time, h head dim.
"""

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig

Angles = tuple[jax.Array, jax.Array]


def rotary(positions_BT: jax.Array, config: DecoderConfig) -> Angles:
    """Sines and cosines [B, T, 1, h/2] of the rotary angles, float32.

    Where some layers rotate otherwise or not at all, both are stacked: [2, B, T, 1, h/2], theirs last.
    """
    angles = _scaled(positions_BT, config)
    if config.local_rope_base is not None:
        other = _sin_cos(positions_BT, _frequencies(config, config.local_rope_base))
    elif any(config.unrotated):
        other = jnp.zeros_like(angles[0]), jnp.ones_like(angles[1])
    else:
        return angles
    return jnp.stack([angles[0], other[0]]), jnp.stack([angles[1], other[1]])


def _scaled(positions_BT: jax.Array, config: DecoderConfig) -> Angles:
    frequency = _frequencies(config, config.rope_base)
    if config.rope_stretch is not None:
        # The base of the series grows with the text, once it is longer than the context.
        length_B = jnp.maximum(jnp.max(positions_BT, axis=1) + 1, config.context).astype(jnp.float32)
        stretch_B = config.rope_stretch * length_B / config.context - (config.rope_stretch - 1)
        count = frequency.size
        power = -jnp.arange(count, dtype=jnp.float32) / max(count - 1, 1)
        frequency = frequency * stretch_B[:, None, None, None] ** power
    elif config.rope_long_factors is not None and config.rope_original is not None:
        long_B = jnp.max(positions_BT, axis=1) + 1 > config.rope_original
        factors = jnp.asarray([config.rope_factors, config.rope_long_factors], jnp.float32)
        frequency = frequency / factors[long_B.astype(jnp.int32)][:, None, None]
    elif config.rope_factors is not None:
        frequency = frequency / jnp.asarray(config.rope_factors, jnp.float32)
    sin, cos = _sin_cos(positions_BT, frequency)
    if config.rope_scale != 1:
        sin, cos = config.rope_scale * sin, config.rope_scale * cos
    return sin, cos


def _frequencies(config: DecoderConfig, base: float) -> jax.Array:
    half = (config.rotary_dim or config.head_dim) // 2
    return base ** (-jnp.arange(half, dtype=jnp.float32) / half)


def _sin_cos(positions_BT: jax.Array, frequency: jax.Array) -> Angles:
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BTHh: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + n) of every head's first 2n numbers by the n angles of its position."""
    width = 2 * sin.shape[-1]
    rest = [] if width == x_BTHh.shape[-1] else [x_BTHh[..., width:]]
    turned = x_BTHh[..., :width] if rest else x_BTHh
    a, b = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHh.dtype)
    return jnp.concatenate([turned, *rest], axis=-1) if rest else turned
