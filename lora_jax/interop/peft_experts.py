"""Adapters of fused experts: PEFT's `target_parameters`, where all experts of a layer are one array.

transformers keeps the experts of a layer as `gate_up_proj` [E, 2F, D], gate before up, and `down_proj` [E, D, F]. PEFT
adapts such an array with A [E·r, in], expert by expert, and B [out, r·E], rank by rank. It wraps `gate_up_proj` first,
so that its tensors lie one level deeper (`base_layer`) where `down_proj` is adapted too.

Some models keep the arrays as [E, D, 2F] and [E, F, D]. PEFT takes the second axis for the output's all the same: A is
then on the side of what experts give, and B on that of what they are given.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.interop import peft_layout as layout
from lora_jax.interop.peft_layout import PREFIX
from lora_jax.interop.peft_reader import Reader
from lora_jax.methods import LoRA
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
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


def names(config: DecoderConfig) -> dict[str, tuple[str, int]]:
    """The full names of a decoder's arrays of experts: which of `PARAMETERS` each is, and of which layer."""
    expert = {key.path: key for key in keys.table(config) if keys.leading(key) > 1}
    return {
        f"{_holder(expert[paths[0]]).format(layer)}.{name}": (name, layer)
        for name, paths in PARAMETERS.items()
        for layer in range(config.layers)
        if expert.keys() >= set(paths)
    }


def _holder(key: keys.Key) -> str:
    """The module of transformers' that has the array, with a hole for the layer."""
    return key.hf.rpartition(".")[0] if key.array else "model.layers.{}.mlp.experts"


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
    table, every = {key.path: key for key in keys.table(reader.config)}, names(reader.config)
    wanted: dict[str, dict[int, str]] = {name: {} for name in PARAMETERS}
    for entry in reader.settings.parameters():
        found = [name for name in every if name == entry or name.endswith(f".{entry}")]
        if not found:
            raise ValueError(
                f"{reader.settings.path}: {entry!r} of target_parameters is no parameter of this model's experts; "
                f"nearest: {nearest(entry, every)}"
            )
        for name in found:
            parameter, layer = every[name]
            wanted[parameter][layer] = name
    parameters = [
        _parameter(reader, name, layers, [table[path] for path in PARAMETERS[name]], wanted["down_proj"], sizes)
        for name, layers in wanted.items()
        if layers
    ]

    def make() -> dict[str, Any]:
        return {path: lora for one in parameters for path, lora in _read(reader, one).items()}

    return make


class Written(NamedTuple):
    """Adapters of fused experts as a file has them.

    Attributes:
      tensors: by name.
      sizes: rank and γ of each parameter, by its full name.
      targets: what `target_parameters` says.
    """

    tensors: dict[str, np.ndarray]
    sizes: dict[str, tuple[int, float]]
    targets: list[str]


def write(adapters: Mapping[str, LoRA], config: DecoderConfig) -> Written:
    """What PEFT keeps for adapters of experts where all experts of a layer are one array.

    Gate and up have one A in files. Where they have one here, it is written; where each has its own, A = [a_g a_u] and
    B = diag(b_g, b_u), of rank R_g + R_u, is the same. A layer whose factors are all zero is left out.

    Args:
      adapters: `{path: adapter}` of kernels of experts, with all of their stacked axes.
      config: of the decoder that they are for.
    """
    table = {key.path: key for key in keys.table(config)}
    holder = _holder(table[PARAMETERS["down_proj"][0]])
    arrays = {
        name: _together([table[path] for path in paths], adapters, config)
        for name, paths in PARAMETERS.items()
        if any(path in adapters for path in paths)
    }
    busy = {
        name: [bool(a_l.any() or b_l.any()) for a_l, b_l in zip(a, b, strict=True)]
        for name, (a, b, _) in arrays.items()
    }
    found = Written({}, {}, [])
    for name, (a, b, scale) in arrays.items():
        modules = [holder.format(layer) for layer in range(config.layers)]
        for layer, module in enumerate(modules):
            if not busy[name][layer]:
                continue
            found.sizes[f"{module}.{name}"] = (a.shape[2], scale)
            deeper = (
                ".base_layer"
                if name == "gate_up_proj" and busy.get("down_proj", [False] * config.layers)[layer]
                else ""
            )
            stem = f"{PREFIX}{module}{deeper}"
            found.tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, a.shape[-1]))
            found.tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(
                b[layer].transpose(1, 2, 0).reshape(b.shape[2], -1)
            )
        own = [f"{module}.{name}" for module in modules if f"{module}.{name}" in found.sizes]
        found.targets.extend([f"{holder.rpartition('{}.')[2]}.{name}"] if len(own) == config.layers else own)
    return found


