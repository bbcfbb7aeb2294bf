"""Writes adapters as llama.cpp reads them: a GGUF file of its own beside the model's."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from lora_jax.interop import peft_layout as layout
from lora_jax.interop.peft_layout import Part
from lora_jax.methods import LoRA
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA}
MATRIX = (Part("a", "lora_a", "inp", "Rn"), Part("b", "lora_b", "out", "nR"))
TABLE = (Part("a", "lora_a", "inp", "nR"), MATRIX[1])  # rows of it are looked up


def save(path: str | Path, adapters: Mapping[str, LoRA], config: DecoderConfig) -> None:
    """Writes `portable.convert`'s adapters; llama.cpp's `--lora` adds (α/R) b a to each weight.

    Rows of q and k are put into the order in which llama.cpp keeps them, where rotary pairs are neighbours.

    Args:
      path: of the file, ending in .gguf.
      adapters: `{path: LoRA}` of one rank, γ = 1.
      config: of their decoder.

    Raises:
      ValueError: llama.cpp orders the weights of this family in a way that is not known here, or a weight has no place
        in its files.
    """
    if config.family not in ARCHITECTURES:
        raise ValueError(
            f"{path}: llama.cpp's adapters are written for {', '.join(ARCHITECTURES)}, not {config.family}; write the "
            "merged model, or convert a PEFT adapter with llama.cpp's convert_lora_to_gguf.py"
        )
    architecture = ARCHITECTURES[config.family]
    names = gguf.get_tensor_name_map(architecture, config.layers)
    tensors: dict[str, np.ndarray] = {}
    for key in keys.table(config):
        if key.path not in adapters:
            continue
        lora = adapters[key.path]
        for part in TABLE if layout.embedding(key) else MATRIX:
            own = getattr(lora.axes, part.side)
            for layer, x in enumerate(layout.to_file(getattr(lora, part.field), part, own, key, config)):
                module = key.hf.format(layer).removesuffix(".weight")
                name = names.get_name(module)
                if name is None:
                    raise ValueError(f"{path}: {module} has no place in llama.cpp's files; write the merged model")
                rows = neighbours(x, config.head_dim) if key.rotary and part.field == "b" else x
                tensors[f"{name}.weight.{part.suffix}"] = np.ascontiguousarray(rows)
    rank = max(lora.rank for lora in adapters.values())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def neighbours(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head from 0 ... h-1, whose pairs are h/2 apart, to (0, h/2, 1, h/2 + 1, ...)."""
    return x.reshape(-1, 2, head_dim // 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
