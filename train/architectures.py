"""The shapes of well-known models, as their config.json says them: to plan a run before a weight is downloaded.

Source: the fields of each model's published config.json; of Gemma 3, those of its text model.
"""

from typing import Any

from lora_jax.models.config import DecoderConfig, from_hf

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}
_LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def _sizes(dim: int, hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | more


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA
    | _sizes(2048, 8192, 16, 32, rope_scaling=_LLAMA_ROPE | {"factor": 32.0}, tie_word_embeddings=True),
    "llama-3.1-8b": _LLAMA | _sizes(4096, 14336, 32, 32, rope_scaling=_LLAMA_ROPE),
    "llama-3.1-70b": _LLAMA | _sizes(8192, 28672, 80, 64, rope_scaling=_LLAMA_ROPE),
    "llama-3.1-405b": _LLAMA | _sizes(16384, 53248, 126, 128, rope_scaling=_LLAMA_ROPE),
    "qwen3-8b": _QWEN3
    | _sizes(4096, 12288, 36, 32, model_type="qwen3", num_key_value_heads=8, max_position_embeddings=40960),
    "qwen3-30b-a3b": _QWEN3
    | _sizes(
        2048,
        6144,
        48,
        32,
        model_type="qwen3_moe",
        num_key_value_heads=4,
        max_position_embeddings=40960,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "gemma-3-4b": _GEMMA3 | _sizes(2560, 10240, 34, 8, num_key_value_heads=4),
    "gemma-3-12b": _GEMMA3 | _sizes(3840, 15360, 48, 16, num_key_value_heads=8),
    "gemma-3-27b": _GEMMA3
    | _sizes(5376, 21504, 62, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
}


def decoder(name: str) -> DecoderConfig:
    """The shape of the model of this name, one of `ARCHITECTURES`."""
    return from_hf(ARCHITECTURES[name], name)
