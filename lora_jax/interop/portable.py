"""Adapters in the one form that every server reads: plain LoRA of one rank, γ = 1, q, k and v together.

What servers would refuse, or load and silently compute something else of, is converted where that is exact, or nearly
so and the error is told; otherwise it is a ValueError that says why.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax import deltas
from lora_jax.adapters import Adapter
from lora_jax.arithmetic import rerank
from lora_jax.bottleneck import Bottleneck
from lora_jax.grouping import written_out
from lora_jax.interop import merged
from lora_jax.interop import peft_layout as layout
from lora_jax.leaves import Leaf, Rows
from lora_jax.methods import IA3, PROJECTIONS, AdaLoRA, DoRA, LoRA, VeRA
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
from lora_jax.soft import Prefix, Prompt
from lora_jax.tree import leaves_by_path

QKV = tuple(f"layers/{name}_proj/kernel" for name in "qkv")
MLP = tuple(f"layers/{name}_proj/kernel" for name in ("gate", "up", "down"))
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be; 16 where it is not given
SERVERS = ("any", "vllm", "sglang")
MERGE = "write the merged model instead"


class Portable(NamedTuple):
    """What a server gets.

    Attributes:
      adapters: `{path: LoRA}` of one rank, γ = 1, without starts.
      rank: theirs.
      errors: `{path: ‖Δ' − Δ‖/‖Δ‖}` of what could only be approximated.
      notes: what was converted, and what the server has to be told, a line each.
    """

    adapters: dict[str, LoRA]
    rank: int
    errors: dict[str, float]
    notes: list[str]


def convert(
    adapters: Mapping[str, Adapter] | Prompt | Prefix,
    config: DecoderConfig,
    params: Any,
    server: str = "any",
    rank: int = 0,
) -> Portable:
    """Converts adapters for a server.

    LoRA, rsLoRA, LoRA-FA, AdaLoRA, starts from the base (PiSSA, OLoRA: rank 2R), other ranks and scales for some
    weights or layers, and VeRA are rewritten exactly. DoRA and IA³ have no low-rank delta: they become the nearest one
    of the rank that is given.

    Args:
      adapters: `{path: adapter}`.
      config: of their decoder.
      params: the decoder's; the values are read for DoRA and IA³ alone.
      server: "vllm", "sglang", or "any" of these and PEFT.
      rank: the largest that is wanted, by SVD; 0 for as large as it takes.

    Returns:
      The adapters with what was done to them.

    Raises:
      ValueError: if the server has nothing that computes the same, or the rank is larger than it takes.
    """
    if server not in SERVERS:
        raise ValueError(f"no server {server!r}; there are {', '.join(SERVERS)}")
    if isinstance(adapters, Prompt | Prefix):
        raise ValueError(f"{type(adapters).__name__}s are served by neither vLLM nor SGLang; PEFT itself reads them")
    base, notes, found = leaves_by_path(params), [], {}
    errors: dict[str, float] = {}
    own = {path: adapter for path, adapter in adapters.items() if path != PROJECTIONS}
    if arrays := [key.path for key in keys.table(config) if key.array and key.path in own]:
        raise ValueError(
            f"{arrays[0]!r} is of experts that are one array in this model's files, for which no server's adapters are "
            f"known here: {MERGE}"
        )
    kinds = {type(adapter).__name__ for adapter in own.values()} - {"LoRA"}
    for path, adapter in own.items():
        lora = low_rank(path, adapters, base[path].shape)
        if lora is not None:
            found[path] = lora
        elif isinstance(adapter, DoRA | IA3):
            if not rank:
                raise ValueError(
                    f"the adapter of {path!r} is a {type(adapter).__name__}, which servers do not take: {MERGE}, or "
                    "give a rank for its nearest LoRA, whose error is told"
                )
            found[path], errors[path] = _nearest(path, adapter, base[path], rank)
        else:
            raise ValueError(f"{path!r} is {_WHAT[type(adapter)]}, which servers refuse or drop: {MERGE}")
    if not found:
        raise ValueError("there are no adapters to write")
    if kinds:
        notes.append(f"{', '.join(sorted(kinds))} written as LoRA")
    if any(isinstance(adapter, LoRA) and adapter.start is not None for adapter in own.values()):
        notes.append(
            "what the adapters started from was subtracted: plain LoRA of twice the rank over the original base"
        )
    if rank:
        smaller, lost = rerank({path: lora for path, lora in found.items() if lora.rank > rank}, rank)
        found, errors = found | smaller, errors | lost
    size = max(lora.rank for lora in found.values())
    if len({(lora.rank, lora.scale) for lora in found.values()}) > 1:
        notes.append(f"ranks and scales differ: all are written with rank {size}, filled up with zeros, and scale 1")
    if server == "vllm":
        notes += _vllm(size)
    found |= _missing(found, config, base, notes)
    return Portable({path: _uniform(lora, size) for path, lora in found.items()}, size, errors, notes)


def low_rank(path: str, adapters: Mapping[str, Adapter], shape: Sequence[int]) -> LoRA | None:
    """An adapter as γ a b, exactly, without a start, if its delta is of low rank.

    Args:
      path: its weight's.
      adapters: `{path: adapter}`, and what they share.
      shape: the weight's.

    Returns:
      The LoRA, or None.
    """
    adapter: Any = adapters[path]
    if isinstance(adapter, AdaLoRA):
        b = adapter.b * adapter.e.reshape(*adapter.e.shape[:-1], *[1] * len(adapter.axes.out), adapter.e.shape[-1])
        adapter = LoRA(adapter.a, b, adapter.scale, adapter.axes)
    if isinstance(adapter, LoRA):
        return written_out(path, adapter)
    return _written_vera(adapter, adapters[PROJECTIONS], shape) if isinstance(adapter, VeRA) else None


_WHAT = {Leaf: "trained as a whole", Rows: "trained in some rows", Bottleneck: "a bottleneck behind its product"}


def _written_vera(adapter: VeRA, shared: Any, shape: Sequence[int]) -> LoRA:
    """a diag(d) and diag(e) b, of each layer."""
    stacked, inp, out = ([shape[axis] for axis in group] for group in adapter.axes)
    d = adapter.d.reshape(*stacked, *[1] * len(inp), -1)
    a = shared.a[: math.prod(inp)].reshape(*inp, -1) * d
    return LoRA(a, shared.b[: math.prod(out)].reshape(*out, -1) * adapter.e[..., None], 1.0, adapter.axes)


def _nearest(path: str, adapter: DoRA | IA3, leaf: Any, rank: int) -> tuple[LoRA, float]:
    """The nearest LoRA to the change of every layer, by SVD, and its error."""
    axes = adapter.lora.axes if isinstance(adapter, DoRA) else adapter.axes
    stacked, inp, out = ([leaf.shape[axis] for axis in group] for group in axes)
    deltas.check_rank(path, rank, math.prod(inp), math.prod(out))
    found, norms = [], []
    for place in np.ndindex(*stacked):
        before, after, _ = merged.dense(path, leaf, adapter, {}, place)
        change = jnp.asarray(after - before).transpose([axis - len(stacked) for axis in (*axes.inp, *axes.out)])
        a, b, *lost = deltas.nearest(change.reshape(1, math.prod(inp), math.prod(out)), rank)
        found.append((a, b))
        norms.append(lost)
    a, b = (jnp.concatenate(factors) for factors in zip(*found, strict=True))
    error = deltas.ratio(*(jnp.concatenate(norm) for norm in zip(*norms, strict=True)))
    return LoRA(a.reshape(*stacked, *inp, rank), b.reshape(*stacked, *out, rank), 1.0, axes), error


def _missing(
    found: Mapping[str, LoRA], config: DecoderConfig, base: Mapping[str, Any], notes: list[str]
) -> dict[str, LoRA]:
    """Zeros for what is loaded together with something that is adapted."""
    table = {key.path: key for key in keys.table(config)}
    missing = []
    for group, why in ((QKV, "SGLang needs q, k and v together"), (MLP, "an expert's three are loaded together")):
        absent = [path for path in group if path not in found]
        dense = group is MLP and layout.axes(table[group[0]]).stacked != (0, 1)
        if not dense and 0 < len(absent) < len(group):
            missing += absent
            notes.append(f"{', '.join(path.split('/')[1] for path in absent)} added as zeros: {why}")
    zeros = {}
    for path in missing:
        axes, shape = layout.axes(table[path]), base[path].shape
        a, b = (jnp.zeros([shape[axis] for axis in (*axes.stacked, *side)] + [1]) for side in (axes.inp, axes.out))
        zeros[path] = LoRA(a, b, 1.0, axes)
    return zeros


def _uniform(lora: LoRA, rank: int) -> LoRA:
    more = [(0, 0)] * (lora.a.ndim - 1) + [(0, rank - lora.rank)]
    lora = deltas.folded(lora)
    b = jnp.pad(lora.b, [(0, 0)] * (lora.b.ndim - 1) + more[-1:])
    return dataclasses.replace(lora, a=jnp.pad(lora.a, more), b=b, dropout=0.0, frozen=())


def _vllm(rank: int) -> list[str]:
    fitting = [most for most in VLLM_RANKS if most >= rank]
    if not fitting:
        raise ValueError(
            f"rank {rank} is more than vLLM's {VLLM_RANKS[-1]}: give a rank for the nearest adapters of it"
        )
    return [f"start vLLM with --max-lora-rank={fitting[0]}"] if fitting[0] > 16 else []
