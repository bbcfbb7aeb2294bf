"""Reads llama.cpp's GGUF files: weights, tokenizer and chat template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers

from lora_jax.interop import gguf_check, guard, stacked
from lora_jax.models import config as configs
from lora_jax.models import keys
from lora_jax.quantize import Rules

CONTROL, USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
# How each `tokenizer.ggml.pre` splits text before byte-level BPE.
PRE_TOKENIZERS = {
    "gpt-2": [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
}


class File:
    """An open GGUF file: `metadata`, and `tensor(name)` dequantised to float32."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the path of a .gguf file")
        gguf_check.check(self.path)
        try:
            reader = gguf.GGUFReader(self.path)
        except Exception as error:  # the reader has no exception of its own for a bad file
            raise ValueError(
                f"{path}: not a whole GGUF file ({type(error).__name__}: {error}); download it again"
            ) from None
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        guard.numbers(self.metadata, self.path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> np.ndarray:
        """The named tensor, dequantised to float32, its longest-stride axis first.

        Raises:
          ValueError: its type is not one that the gguf package can dequantise.
        """
        tensor = self._tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, which the installed gguf package "
                "cannot dequantise; use another quantisation of the model, or a newer gguf"
            ) from None


def decoder_config(file: File) -> configs.DecoderConfig:
    """The shape of the model in a GGUF file.

    Raises:
      ValueError: an unsupported model.
    """
    factors = None
    if "rope_freqs.weight" in file:
        factors = tuple(float(f) for f in file.tensor("rope_freqs.weight"))
    return from_gguf(file.metadata, "output.weight" not in file, factors, str(file.path))


def from_gguf(
    metadata: Mapping[str, Any],
    tied: bool,
    rope_factors: tuple[float, ...] | None = None,
    source: str = "the GGUF file",
) -> configs.DecoderConfig:
    """Reads the metadata of a GGUF file.

    Args:
      metadata: the file's key/value pairs.
      tied: the file has no output matrix of its own.
      rope_factors: the file's `rope_freqs` tensor, if it has one.
      source: path named in error messages.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: a field is missing, or asks for something this decoder does not compute.
    """
    arch = metadata.get("general.architecture")
    if arch != "llama":
        raise ValueError(f"{source}: general.architecture {arch!r} is not supported; use one of: llama")
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{source}: llama.rope.scaling.type {scaling!r} is not supported")
    if metadata.get("llama.expert_count", 0):
        raise ValueError(f"{source}: {metadata['llama.expert_count']} experts per layer are not supported")
    try:
        heads, dim = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
        read = configs.DecoderConfig(
            family=arch,
            vocab=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
            dim=dim,
            hidden=metadata["llama.feed_forward_length"],
            layers=metadata["llama.block_count"],
            heads=heads,
            kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=metadata.get("llama.attention.key_length", dim // heads),
            context=metadata["llama.context_length"],
            norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
            rope_base=metadata.get("llama.rope.freq_base", 10_000.0),
            rope_factors=rope_factors,
            tied=tied,
        )
    except KeyError as missing:
        raise ValueError(f"{source}: the metadata field {missing} is missing") from None
    return configs.checked(read, source)


def load(file: File, dtype: jnp.dtype, quantize: Rules | None = None) -> tuple[configs.DecoderConfig, dict[str, Any]]:
    """The config and the parameters of a GGUF file.

    Args:
      file: an open file.
      dtype: of the parameters.
      quantize: which to quantise as they are read; patterns and formats as for `lora_jax.quantize.choose`.

    Returns:
      config, and the parameters as nested dict of arrays or `Quantised` weights, layers stacked.

    Raises:
      ValueError: an unsupported model, a tensor that is missing or has the wrong shape.
    """
    config = decoder_config(file)
    guard.held(config, file.path.stat().st_size, file.path)
    interleaved = keys.FAMILIES[config.family].gguf_interleaved

    def read(key: keys.Key, layer: int) -> tuple[str, np.ndarray | None]:
        name = key.gguf.format(layer)
        if name not in file:
            return name, None
        x = file.tensor(name)
        if key.rotary and interleaved and x.shape == keys.file_shape(key, config):
            x = _half_rotation(x, config.head_dim)
        return name, x

    return config, stacked.read(config, read, dtype, file.path, quantize)


def _half_rotation(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from (0, h/2, 1, h/2 + 1, ...), which pairs neighbours, to 0 ... h-1."""
    pairs = x.reshape(-1, head_dim // 2, 2, x.shape[-1])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def tokenizer(file: File) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer in a GGUF file's metadata.

    Raises:
      ValueError: another kind of tokenizer, or a way of splitting text not in `PRE_TOKENIZERS`.
    """
    meta = file.metadata
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{file.path}: tokenizer model {model!r}, pre {pre!r} is not supported (gpt2 with "
            f"{' or '.join(PRE_TOKENIZERS)} is); use a folder with tokenizer.json instead"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    tok.decoder = tokenizers.decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    tok.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    tok.add_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED])
    return tok
