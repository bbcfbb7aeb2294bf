"""Rotary positions: the angles, and the rotation.

Shapes: B batch, T time, h head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.models.config import DecoderConfig


class Angles(NamedTuple):
    """What positions do to queries and keys.

    Attributes:
      sin, cos: [B, T, 1, h/2], of the rotary angles, float32.
      rotated: whether there are such angles; None where all layers have some.
      growth: [B, T, 1, 1], float32, what queries are multiplied by; None for 1.
    """

    sin: jax.Array
    cos: jax.Array
    rotated: jax.Array | None = None
    growth: jax.Array | None = None


def rotary(positions_BT: jax.Array, config: DecoderConfig) -> Angles:
    """The angles of the layers; where some rotate otherwise or not at all, both are stacked, [2, ...], theirs last."""
    angles = Angles(*_scaled(positions_BT, config))
    if config.local_rope_base is not None:
        other = Angles(*_sin_cos(positions_BT, _frequencies(config, config.local_rope_base)))
    elif any(config.unrotated):
        angles = angles._replace(rotated=jnp.array(True))
        other = Angles(jnp.zeros_like(angles.sin), jnp.ones_like(angles.cos), jnp.array(False))
        if config.query_growth is not None:
            growth = _growth(positions_BT[:, :, None, None], *config.query_growth)
            angles, other = angles._replace(growth=jnp.ones_like(growth)), other._replace(growth=growth)
    else:
        return angles
    return jax.tree.map(lambda *both: jnp.stack(both), angles, other)


def _growth(position: jax.Array, step: float, strength: float) -> jax.Array:
    return 1 + strength * jnp.log1p(jnp.floor((position.astype(jnp.float32) + 1) / step))


def _scaled(positions_BT: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
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


def _sin_cos(positions_BT: jax.Array, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.sin(angle), jnp.cos(angle)


def rotate(x_BTHh: jax.Array, angles: Angles, neighbours: bool = False) -> jax.Array:
    """Rotates pairs (i, i + n), or neighbours (2i, 2i + 1), of every head's first 2n numbers by n angles."""
    sin, cos, width = angles.sin, angles.cos, 2 * angles.sin.shape[-1]
    rest = [] if width == x_BTHh.shape[-1] else [x_BTHh[..., width:]]
    turned = x_BTHh[..., :width] if rest else x_BTHh
    turned = turned.astype(jnp.float32)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if neighbours else jnp.split(turned, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = jnp.stack([a, b], axis=-1).reshape(turned.shape) if neighbours else jnp.concatenate([a, b], axis=-1)
    turned = turned.astype(x_BTHh.dtype)
    return jnp.concatenate([turned, *rest], axis=-1) if rest else turned
