"""Where each parameter of a model family lives in other libraries' files: one table per family.

An axis string names a tensor's axes by the letters of `sizes`; letters joined by a dot are one axis there. Holes in the
name of a tensor, `{}`, stand for the layer, and for the expert.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from lora_jax.models.config import DecoderConfig

Index = tuple[slice, ...]


class Key(NamedTuple):
    """One parameter: where it is here and in files.

    Attributes:
      path: its path here, within a layer or the model.
      hf: its tensor's name in Hugging Face files.
      axes: its axes here, after those of `stack`.
      file_axes: the tensor's axes. One that holds several parameters after another has them all, split by bars.
      when: the field of the config without which there is no such parameter; "" for always.
      part: which of the tensor's parameters it is.
      rotary: its rows belong to rotary pairs.
      array: the tensor has a matrix for every expert, and is no weight of a module: nothing follows its name.
    """

    path: str
    hf: str
    axes: str
    file_axes: str
    when: str = ""
    part: int = 0
    rotary: bool = False
    array: bool = False


class Family(NamedTuple):
    """The tables of a family: of a layer, and of what is outside the layers."""

    layer: tuple[Key, ...]
    other: tuple[Key, ...]


ATTENTION = (
    Key("q_proj/kernel", "self_attn.q_proj", "D H h", "H.h D", rotary=True),
    Key("k_proj/kernel", "self_attn.k_proj", "D K h", "K.h D", rotary=True),
    Key("v_proj/kernel", "self_attn.v_proj", "D K h", "K.h D"),
    Key("o_proj/kernel", "self_attn.o_proj", "H h D", "D H.h"),
    Key("q_proj/bias", "self_attn.q_proj", "H h", "H.h", when="qkv_bias", rotary=True),
    Key("k_proj/bias", "self_attn.k_proj", "K h", "K.h", when="qkv_bias", rotary=True),
    Key("v_proj/bias", "self_attn.v_proj", "K h", "K.h", when="qkv_bias"),
    Key("o_proj/bias", "self_attn.o_proj", "D", "D", when="o_bias"),
)
MLP = (
    Key("gate_proj/kernel", "mlp.gate_proj", "D F", "F D"),
    Key("up_proj/kernel", "mlp.up_proj", "D F", "F D"),
    Key("down_proj/kernel", "mlp.down_proj", "F D", "D F"),
    Key("gate_proj/bias", "mlp.gate_proj", "F", "F", when="mlp_bias"),
    Key("up_proj/bias", "mlp.up_proj", "F", "F", when="mlp_bias"),
    Key("down_proj/bias", "mlp.down_proj", "D", "D", when="mlp_bias"),
)
MIXTRAL_EXPERTS = (
    Key("router/kernel", "block_sparse_moe.gate", "D E", "E D"),
    Key("gate_proj/kernel", "block_sparse_moe.experts.{}.w1", "D F", "F D"),
    Key("up_proj/kernel", "block_sparse_moe.experts.{}.w3", "D F", "F D"),
    Key("down_proj/kernel", "block_sparse_moe.experts.{}.w2", "F D", "D F"),
)
EXPERTS = (
    Key("router/kernel", "mlp.gate", "D E", "E D"),
    Key("gate_proj/kernel", "mlp.experts.{}.gate_proj", "D F", "F D"),
    Key("up_proj/kernel", "mlp.experts.{}.up_proj", "D F", "F D"),
    Key("down_proj/kernel", "mlp.experts.{}.down_proj", "F D", "D F"),
)
EXPERT_ARRAYS = (
    Key("router/kernel", "feed_forward.router", "D E", "E D"),
    Key("gate_proj/kernel", "feed_forward.experts.gate_up_proj", "E D F", "E D F|F", part=0, array=True),
    Key("up_proj/kernel", "feed_forward.experts.gate_up_proj", "E D F", "E D F|F", part=1, array=True),
    Key("down_proj/kernel", "feed_forward.experts.down_proj", "E F D", "E F D", array=True),
    Key("shared/gate_proj/kernel", "feed_forward.shared_expert.gate_proj", "D S", "S D"),
    Key("shared/up_proj/kernel", "feed_forward.shared_expert.up_proj", "D S", "S D"),
    Key("shared/down_proj/kernel", "feed_forward.shared_expert.down_proj", "S D", "D S"),
)
SHARED_EXPERT = (
    Key("shared/gate_proj/kernel", "mlp.shared_expert.gate_proj", "D S", "S D", when="shared_experts"),
    Key("shared/up_proj/kernel", "mlp.shared_expert.up_proj", "D S", "S D", when="shared_experts"),
    Key("shared/down_proj/kernel", "mlp.shared_expert.down_proj", "S D", "D S", when="shared_experts"),
    Key("shared/score/kernel", "mlp.shared_expert_gate", "D 1", "1 D", when="shared_experts"),
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
    Key("attn_norm/scale", "input_layernorm", "D", "D"),
    Key("mlp_norm/scale", "post_attention_layernorm", "D", "D"),
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
    Key("embed/embedding", "model.embed_tokens", "V D", "V D"),
    Key("final_norm/scale", "model.norm", "D", "D"),
    Key("head/kernel", "lm_head", "D V", "V D", when="untied"),
)
_LLAMA = Family((*NORMS_BEFORE, *ATTENTION, *MLP, *HEAD_NORMS), OUTSIDE)
_GEMMA = Family((*NORMS_AROUND, *ATTENTION, *MLP, *HEAD_NORMS), OUTSIDE)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": Family((*NORMS_BEFORE, *FUSED_PROJECTIONS), OUTSIDE),
    "olmo2": Family((*NORMS_AFTER, *ATTENTION, *MLP, *HEAD_NORMS), OUTSIDE),
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "mixtral": Family((*NORMS_BEFORE, *ATTENTION, *MIXTRAL_EXPERTS), OUTSIDE),
    "qwen3_moe": Family((*NORMS_BEFORE, *ATTENTION, *EXPERTS, *HEAD_NORMS), OUTSIDE),
    "qwen2_moe": Family((*NORMS_BEFORE, *ATTENTION, *EXPERTS, *SHARED_EXPERT), OUTSIDE),
    "llama4_text": Family((*NORMS_BEFORE, *ATTENTION, *EXPERT_ARRAYS), OUTSIDE),
}


def table(config: DecoderConfig) -> list[Key]:
    """The keys of a model with this config, paths and names complete."""

    def complete(key: Key, path: str, hf: str) -> Key:
        end = "" if key.array else ".bias" if key.path.endswith("/bias") else ".weight"
        return key._replace(path=path + key.path, hf=f"{hf}{key.hf}{end}")

    family = FAMILIES[config.family]
    keys = [complete(key, "layers/", "model.layers.{}.") for key in family.layer]
    keys += [complete(key, "", "") for key in family.other]
    return [key for key in keys if not key.when or getattr(config, key.when)]


def tensors(config: DecoderConfig) -> dict[str, list[Key]]:
    """The keys by the names of their tensors in Hugging Face files, those of one tensor in its order."""
    found: dict[str, list[Key]] = {}
    for key in sorted(table(config), key=lambda key: key.part):
        found.setdefault(key.hf, []).append(key)
    return found


def stack(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """How many tensors are stacked here to one parameter, on leading axes: (), (layers,) or (layers, experts)."""
    return (config.layers, config.experts)[: key.hf.count("{}")]


def matrices(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """How many matrices are stacked here to one parameter, on leading axes: `stack`, with the experts of an array."""
    return (config.layers, config.experts)[: leading(key)]


def leading(key: Key) -> int:
    """The number of these axes."""
    return key.hf.count("{}") + key.array


def places(key: Key, config: DecoderConfig) -> list[tuple[int, ...]]:
    """The index of each tensor in the stacked parameter; it also fills the holes of the name."""
    return list(itertools.product(*map(range, stack(key, config))))


def axis_names(config: DecoderConfig) -> dict[str, str]:
    """The letters of every parameter's axes here, L and E those of the stack: `{pattern of its path: "L D F"}`."""
    return {f"^{key.path}$": " ".join([*"LE"[: key.hf.count("{}")], key.axes]) for key in table(config)}


