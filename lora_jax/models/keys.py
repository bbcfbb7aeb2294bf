"""Where each parameter of a model family lives in other libraries' files: one table per family.

An axis string names a tensor's axes by the letters of `sizes`; letters joined by a dot are one axis there.
"""

import math
from typing import NamedTuple

import numpy as np

from lora_jax.models.config import DecoderConfig


class Key(NamedTuple):
    """One parameter: its path here, its names in files, and its axes here and there."""

    path: str
    hf: str
    gguf: str
    axes: str
    file_axes: str
    rotary: bool = False


class Family(NamedTuple):
    """The tables of a family; its GGUF files pair neighbouring rows of rotary heads if `gguf_interleaved`."""

    layer: tuple[Key, ...]
    other: tuple[Key, ...]
    gguf_interleaved: bool


HEAD = "head/kernel"
FAMILIES = {
    "llama": Family(
        layer=(
            Key("attn_norm/scale", "input_layernorm", "attn_norm", "D", "D"),
            Key("q_proj/kernel", "self_attn.q_proj", "attn_q", "D H h", "H.h D", rotary=True),
            Key("k_proj/kernel", "self_attn.k_proj", "attn_k", "D K h", "K.h D", rotary=True),
            Key("v_proj/kernel", "self_attn.v_proj", "attn_v", "D K h", "K.h D"),
            Key("o_proj/kernel", "self_attn.o_proj", "attn_output", "H h D", "D H.h"),
            Key("mlp_norm/scale", "post_attention_layernorm", "ffn_norm", "D", "D"),
            Key("gate_proj/kernel", "mlp.gate_proj", "ffn_gate", "D F", "F D"),
            Key("up_proj/kernel", "mlp.up_proj", "ffn_up", "D F", "F D"),
            Key("down_proj/kernel", "mlp.down_proj", "ffn_down", "F D", "D F"),
        ),
        other=(
            Key("embed/embedding", "model.embed_tokens", "token_embd", "V D", "V D"),
            Key("final_norm/scale", "model.norm", "output_norm", "D", "D"),
            Key(HEAD, "lm_head", "output", "D V", "V D"),
        ),
        gguf_interleaved=True,
    ),
}


def table(config: DecoderConfig) -> list[Key]:
    """The keys of a model with this config, names complete; `{}` in a name stands for the layer."""
    family = FAMILIES[config.family]
    layer = [
        key._replace(
            path=f"layers/{key.path}",
            hf=f"model.layers.{{}}.{key.hf}.weight",
            gguf=f"blk.{{}}.{key.gguf}.weight",
        )
        for key in family.layer
    ]
    other = [
        key._replace(hf=f"{key.hf}.weight", gguf=f"{key.gguf}.weight")
        for key in family.other
        if not (config.tied and key.path == HEAD)
    ]
    return layer + other


def shape(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of one layer's parameter here."""
    size = sizes(config)
    return tuple(size[a] for a in key.axes.split())


def file_shape(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of one layer's tensor in a file."""
    size = sizes(config)
    return tuple(math.prod(size[a] for a in axis.split(".")) for axis in key.file_axes.split())


def from_file(x: np.ndarray, key: Key, config: DecoderConfig) -> np.ndarray:
    """One layer's tensor of a file, in the axes used here (a view)."""
    size, letters = sizes(config), key.file_axes.replace(".", " ").split()
    split = x.reshape([size[a] for a in letters])
    return split.transpose([letters.index(a) for a in key.axes.split()])


def to_file(x: np.ndarray, key: Key, config: DecoderConfig) -> np.ndarray:
    """The inverse of `from_file`."""
    letters = key.axes.split()
    order = [letters.index(a) for a in key.file_axes.replace(".", " ").split()]
    return x.transpose(order).reshape(file_shape(key, config))


def sizes(config: DecoderConfig) -> dict[str, int]:
    """The size each letter of an axis string stands for."""
    c = config
    return {"V": c.vocab, "D": c.dim, "F": c.hidden, "H": c.heads, "K": c.kv_heads, "h": c.head_dim}
