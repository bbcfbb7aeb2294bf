"""What differs from layer to layer beside the parameters: numbers that are scanned with them.

Shapes: B batch, T time.
"""

import jax
import jax.numpy as jnp

from lora_jax.models import rope
from lora_jax.models.config import DecoderConfig

Numbers = dict[str, jax.Array]


def numbers(config: DecoderConfig) -> Numbers:
    """Arrays [L]; of what all layers have alike, none."""
    varying = {}
    for size, layers in (("window", config.sliding), ("chunk", config.chunked)):
        if layers:
            everything = jnp.iinfo(jnp.int32).max
            own = [getattr(config, size) if has else everything for has in layers]
            varying[size] = jnp.array(own, jnp.int32)
    other = config.unrotated if config.local_rope_base is None else config.sliding
    if any(other):
        varying["other_angles"] = jnp.array(other, jnp.int32)
    return varying


def angles(varying: Numbers, angles: rope.Angles) -> rope.Angles:
    """The angles of a layer, of the two that `rope.rotary` gives where layers differ."""
    if "other_angles" not in varying:
        return angles
    return jax.tree.map(lambda both: both[varying["other_angles"]], angles)


def segments(
    varying: Numbers, config: DecoderConfig, segments_BT: jax.Array | None, positions_BT: jax.Array
) -> jax.Array | None:
    """The segments that a layer keeps apart: where it cuts texts, the pieces of each."""
    size = varying.get("chunk", config.chunk)
    if size is None:
        return segments_BT
    piece_BT = positions_BT // size
    return piece_BT if segments_BT is None else segments_BT * (jnp.max(piece_BT) + 1) + piece_BT
