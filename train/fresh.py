"""Writes a small model that knows nothing: random weights, and a tokenizer made from the texts that it is to read."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import tokenizers

from lora_jax.interop import safetensors
from lora_jax.models import config as configs
from lora_jax.models import decoder

END = "<|endoftext|>"


def tokenizer(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """Byte-level pairs merged by frequency, every digit alone.

    Args:
      texts: to count pairs in.
      size: most tokens; at least the 256 bytes and the end.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers
    made.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=split.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def write(
    folder: Path,
    texts: Iterable[str],
    *,
    dim: int,
    layers: int,
    heads: int,
    context: int = 128,
    size: int = 512,
    seed: int = 0,
) -> None:
    """Writes a random Llama and its tokenizer as a Hugging Face folder, without a chat template.

    Args:
      folder: made if it is missing.
      texts: for the tokenizer.
      dim, layers, heads: D, L, H; D/H to a head, and 3 D in the MLP.
      context: positions.
      size: most tokens in the vocabulary.
      seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer(texts, size)
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
