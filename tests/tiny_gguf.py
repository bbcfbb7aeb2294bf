"""Tiny GGUF files, written from the tensors of a tiny Hugging Face folder as llama.cpp's converter does."""

import json

import gguf
import safetensors.numpy
import tiny

from lora_jax.interop import safetensors as reader
from lora_jax.models import keys

FLOAT32 = gguf.GGMLQuantizationType.F32


def interleave(x, head_dim):
    """Rows of each head from 0 ... h-1 to (0, h/2, 1, h/2 + 1, ...)."""
    order = [i for pair in range(head_dim // 2) for i in (pair, pair + head_dim // 2)]
    return x.reshape(-1, head_dim, x.shape[1])[:, order].reshape(x.shape)


def write(path, folder, kind=FLOAT32, **metadata):
    """Writes the model in `folder` to a GGUF file with matrices of one type; returns its path."""
    settings = json.loads((folder / "config.json").read_text())
    config, _ = reader.load(folder, "float32")
    tensors = safetensors.numpy.load_file(folder / reader.WEIGHTS)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab)
    write_tokenizer(writer)
    for name, value in metadata.items():
        writer.add_key_value(name.replace("__", "."), *value)
    for key in keys.table(config):
        for layer in range(config.layers if "{}" in key.hf else 1):
            x = tensors[key.hf.format(layer)]
            if "q_proj" in key.path or "k_proj" in key.path:
                x = interleave(x, config.head_dim)
            chosen = kind if x.ndim == 2 else FLOAT32
            writer.add_tensor(key.gguf.format(layer), gguf.quantize(x, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
