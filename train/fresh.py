"""Writes a small model that knows nothing: random weights, and a tokenizer for the prompts of one task."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import tokenizers

from lora_jax.interop import safetensors
from lora_jax.models import config as configs
from lora_jax.models import decoder

END = "<|endoftext|>"
_BYTES = {name: i for i, name in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}


def tokenizer(prompts: Sequence[str]) -> tokenizers.Tokenizer:
    """Every byte a token, and what all prompts begin with, their instruction, one more."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_BYTES, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END])
    if instruction := os.path.commonprefix(prompts):
        made.add_tokens([instruction])
    return made


def write(
    folder: Path,
    prompts: Sequence[str],
    *,
    dim: int,
    layers: int,
    heads: int,
    context: int = 128,
    seed: int = 0,
) -> None:
    """Writes a random Llama and its tokenizer as a Hugging Face folder, without a chat template.

    Args:
      folder: made if it is missing.
      prompts: for the tokenizer.
      dim, layers, heads: D, L, H; D/H to a head, and 3 D in the MLP.
      context: positions.
      seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer(prompts)
    made.save(str(folder / "tokenizer.json"))
    values = {
        "model_type": "llama",
        "vocab_size": made.get_vocab_size(),
        "hidden_size": dim,
        "intermediate_size": 3 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    config = configs.from_hf(values)
    safetensors.save(folder, config, decoder.init(jax.random.key(seed), config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (folder / "config.json").write_text(json.dumps(values, indent=1))  # last: with it the folder is a model
