"""What a decoder is made of, read from a Hugging Face `config.json` or from the metadata of a GGUF file."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so that jitted functions can take it as a static argument.

    Attributes:
      family: name of its table in `keys.FAMILIES`.
      vocab, dim, hidden, layers, heads, kv_heads, head_dim: the sizes V, D, F, L, H, K, h.
      context: positions it was trained on.
      norm_eps: added to the mean square in the norms.
      rope_base: base of the geometric series of rotary frequencies.
      rope_factors: what each of the h/2 rotary frequencies is divided by; None for no scaling.
      tied: the head is the transposed embedding.
    """

    family: str
    vocab: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_factors: tuple[float, ...] | None = None
    tied: bool = False


def from_hf(config: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Reads the fields of a Hugging Face `config.json`.

    Args:
      config: the parsed JSON.
      source: path named in error messages.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: a field is missing, or asks for something this decoder does not compute.
    """
    if config.get("model_type") != "llama":
        raise ValueError(f"{source}: model_type {config.get('model_type')!r} is not supported; use one of: llama")
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for name, value in required.items():
        if config.get(name, value) != value:
            raise ValueError(f"{source}: {name}={config[name]!r} is not supported, only {value!r}")
    try:
        heads, dim = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or dim // heads
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_base = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
        read = DecoderConfig(
            family="llama",
            vocab=config["vocab_size"],
            dim=dim,
            hidden=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            context=config["max_position_embeddings"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_base=rope_base,
            rope_factors=_rope_factors(rope, rope_base, head_dim, source),
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as missing:
        raise ValueError(f"{source}: the field {missing} is missing; is this a model's config.json?") from None
    return _checked(read, source)


def from_gguf(
    metadata: Mapping[str, Any],
    tied: bool,
    rope_factors: tuple[float, ...] | None = None,
    source: str = "the GGUF file",
) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: the file's key/value pairs.
      tied: the file has no output matrix of its own.
      rope_factors: the file's `rope_freqs` tensor, if it has one.
      source: path named in error messages.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: a field is missing, or asks for something this decoder does not compute.
    """
    arch = metadata.get("general.architecture")
    if arch != "llama":
        raise ValueError(f"{source}: general.architecture {arch!r} is not supported; use one of: llama")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{source}: llama.rope.scaling.type {scaling!r} is not supported")
    if metadata.get("llama.expert_count", 0):
        raise ValueError(f"{source}: {metadata['llama.expert_count']} experts per layer are not supported")
    try:
        heads, dim = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
        read = DecoderConfig(
            family=arch,
            vocab=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
            dim=dim,
            hidden=metadata["llama.feed_forward_length"],
            layers=metadata["llama.block_count"],
            heads=heads,
            kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=metadata.get("llama.attention.key_length", dim // heads),
            context=metadata["llama.context_length"],
            norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
            rope_base=metadata.get("llama.rope.freq_base", 10_000.0),
            rope_factors=rope_factors,
            tied=tied,
        )
    except KeyError as missing:
        raise ValueError(f"{source}: the metadata field {missing} is missing") from None
    return _checked(read, source)


def _checked(config: DecoderConfig, source: str) -> DecoderConfig:
    if config.heads % config.kv_heads:
        raise ValueError(f"{source}: {config.heads} query heads cannot share {config.kv_heads} key/value heads")
    return config


def _rope_factors(rope: Mapping[str, Any], base: float, head_dim: int, source: str) -> tuple[float, ...] | None:
    """What a Hugging Face `rope_parameters` entry divides each frequency by."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    count = head_dim // 2
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * count
    if kind != "llama3":
        raise ValueError(f"{source}: rope type {kind!r} is not supported; use one of: default, linear, llama3")
    # Frequencies that turn less than `low` times over the original context are slowed by `factor`,
    # those that turn more than `high` times are kept, and the ones between are interpolated.
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    factors = []
    for i in range(count):
        turns = rope["original_max_position_embeddings"] * base ** (-2 * i / head_dim) / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1 - kept) / factor + kept))
    return tuple(factors)
