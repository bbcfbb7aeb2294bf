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
    """One parameter of experts, as a file has it.

    Attributes:
      table: the weights here.
      rank, scale, dropout: of its adapters.
      modules: what tensors are named by, by layer; layers that are not adapted have none.
    """

    table: list[keys.Key]
    rank: int
    scale: float
    dropout: float
    modules: dict[int, str]


def fused(reader: Reader, sizes: Callable[[str], tuple[int, float, float]]) -> Callable[[], dict[str, Any]]:
    """The adapters of what a config's `target_parameters` names among experts.

    Args:
      reader: of the file; learns which tensors to expect.
      sizes: rank, γ and dropout of a module by its name.

    Returns:
      A function that reads them, for when all is checked.

    Raises:
      ValueError: an entry names nothing of the kind, or ranks differ between layers.
    """
    table = {key.path: key for key in keys.table(reader.config)}
    expert = {path for path, key in table.items() if key.hf.count("{}") > 1}
    names = {
        f"model.layers.{layer}.mlp.experts.{name}": (name, layer)
        for name in PARAMETERS
        for layer in range(reader.config.layers)
        if expert.issuperset(PARAMETERS[name])
    }
    wanted: dict[str, dict[int, str]] = {name: {} for name in PARAMETERS}
    for entry in reader.settings.parameters():
        found = [name for name in names if name == entry or name.endswith(f".{entry}")]
        if not found:
            raise ValueError(
                f"{reader.settings.path}: {entry!r} of target_parameters is no parameter of this model's experts; "
                f"nearest: {nearest(entry, names)}"
            )
        for name in found:
            parameter, layer = names[name]
            wanted[parameter][layer] = name
    parameters = [
        _parameter(reader, name, layers, [table[path] for path in PARAMETERS[name]], wanted["down_proj"], sizes)
        for name, layers in wanted.items()
        if layers
    ]

    def make() -> dict[str, Any]:
        return {path: lora for one in parameters for path, lora in _read(reader, one).items()}

    return make


def _parameter(
    reader: Reader,
    name: str,
    layers: dict[int, str],
    table: list[keys.Key],
    down: dict[int, str],
    sizes: Callable[[str], tuple[int, float, float]],
) -> Fused:
    found = {sizes(full) for full in layers.values()}
    if len(found) > 1:
        raise ValueError(
            f"{reader.settings.path}: the ranks or scales of {name} differ between layers: merge it with PEFT"
        )
    modules = {
        layer: full.rpartition(".")[0] + (".base_layer" if name == "gate_up_proj" and layer in down else "")
        for layer, full in layers.items()
    }
    one = Fused(table, *found.pop(), modules)
    (_, E), (d_in, d_out) = keys.stack(table[0], reader.config), _widths(reader, table[0])
    for module in modules.values():
        reader.expected[f"{PREFIX}{module}.lora_A.weight"] = [E * one.rank, d_in]
        reader.expected[f"{PREFIX}{module}.lora_B.weight"] = [d_out * len(table), one.rank * E]
    return one


def _read(reader: Reader, one: Fused) -> dict[str, LoRA]:
    L, E = keys.stack(one.table[0], reader.config)
    d_in, d_out = _widths(reader, one.table[0])
    a = np.zeros((L, E, one.rank, d_in), np.float32)
    b = np.zeros((L, E, d_out * len(one.table), one.rank), np.float32)
    for layer, module in one.modules.items():
        a_in, b_out = (reader.file.tensor(f"{PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
        a[layer] = a_in.reshape(E, one.rank, d_in)
        b[layer] = b_out.reshape(-1, one.rank, E).transpose(2, 0, 1)
    a, b = (x.reshape(L * E, *x.shape[2:]) for x in (a, b))
    found = {}
    for key, rows in zip(one.table, np.split(b, len(one.table), 1), strict=True):
        read = [layout.from_file(x, part, key, reader.config) for x, part in zip((a, rows), layout.LORA, strict=True)]
        found[key.path] = LoRA(read[0], read[1], one.scale, layout.axes(key), one.dropout)
    return found


def _widths(reader: Reader, key: keys.Key) -> list[int]:
    return [math.prod(layout.sizes(key, reader.config, side)) for side in ("inp", "out")]
