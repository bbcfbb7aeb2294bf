"""Tiny random models of every family, made with transformers, the oracle."""

import copy

import tiny_llama

torch, transformers = tiny_llama.torch, tiny_llama.transformers

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0],
}
WINDOW = {"sliding_window": 5}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
# Name -> the class of transformers' model, and the changes of its tiny config.
CASES = {
    "Llama 2": ("Llama", {"num_key_value_heads": 4}),
    "Llama 3.1, 3.2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "Llama, biases, YaRN": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "Llama, dynamic RoPE": (
        "Llama",
        {"max_position_embeddings": 12, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "Mistral": ("Mistral", {"sliding_window": None, **HEADS}),
    "Mistral, sliding window": ("Mistral", WINDOW),
    "Qwen2, Qwen2.5": ("Qwen2", {}),
    "Qwen2, upper layers sliding": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "Qwen3": ("Qwen3", HEADS),
    "Gemma 1": ("Gemma", {**HEADS, "tie_word_embeddings": True}),
    "Gemma 2": ("Gemma2", {**HEADS, **WINDOW, "tie_word_embeddings": True, "query_pre_attn_scalar": 24}),
    "Gemma 3 text": (
        "Gemma3",
        {**HEADS, **WINDOW, "tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
    ),
    "Phi-3, Phi-4": ("Phi3", {}),
    "Phi-4-mini": (
        "Phi3",
        {"rope_parameters": LONG, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64},
    ),
    "Phi-3, longer than it was trained for": (
        "Phi3",
        {"rope_parameters": LONG, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 2},
    ),
    "Mixtral": ("Mixtral", {"num_local_experts": 5}),
    "Qwen3-MoE": ("Qwen3Moe", {**HEADS, **EXPERTS}),
    "Qwen3-MoE, weights that add up to 1": ("Qwen3Moe", {**HEADS, **EXPERTS, "norm_topk_prob": True}),
    "Qwen2-MoE": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "Llama 4 text": (
        "Llama4",
        {
            **{"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "no_rope_layer_interval": 2},
            **{"attention_chunk_size": 6, "floor_scale": 3, "attn_scale": 0.4, "rope_parameters": LLAMA3},
        },
    ),
    "OLMo 2": ("Olmo2", {}),
    "SmolLM2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "SmolLM3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "Granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
    ),
}


def make(case: str, **more):
    """A float32 model with weights far enough from zero for every part to matter."""
    # A copy: transformers writes into the dicts of its configs.
    name, changes = CASES[case][0], CASES[case][1] | more
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}TextConfig" if name in ("Gemma3", "Llama4") else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**copy.deepcopy(tiny_llama.SMALL | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(case: str, texts) -> list:
    """Of each text by itself, on a model of its own: dynamic RoPE remembers the longest text that it has seen."""
    return [tiny_llama.logits(make(case), [text])[0] for text in texts]