def _together(
    table: list[keys.Key], adapters: Mapping[str, LoRA], config: DecoderConfig
) -> tuple[np.ndarray, np.ndarray, float]:
    """a [L, E, R, in] and b [L, E, out, R] of what is one array in files, and their γ: in and out are PEFT's."""
    stack = keys.matrices(table[0], config)
    pairs = []
    for key in table:
        lora = adapters.get(key.path)
        if lora is not None:
            a, b = (
                layout.to_file(x, part, getattr(lora.axes, part.side), key, config)
                for x, part in zip((lora.a, lora.b), layout.LORA, strict=True)
            )
            pairs.append((a, b, lora.scale))
        else:
            pairs.append(None)
    first, scale = next((a, scale) for a, _, scale in filter(None, pairs))
    one = all(pair is None or (pair[2] == scale and np.array_equal(pair[0], first)) for pair in pairs)
    rank = first.shape[1] if one else sum(pair[0].shape[1] for pair in pairs if pair)
    rows, before = [], 0
    for key, pair in zip(table, pairs, strict=True):
        b = np.zeros((math.prod(stack), math.prod(layout.sizes(key, config, "out")), rank), np.float32)
        if pair:
            b[:, :, before : before + pair[1].shape[2]] = pair[1] * np.float32(pair[2] / scale)
            before += 0 if one else pair[1].shape[2]
        rows.append(b)
    a = first if one else np.concatenate([pair[0] for pair in pairs if pair], 1)
    b = np.concatenate(rows, 1)
    if layout.input_first(table[0]):
        a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
    return a.reshape(*stack, *a.shape[1:]), b.reshape(*stack, *b.shape[1:]), scale


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
    (_, E), (d_in, d_out) = keys.matrices(table[0], reader.config), _widths(reader, table)
    if layout.input_first(table[0]):
        d_in, d_out = d_out, d_in
    for module in modules.values():
        reader.expected[f"{PREFIX}{module}.lora_A.weight"] = [E * one.rank, d_in]
        reader.expected[f"{PREFIX}{module}.lora_B.weight"] = [d_out, one.rank * E]
    return one


def _read(reader: Reader, one: Fused) -> dict[str, LoRA]:
    L, E = keys.matrices(one.table[0], reader.config)
    d_in, d_out = _widths(reader, one.table)
    a = np.zeros((L, E, one.rank, d_in), np.float32)
    b = np.zeros((L, E, d_out, one.rank), np.float32)
    for layer, module in one.modules.items():
        a_in, b_out = (reader.file.tensor(f"{PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
        a_in, b_out = a_in.reshape(E, one.rank, -1), b_out.reshape(-1, one.rank, E).transpose(2, 0, 1)
        if layout.input_first(one.table[0]):
            a_in, b_out = b_out.swapaxes(1, 2), a_in.swapaxes(1, 2)
        a[layer], b[layer] = a_in, b_out
    a, b = (x.reshape(L * E, *x.shape[2:]) for x in (a, b))
    found = {}
    for key, rows in zip(one.table, np.split(b, len(one.table), 1), strict=True):
        read = [layout.from_file(x, part, key, reader.config) for x, part in zip((a, rows), layout.LORA, strict=True)]
        found[key.path] = LoRA(read[0], read[1], one.scale, layout.axes(key), one.dropout)
    return found


def _widths(reader: Reader, table: list[keys.Key]) -> tuple[int, int]:
    """In and out of an array: its weights have one input, and their outputs side by side."""
    d_in, d_out = (math.prod(layout.sizes(table[0], reader.config, side)) for side in ("inp", "out"))
    return d_in, d_out * len(table)