def shape(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of one tensor's part of the parameter here."""
    size = sizes(config)
    return tuple(size[a] for a in key.axes.split())


def file_shape(key: Key, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of a tensor in a file."""
    size = sizes(config)
    return tuple(sum(_widths(axis, size)) for axis in key.file_axes.split())


def from_file(x: Any, key: Key, config: DecoderConfig, index: Index | None = None) -> np.ndarray:
    """One tensor's part of a parameter, or some of it, in the axes used here.

    Args:
      x: the tensor, or what gives the slices of it that it is asked for.
      key: the parameter.
      config: the decoder's shape.
      index: a slice for each of the key's axes; None for all.

    Returns:
      A view of what x gives: nothing beside the index but for an axis that is several here and cut along a later one.
    """
    size, letters, own = sizes(config), key.axes.split(), _own_axes(key)
    cuts = {
        a: slice(*cut.indices(size[a])) for a, cut in zip(letters, index or [slice(None)] * len(letters), strict=True)
    }
    starts = [sum(_widths(axis, size)[: key.part]) if "|" in axis else 0 for axis in key.file_axes.split()]
    window = []
    for start, axis in zip(starts, own.split(), strict=True):
        first, *rest = axis.split(".")
        width = math.prod(size[a] for a in rest)
        window.append(slice(start + cuts[first].start * width, start + cuts[first].stop * width))
        size[first], cuts[first] = cuts[first].stop - cuts[first].start, slice(None)
    order = own.replace(".", " ").split()
    split = x[tuple(window)].reshape([size[a] for a in order])
    return split.transpose([order.index(a) for a in letters])[tuple(cuts[a] for a in letters)]


def to_file(x: np.ndarray, key: Key, config: DecoderConfig) -> np.ndarray:
    """The inverse of `from_file`: what of the tensor is this parameter's."""
    letters, axes, size = key.axes.split(), _own_axes(key), sizes(config)
    order = [letters.index(a) for a in axes.replace(".", " ").split()]
    return x.transpose(order).reshape([sum(_widths(axis, size)) for axis in axes.split()])


def shared_axis(key: Key) -> int:
    """The axis of the tensor along which it holds several parameters; 0 where it holds one."""
    return next((i for i, axis in enumerate(key.file_axes.split()) if "|" in axis), 0)


def _own_axes(key: Key) -> str:
    """The file's axes, without the other parameters of the tensor."""
    return " ".join(axis.split("|")[key.part if "|" in axis else 0] for axis in key.file_axes.split())


def _widths(axis: str, size: dict[str, int]) -> list[int]:
    return [math.prod(size[a] for a in part.split(".")) for part in axis.split("|")]


def sizes(config: DecoderConfig) -> dict[str, int]:
    """The size each letter of an axis string stands for; q and k are what the norms of queries and keys span."""
    c = config
    q, k = (c.heads, c.kv_heads) if c.qk_norm == "all" else (1, 1)
    size = {"V": c.vocab, "D": c.dim, "F": c.hidden, "E": c.experts, "H": c.heads, "K": c.kv_heads, "h": c.head_dim}
    return size | {"1": 1, "S": c.shared_experts * c.hidden, "q": q * c.head_dim, "k": k * c.head_dim}
