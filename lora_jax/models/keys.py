"""Where each parameter of a model family lives in other libraries' files: one table per family.

An axis string names a tensor's axes by the letters of `sizes`; letters joined by a dot are one axis there.
"""

import math
from typing import NamedTuple

import numpy as np

from lora_jax.models.config import DecoderConfig


class Key(NamedTuple):
    """One parameter: where it is here and in files.

    Attributes:
      path: its path here, within a layer or the model.
      hf: its tensor's name in Hugging Face files.
      axes: its axes here.
      file_axes: the tensor's axes. One that holds several parameters after another has them all, split by bars.
      when: the field of the config without which there is no such parameter; "" for always.
      part: which of the tensor's parameters it is.
      gguf: its tensor's name in llama.cpp's files; "" where these are not read.
      rotary: its rows belong to rotary pairs.
    """

    path: str
    hf: str
    axes: str
    file_axes: str
    when: str = ""
    part: int = 0
    gguf: str = ""
    rotary: bool = False


class Family(NamedTuple):
    """The tables of a family; its GGUF files pair neighbouring rows of rotary heads if `gguf_interleaved`."""

    layer: tuple[Key, ...]
    other: tuple[Key, ...]
    gguf_interleaved: bool = False


BIASES = (
    Key("q_proj/bias", "self_attn.q_proj", "H h", "H.h", when="qkv_bias"),
    Key("k_proj/bias", "self_attn.k_proj", "K h", "K.h", when="qkv_bias"),
    Key("v_proj/bias", "self_attn.v_proj", "K h", "K.h", when="qkv_bias"),
    Key("o_proj/bias", "self_attn.o_proj", "D", "D", when="o_bias"),
    Key("gate_proj/bias", "mlp.gate_proj", "F", "F", when="mlp_bias"),
    Key("up_proj/bias", "mlp.up_proj", "F", "F", when="mlp_bias"),
    Key("down_proj/bias", "mlp.down_proj", "D", "D", when="mlp_bias"),
)
PROJECTIONS = (
    Key("q_proj/kernel", "self_attn.q_proj", "D H h", "H.h D", gguf="attn_q", rotary=True),
    Key("k_proj/kernel", "self_attn.k_proj", "D K h", "K.h D", gguf="attn_k", rotary=True),
    Key("v_proj/kernel", "self_attn.v_proj", "D K h", "K.h D", gguf="attn_v"),
    Key("o_proj/kernel", "self_attn.o_proj", "H h D", "D H.h", gguf="attn_output"),
    Key("gate_proj/kernel", "mlp.gate_proj", "D F", "F D", gguf="ffn_gate"),
    Key("up_proj/kernel", "mlp.up_proj", "D F", "F D", gguf="ffn_up"),
    Key("down_proj/kernel", "mlp.down_proj", "F D", "D F", gguf="ffn_down"),
)
FUSED_PROJECTIONS = (
    *(
        Key(f"{name}/kernel", "self_attn.qkv_proj", f"D {heads} h", "H.h|K.h|K.h D", part=part)
        for part, (name, heads) in enumerate([("q_proj", "H"), ("k_proj", "K"), ("v_proj", "K")])
    ),
    Key("o_proj/kernel", "self_attn.o_proj", "H h D", "D H.h"),
    Key("gate_proj/kernel", "mlp.gate_up_proj", "D F", "F|F D", part=0),
    Key("up_proj/kernel", "mlp.gate_up_proj", "D F", "F|F D", part=1),
    Key("down_proj/kernel", "mlp.down_proj", "F D", "D F"),
)
NORMS_BEFORE = (
    Key("attn_norm/scale", "input_layernorm", "D", "D", gguf="attn_norm"),
    Key("mlp_norm/scale", "post_attention_layernorm", "D", "D", gguf="ffn_norm"),
)
NORMS_AROUND = (
    Key("attn_norm/scale", "input_layernorm", "D", "D"),
    Key("attn_post_norm/scale", "post_attention_layernorm", "D", "D"),
    Key("mlp_norm/scale", "pre_feedforward_layernorm", "D", "D"),
    Key("mlp_post_norm/scale", "post_feedforward_layernorm", "D", "D"),
)
NORMS_AFTER = (
    Key("attn_post_norm/scale", "post_attention_layernorm", "D", "D"),
    Key("mlp_post_norm/scale", "post_feedforward_layernorm", "D", "D"),
)
HEAD_NORMS = (
    Key("q_norm/scale", "self_attn.q_norm", "q", "q", when="qk_norm"),
    Key("k_norm/scale", "self_attn.k_norm", "k", "k", when="qk_norm"),
)
OUTSIDE = (
    Key("embed/embedding", "model.embed_tokens", "V D", "V D", gguf="token_embd"),
    Key("final_norm/scale", "model.norm", "D", "D", gguf="output_norm"),
    Key("head/kernel", "lm_head", "D V", "V D", when="untied", gguf="output"),
)
_LLAMA = Family((*NORMS_BEFORE, *PROJECTIONS, *BIASES, *HEAD_NORMS), OUTSIDE, gguf_interleaved=True)
_GEMMA = Family((*NORMS_AROUND, *PROJECTIONS, *BIASES, *HEAD_NORMS), OUTSIDE)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family((*NORMS_BEFORE, *FUSED_PROJECTIONS), OUTSIDE),
    "olmo2": Family((*NORMS_AFTER, *PROJECTIONS, *BIASES, *HEAD_NORMS), OUTSIDE),
    "smollm3": _LLAMA,
    "granite": _LLAMA,
}


