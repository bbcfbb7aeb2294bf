"""What a model's folder holds beside its weights: the config, the tokenizer, how it speaks and when it stops."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lora_jax.interop import hf
from lora_jax.interop.safetensors import read_json
from lora_jax.models.config import DecoderConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", GENERATION),
)


def write(folder: Path, model: str, config: DecoderConfig, dtype: Any) -> list[str]:
    """Writes config.json, tokenizer, chat template and generation config of weights that are already there.

    Args:
      folder: holds the weights.
      model: what they came from, as `hf.load` takes it; a folder's files are copied, a GGUF file's are made.
      config: the decoder's, whose head may have become a matrix of its own.
      dtype: of the weights.

    Returns:
      The names of the files.

    Raises:
      ValueError: the model came in a GGUF file of a family whose config.json is not known here.
    """
    if Path(model).is_dir():
        copied = [name for name in COPIED if (Path(model) / name).is_file()]
        for name in copied:
            shutil.copyfile(Path(model) / name, folder / name)
        settings = read_json(Path(model) / CONFIG)
    else:
        settings, copied = _made(folder, hf.load(model, weights=False), model)
    named = "dtype" if "dtype" in settings else "torch_dtype"
    settings |= {"tie_word_embeddings": config.tied, named: jnp.dtype(dtype).name}
    settings.pop("auto_map", None)  # names code of the folder that it came from
    _json(folder / CONFIG, settings)
    return [CONFIG, *copied]


def _made(folder: Path, loaded: hf.Checkpoint, model: str) -> tuple[dict[str, Any], list[str]]:
    """The config, and the names of the other files, of a model that came as one file."""
    c, special = loaded.config, loaded.special
    if c.family != "llama" or c.rope_factors:
        raise ValueError(
            f"{model}: the config.json of this {c.family} cannot be made from a GGUF file; give its folder"
        )
    loaded.tokenizer.save(str(folder / "tokenizer.json"))
    names = {role: getattr(special, role) for role in ("bos", "eos", "pad")}
    tokens = {f"{role}_token": loaded.tokenizer.id_to_token(i) for role, i in names.items() if i is not None}
    ids = {f"{role}_token_id": i for role, i in names.items() if i is not None}
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    _json(folder / GENERATION, {**ids, "eos_token_id": list(special.stop)})
    written = ["tokenizer.json", "tokenizer_config.json", GENERATION]
    if loaded.chat_template:
        (folder / "chat_template.jinja").write_text(loaded.chat_template, encoding="utf-8")
        written.append("chat_template.jinja")
    shape = {
        **{"hidden_size": c.dim, "intermediate_size": c.hidden, "num_hidden_layers": c.layers, "vocab_size": c.vocab},
        **{"num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim},
        **{"max_position_embeddings": c.context, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_base},
    }
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", **shape, **ids}, written


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
