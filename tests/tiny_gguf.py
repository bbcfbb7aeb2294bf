"""Tiny GGUF files, written from the tensors of a tiny Hugging Face folder as llama.cpp's converter does."""

import json
import re

import gguf
import numpy as np
import safetensors.numpy
import tiny

from lora_jax.interop import safetensors as reader
from lora_jax.models import config as configs

FLOAT32 = gguf.GGMLQuantizationType.F32


def interleave(x, head_dim):
    """Rows of each head from 0 ... h-1 to (0, h/2, 1, h/2 + 1, ...)."""
    order = [i for pair in range(head_dim // 2) for i in (pair, pair + head_dim // 2)]
    return x.reshape(-1, head_dim, *x.shape[1:])[:, order].reshape(x.shape)


ARCHITECTURES = {"mixtral": "llama", "mistral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
INTERLEAVED = ("llama", "mistral", "mixtral", "smollm3", "granite")
# What llama.cpp's converter writes of the fields of a config.json that not all have.
WRITTEN = {
    "head_dim": "add_key_length",
    "sliding_window": "add_sliding_window",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "num_local_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "attention_multiplier": "add_attention_scale",
    "logits_scaling": "add_logit_scale",
}


def write(path, folder, kind=FLOAT32, **metadata):
    """Writes the model in `folder` to a GGUF file with matrices of one type; returns its path."""
    settings = json.loads((folder / "config.json").read_text())
    family, layers = settings["model_type"], settings["num_hidden_layers"]
    arch = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_vocab_size(settings["vocab_size"])
    for field, add in WRITTEN.items():
        if settings.get(field):
            getattr(writer, add)(settings[field])
    head_dim = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    write_rope(writer, settings, head_dim)
    write_tokenizer(writer)
    for name, value in metadata.items():
        writer.add_key_value(name.replace("__", "."), *value)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), layers)
    for hf, x in merged(safetensors.numpy.load_file(folder / reader.WEIGHTS)).items():
        if family in INTERLEAVED and re.search(r"[qk]_proj", hf):
            x = interleave(x, head_dim)
        if family.startswith("gemma") and hf.endswith("norm.weight"):
            x = x + 1
        chosen = kind if x.ndim > 1 else FLOAT32
        stem, end = hf.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{end}", gguf.quantize(x, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def merged(tensors):
    """The tensors, those of the experts of a layer in one."""
    experts = {}
    for name in sorted(tensors):  # fewer than ten experts
        experts.setdefault(re.sub(r"experts\.\d", "experts", name), []).append(tensors[name])
    return {name: x[0] if name in tensors else np.stack(x) for name, x in experts.items()}


def write_rope(writer, settings, head_dim):
    rope = settings.get("rope_parameters") or settings
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * full.get("partial_rotary_factor", 1)))
    if "long_factor" in rope:
        original = settings.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))
    elif full.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
        if "original_max_position_embeddings" in full:
            writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    elif full.get("rope_type") == "llama3":
        factors = configs.from_hf(settings).rope_factors
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))


def write_tokenizer(writer):
    tok = tiny.tokenizer()
    model = json.loads(tok.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    kinds = [gguf.TokenType.CONTROL if t in tiny.SPECIAL else gguf.TokenType.NORMAL for t in vocab]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.CHATML)
