"""A tiny random Llama folder with a tokenizer of its own, for tests that run whole scripts in seconds."""

import contextlib
import json

import jax
import numpy as np
import safetensors.numpy
import tokenizers

from lora_jax.interop import safetensors as reader
from lora_jax.models import config as configs
from lora_jax.models import keys

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def tokenizer() -> tokenizers.Tokenizer:
    """Bytes, the special tokens, and a few merges of English words."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(["the sum of one and two is three\n", "user assistant system what is"] * 3, trainer)
    return tok


def write(folder, template: str | None = CHATML, seed: int = 0, **changes):
    """Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = tokenizer()
    tok.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>" if template else "<|endoftext|>"}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    values = {**CONFIG, "vocab_size": tok.get_vocab_size(), **changes}
    (folder / "config.json").write_text(json.dumps(values))
    config = configs.from_hf(values)
    rng = np.random.default_rng(seed)
    tensors = {}
    for key in keys.table(config):
        # What has no layers is drawn for each of them too: tests were written with these numbers.
        each = keys.places(key, config) if key.hf.count("{}") > 1 else [(layer,) for layer in range(config.layers)]
        for place in each:
            tensors[key.hf.format(*place)] = rng.normal(0, 0.1, keys.file_shape(key, config)).astype(np.float32)
    safetensors.numpy.save_file(tensors, folder / reader.WEIGHTS)
    return folder


@contextlib.contextmanager
def quick_compilation():
    """For tests whose programs run for less time than they take to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path
