"""What the metadata of a GGUF file says of a model, as the fields of a Hugging Face config.json."""

import dataclasses
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.models import config as configs


class Architecture(NamedTuple):
    """What a `general.architecture` of llama.cpp stands for.

    Attributes:
      model_type: of the same models' config.json.
      mixture: their `model_type` where layers have experts; "" for the same one.
      interleaved: neighbouring rows of rotary heads are pairs, not those half a head apart.
      wide: layers of the one size whose scores are divided by √(D/H), not √h; no field says it.
      unsaid: fields that the metadata has no key for.
    """

    model_type: str
    mixture: str = ""
    interleaved: bool = False
    wide: int | None = None
    unsaid: Mapping[str, Any] = {}


ARCHITECTURES = {
    "llama": Architecture("llama", "mixtral", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", unsaid={"norm_topk_prob": True}),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", wide=46),
    "gemma3": Architecture("gemma3_text", wide=62),
    "phi3": Architecture("phi3"),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "granite": Architecture("granite", interleaved=True),
}
NEEDED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.scale": "attention_multiplier",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}


def read(
    metadata: Mapping[str, Any],
    tensors: Container[str],
    factors: Mapping[str, Sequence[float]],
    source: str,
) -> configs.DecoderConfig:
    """The shape of a model.

    Args:
      metadata: the file's key/value pairs.
      tensors: the names of its tensors.
      factors: those that divide rotary frequencies: `freqs`, or `factors_short` and `factors_long`, if it has any.
      source: path named in error messages.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: a field is missing, or asks for something this decoder does not compute.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{source}: general.architecture {name!r} is not supported; use one of: {known}")
    arch, prefix = ARCHITECTURES[name], f"{name}."
    try:
        fields = {field: metadata[prefix + key] for key, field in NEEDED.items()}
        vocab = metadata.get(prefix + "vocab_size") or len(metadata["tokenizer.ggml.tokens"])
    except KeyError as missing:
        raise ValueError(f"{source}: the metadata field {missing} is missing") from None
    fields |= {field: metadata[prefix + key] for key, field in OPTIONAL.items() if metadata.get(prefix + key)}
    for field, value in fields.items():
        if isinstance(value, list):
            raise ValueError(f"{source}: {field} differs from layer to layer ({value}), which is not supported")
    heads, dim = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = fields.setdefault("head_dim", dim // heads)
    wide = fields["num_hidden_layers"] == arch.wide
    fields |= {
        **arch.unsaid,
        "model_type": arch.mixture or arch.model_type if "num_local_experts" in fields else arch.model_type,
        "vocab_size": vocab,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "query_pre_attn_scalar": None if arch.wide is None else dim // heads if wide else head_dim,
        "rope_theta": metadata.get(prefix + "rope.freq_base", 10_000.0),
        "partial_rotary_factor": metadata.get(prefix + "rope.dimension_count", head_dim) / head_dim,
        "rope_scaling": _scaling(metadata, prefix, factors, source),
    }
    config = configs.from_hf(fields, source)
    # Llama 3's scaling is in the file as its factors.
    return dataclasses.replace(config, rope_factors=tuple(factors["freqs"])) if "freqs" in factors else config


def _scaling(
    metadata: Mapping[str, Any], prefix: str, factors: Mapping[str, Sequence[float]], source: str
) -> dict[str, Any]:
    key = prefix + "rope.scaling."
    kind, factor = metadata.get(key + "type", "none"), metadata.get(key + "factor")
    if "factors_long" in factors:
        attention = {"attention_factor": metadata[key + "attn_factor"]} if key + "attn_factor" in metadata else {}
        lists = {"short_factor": factors["factors_short"], "long_factor": factors["factors_long"]}
        return {"rope_type": "longrope", **lists, **attention}
    if kind == "none" or not factor:
        return {}
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{source}: {key}type {kind!r} is not supported")
    return {"rope_type": kind, "factor": factor}