def table(config: DecoderConfig) -> list[Key]:
    """The keys of a model with this config, names complete; `{}` in a name stands for the layer."""

    def complete(key: Key, path: str, hf: str, gguf: str) -> Key:
        end = "bias" if key.path.endswith("/bias") else "weight"
        return key._replace(path=path + key.path, hf=f"{hf}{key.hf}.{end}", gguf=f"{gguf}{key.gguf}.{end}")

    family = FAMILIES[config.family]
    keys = [complete(key, "layers/", "model.layers.{}.", "blk.{}.") for key in family.layer]
    keys += [complete(key, "", "", "") for key in family.other]
    return [key for key in keys if not key.when or getattr(config, key.when)]


def tensors(config: DecoderConfig) -> dict[str, list[Key]]:
    """The keys by the names of their tensors in Hugging Face files, those of one tensor in its order."""
    found: dict[str, list[Key]] = {}
    for key in sorted(table(config), key=lambda key: key.part):
        found.setdefault(key.hf, []).append(key)
    return found


def shape(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of one layer's parameter here."""
    size = sizes(config)
    return tuple(size[a] for a in key.axes.split())


def file_shape(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of one layer's tensor in a file."""
    size = sizes(config)
    return tuple(sum(_widths(axis, size)) for axis in key.file_axes.split())


def from_file(x: np.ndarray, key: Key, config: DecoderConfig) -> np.ndarray:
    """One layer's parameter, in the axes used here, out of its tensor in a file (a view)."""
    size, axes = sizes(config), _own_axes(key)
    widths = _widths(key.file_axes.split()[0], size)
    x = x[sum(widths[: key.part]) :][: widths[key.part]]
    letters = axes.replace(".", " ").split()
    split = x.reshape([size[a] for a in letters])
    return split.transpose([letters.index(a) for a in key.axes.split()])


def to_file(x: np.ndarray, key: Key, config: DecoderConfig) -> np.ndarray:
    """The inverse of `from_file`: the rows of the tensor that are this parameter's."""
    letters, axes, size = key.axes.split(), _own_axes(key), sizes(config)
    order = [letters.index(a) for a in axes.replace(".", " ").split()]
    return x.transpose(order).reshape([sum(_widths(axis, size)) for axis in axes.split()])


def _own_axes(key: Key) -> str:
    """The file's axes, without the other parameters of the tensor."""
    first, *rest = key.file_axes.split()
    return " ".join([first.split("|")[key.part], *rest])


def _widths(axis: str, size: dict[str, int]) -> list[int]:
    return [math.prod(size[a] for a in part.split(".")) for part in axis.split("|")]


def sizes(config: DecoderConfig) -> dict[str, int]:
    """The size each letter of an axis string stands for; q and k are what the norms of queries and keys span."""
    c = config
    q, k = (c.heads, c.kv_heads) if c.qk_norm == "all" else (1, 1)
    size = {"V": c.vocab, "D": c.dim, "F": c.hidden, "H": c.heads, "K": c.kv_heads, "h": c.head_dim}
    return size | {"q": q * c.head_dim, "k": k * c.head_dim}
