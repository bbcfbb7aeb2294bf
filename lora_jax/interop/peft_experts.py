"""Adapters of fused experts: PEFT's `target_parameters`, where all experts of a layer are one array.

transformers keeps the experts of a layer as `gate_up_proj` [E, 2F, D], gate before up, and `down_proj` [E, D, F]. PEFT
adapts such an array with A [E·r, in], expert by expert, and B [out, r·E], rank by rank. It wraps `gate_up_proj` first,
so that its tensors lie one level deeper (`base_layer`) where `down_proj` is adapted too.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lora_jax.interop import peft_layout as layout
from lora_jax.interop.peft_layout import PREFIX
from lora_jax.interop.peft_reader import Reader
from lora_jax.methods import LoRA
from lora_jax.models import keys
from lora_jax.tree import nearest

PARAMETERS = {
    "gate_up_proj": ("layers/gate_proj/kernel", "layers/up_proj/kernel"),
    "down_proj": ("layers/down_proj/kernel",),
}


class Fused(NamedTuple):
    """One parameter of all layers, as a file has it: its weights here, rank and γ, and the tensors' name in a layer."""

    table: list[keys.Key]
    rank: int
    scale: float
    dropout: float
    module: str


def fused(reader: Reader, scale: Callable[[str], tuple[int, float, float]]) -> Callable[[], dict[str, Any]]:
    """The adapters of what a config's `target_parameters` names among experts.

    Args:
      reader: of the file; learns which tensors to expect.
      scale: rank, γ and dropout of a module by its name.

    Returns:
      A function that reads them, for when all is checked.

    Raises:
      ValueError: an entry names nothing of the kind.
    """
    asked, table = reader.settings.parameters(), {key.path: key for key in keys.table(reader.config)}
    expert = {path for path, key in table.items() if key.hf.count("{}") > 1}
    names = {f"model.layers.{{}}.mlp.experts.{name}": name for name in PARAMETERS if {*PARAMETERS[name]} <= expert}
    wanted = []
    for entry in asked:
        found = [name for name in names if name.format(0) == entry or name.endswith(f".{entry}")]
        if not found:
            raise ValueError(
                f"{reader.settings.path}: {entry!r} of target_parameters is no parameter of this model's experts; "
                f"nearest: {nearest(entry, names)}"
            )
        wanted += found
    parameters = []
    for name in dict.fromkeys(wanted):
        deeper = ".base_layer" if names[name] == "gate_up_proj" and len({*wanted}) > 1 else ""
        size = scale(name.format(0))
        one = Fused([table[path] for path in PARAMETERS[names[name]]], *size, name.rpartition(".")[0] + deeper)
        parameters.append(one)
        (L, E), (d_in, d_out) = layout.stack(one.table[0], reader.config), _widths(reader, one.table[0])
        for layer in range(L):
            prefix = f"{PREFIX}{one.module.format(layer)}.lora_"
            reader.expected[f"{prefix}A.weight"] = [E * one.rank, d_in]
            reader.expected[f"{prefix}B.weight"] = [d_out * len(one.table), one.rank * E]

    def make() -> dict[str, Any]:
        return {path: lora for one in parameters for path, lora in _read(reader, one).items()}

    return make


def _read(reader: Reader, one: Fused) -> dict[str, LoRA]:
    L, E = layout.stack(one.table[0], reader.config)
    a, b = (
        np.stack([reader.file.tensor(f"{PREFIX}{one.module.format(layer)}.lora_{x}.weight") for layer in range(L)])
        for x in "AB"
    )
    a = a.reshape(L * E, one.rank, -1)
    b = b.reshape(L, -1, one.rank, E).transpose(0, 3, 1, 2).reshape(L * E, -1, one.rank)
    found = {}
    for key, rows in zip(one.table, np.split(b, len(one.table), 1), strict=True):
        read = [layout.from_file(x, part, key, reader.config) for x, part in zip((a, rows), layout.LORA, strict=True)]
        found[key.path] = LoRA(read[0], read[1], one.scale, layout.axes(key), one.dropout)
    return found


def _widths(reader: Reader, key: keys.Key) -> list[int]:
    return [math.prod(layout.sizes(key, reader.config, side)) for side in ("inp", "out")]
