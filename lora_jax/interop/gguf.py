"""Reads llama.cpp's GGUF files: weights, tokenizer and chat template."""

from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers

from lora_jax.interop import gguf_check, gguf_config, guard, stacked
from lora_jax.interop.gguf_config import ARCHITECTURES
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
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
        with guard.told(self.path):
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            guard.numbers(self.metadata, self.path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, *index: int) -> np.ndarray:
        """The named tensor, or what is at an index of its first axes, as float32, its longest-stride axis first.

        Raises:
          ValueError: its type is not one that the gguf package can dequantise.
        """
        tensor = self._tensors[name]
        try:
            return gguf.dequantize(tensor.data[index], tensor.tensor_type)
        except IndexError:
            shape = tensor.shape.tolist()[::-1]
            raise ValueError(f"{self.path}: tensor {name} {shape} has no part {list(index)}; it is not whole") from None
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {name} has type {tensor.tensor_type.name}, which the installed gguf package "
                "cannot dequantise; use another quantisation of the model, or a newer gguf"
            ) from None


def decoder_config(file: File) -> DecoderConfig:
    """The shape of the model in a GGUF file.

    Raises:
      ValueError: an unsupported model.
    """
    names = {name: f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long")}
    factors = {name: file.tensor(tensor).tolist() for name, tensor in names.items() if tensor in file}
    with guard.told(file.path):
        return gguf_config.read(file.metadata, file, factors, str(file.path))


def load(
    file: File, dtype: jnp.dtype, quantize: Rules | None = None, places: stacked.Places | None = None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """The config and the parameters of a GGUF file.

    Args:
      file: an open file.
      dtype: of the parameters.
      quantize: which to quantise as they are read; patterns and formats as for `lora_jax.quantize.choose`.
      places: where they go, as for `stacked.read`.

    Returns:
      config, and the parameters as nested dict of arrays or `Quantised` weights, layers stacked.

    Raises:
      ValueError: an unsupported model, a tensor that is missing or has the wrong shape.
    """
    config = decoder_config(file)
    guard.held(config, file.path.stat().st_size, file.path)
    arch = file.metadata["general.architecture"]
    architecture = next(enum for enum, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(architecture, config.layers)

    def read(key: keys.Key, place: stacked.Place) -> tuple[str, np.ndarray | None]:
        # The experts of a layer are one tensor here.
        stem, end = key.hf.replace("experts.{}", "experts").format(*place[:1]).rsplit(".", 1)
        name = f"{names.get_name(stem) or stem}.{end}"
        if name not in file:
            return name, None
        x = file.tensor(name, *place[1:])
        if key.rotary and ARCHITECTURES[arch].interleaved and x.shape == keys.file_shape(key, config):
            x = _half_rotation(x, config.head_dim)
        if key.path.endswith("norm/scale") and config.norm_offset:
            x = x - np.float32(config.norm_offset)  # it is added in the file
        return name, x

    return config, stacked.read(config, read, dtype, file.path, quantize, places)


def _half_rotation(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from (0, h/2, 1, h/2 + 1, ...), which pairs neighbours, to 0 ... h-1."""
    pairs = x.reshape(-1, head_dim // 2, 2, *x.shape[1:])
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
            f"{' or '.join(PRE_TOKENIZERS)} is); put the model's tokenizer.json into the folder of the file"
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
