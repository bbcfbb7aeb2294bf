"""What the config.json files of model families leave unsaid: all else in this folder branches on properties."""

from typing import Any, NamedTuple

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Unsaid(NamedTuple):
    """What the files of a family take for granted.

    Attributes:
      defaults: values of absent fields of config.json.
      properties: fields of `DecoderConfig` that config.json has no field for.
      scaled_embedding: embedded tokens are multiplied by √D.
      activations: the name here of each activation it may ask for.
    """

    defaults: dict[str, Any]
    properties: dict[str, Any]
    scaled_embedding: bool = False
    activations: dict[str, str] = ACTIVATIONS


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_QWEN = {"use_sliding_window": False, "max_window_layers": 28}
_SANDWICH = {"norm_offset": 1.0, "post_norm": True}
UNSAID = {
    "llama": Unsaid({}, {}),
    "mistral": Unsaid({"sliding_window": 4096}, {}),
    "qwen2": Unsaid(_QWEN, {"qkv_bias": True}),
    "qwen3": Unsaid({**_QWEN, "head_dim": 128}, {"qk_norm": "head"}),
    # Its older files say "gelu" and mean the approximation, as transformers reads them.
    "gemma": Unsaid(_GEMMA, {"norm_offset": 1.0}, True, {**ACTIVATIONS, "gelu": "gelu_tanh"}),
    "gemma2": Unsaid(
        {
            **_GEMMA,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _SANDWICH,
        scaled_embedding=True,
    ),
    "gemma3_text": Unsaid(
        {
            **_GEMMA,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        {**_SANDWICH, "qk_norm": "head"},
        scaled_embedding=True,
    ),
    "phi3": Unsaid({"rms_norm_eps": 1e-5}, {}),
    "olmo2": Unsaid({"rms_norm_eps": 1e-5}, {"qk_norm": "all", "pre_norm": False, "post_norm": True}),
    "smollm3": Unsaid(
        {"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4, "use_sliding_window": False},
        {},
    ),
    "granite": Unsaid({}, {}),
    "mixtral": Unsaid(
        {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
        {},
    ),
    "qwen3_moe": Unsaid(
        {
            "use_sliding_window": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        {"qk_norm": "head"},
    ),
    "qwen2_moe": Unsaid(
        {
            "use_sliding_window": False,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "max_window_layers": 28,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
        },
        {"shared_gate": True},
    ),
    "llama4_text": Unsaid(
        {
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8192,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 8192,
            "attn_scale": 0.1,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
        },
        {
            "rope_neighbours": True,
            "router": "sigmoid",
            "normalised_experts": False,
            "weighted_inputs": True,
            "shared_experts": 1,
        },
    ),
}
