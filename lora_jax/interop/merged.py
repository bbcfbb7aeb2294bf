"""Writes a model with its adapters merged in, a layer at a time: no more of it is ever held than a file's tensors."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import SHARED, Adapter, check, weights
from lora_jax.bottleneck import Bottleneck
from lora_jax.grouping import written_out
from lora_jax.interop import safetensors
from lora_jax.interop.parts import Parts, Place, put
from lora_jax.methods import LoRA
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
from lora_jax.stored import is_stored
from lora_jax.tree import leaves_by_path, nearest


def save(
    folder: str | Path,
    config: DecoderConfig,
    params: Any,
    adapters: Mapping[str, Adapter],
    dtype: Any = None,
    shard_bytes: int = 5 * 2**30,
) -> dict[str, float]:
    """Writes W + γ a b for every adapted weight, and the others as they are, as Hugging Face's files.

    Sums are float32 and are rounded once, to `dtype`. What a file holds is computed when it is written.

    Args:
      folder: made if it is not there; its config.json is the caller's.
      config: the decoder's shape.
      params: the decoder's: arrays, quantised weights, or `parts.load`'s.
      adapters: `{path: adapter}`.
      dtype: of the files; each parameter's own unless given.
      shard_bytes: most bytes of a file.

    Returns:
      `{path: ‖written − exact‖ / ‖exact − W‖}` in float64, of every adapted weight: what of its adapter rounding loses.

    Raises:
      ValueError: an adapter does not fit its weight, is not linear, or is not finite.
    """
    base = leaves_by_path(params)
    shared = {path: entry for path, entry in adapters.items() if path.startswith(SHARED)}
    if unknown := sorted({*adapters} - {*base} - {*shared}):
        raise ValueError(f"{unknown[0]!r} is no parameter of this decoder; nearest: {nearest(unknown[0], base)}")
    losses: dict[str, list[tuple[float, float]]] = {}
    tree: dict[str, Any] = {}
    for key in keys.table(config):
        if key.path not in base:
            raise ValueError(f"{key.path} is missing from the parameters; is this their config?")
        leaf, adapter, stacked = base[key.path], adapters.get(key.path), key.hf.count("{}")
        own = jnp.dtype(dtype or leaf.dtype)
        if adapter is None:
            put(tree, key.path, Parts(leaf.shape, own, stacked, functools.partial(values, leaf)))
            continue
        if isinstance(adapter, Bottleneck):
            raise ValueError(f"the adapter of {key.path!r} is not linear in the weight: it cannot be merged")
        check(adapter, key.path, leaf.shape)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(adapter)):
            raise ValueError(f"the adapter of {key.path!r} has values that are not finite: it is not merged")
        part = functools.partial(_merged, key.path, leaf, adapter, shared, own, losses.setdefault(key.path, []))
        put(tree, key.path, Parts(leaf.shape, own, stacked, part))
    safetensors.save(folder, config, tree, shard_bytes)
    return {path: _ratio(found) for path, found in losses.items()}


def untied(config: DecoderConfig, params: dict[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """The same model with a head of its own, for adapters of one side of what was a single matrix.

    Args:
      config: of a model whose head is its embedding.
      params: its parameters.

    Returns:
      The config and the parameters, of which the head is a copy that is made when it is used.
    """
    table = params["embed"]["embedding"]
    V, D = table.shape
    head = Parts((D, V), table.dtype, 0, lambda place: values(table, place).T)
    return dataclasses.replace(config, tied=False), {**params, "head": {"kernel": head}}


def dense(
    path: str, leaf: Any, adapter: Adapter, shared: Mapping[str, Any], place: Place
) -> tuple[np.ndarray, np.ndarray, Callable[[], np.ndarray]]:
    """One part of an adapted weight.

    Args:
      path: the weight's.
      leaf: the weight.
      adapter: its adapter.
      shared: what adapters have in common.
      place: the layer and perhaps the expert; () for a weight that is in no layer.

    Returns:
      The base's part and the adapted one, float32, and a function that computes the latter in float64.
    """
    w = jnp.asarray(values(leaf, place), jnp.float32)
    stacked, first = len(place), (0,) * len(place)
    w = w.reshape(*(1,) * stacked, *w.shape)  # a stack of one, for an adapter's arrays begin with the stacked axes
    weight = weights({path: w}, {path: _at(adapter, place), **shared})[path]

    def exact() -> np.ndarray:
        total = np.asarray(w, np.float64) + np.asarray(weight.delta(), np.float64)
        gain = weight.resolved().gain
        total = total if gain is None else total * np.asarray(gain.expanded(total.ndim)[..., 0], np.float64)
        return total[first]

    return np.asarray(w)[first], np.asarray(weight.dense())[first], exact


def _at(adapter: Any, place: Place) -> Any:
    """What of an adapter is for one part of its weight."""
    common = adapter.common[1] if isinstance(adapter, LoRA) else ()
    if common and len(place) > 1:  # a factor that all experts share has no axis for them
        adapter = written_out("", adapter)
    return jax.tree.map(lambda x: x[tuple(slice(i, i + 1) for i in place)], adapter)


def _merged(path, leaf, adapter, shared, dtype, losses: list[tuple[float, float]], place: Place) -> np.ndarray:
    before, after, exact = dense(path, leaf, adapter, shared, place)
    written, wanted = after.astype(dtype), exact()
    losses.append((float(np.linalg.norm(written - wanted)), float(np.linalg.norm(wanted - before))))
    return written


def values(leaf: Any, place: Place) -> np.ndarray:
    """A layer of a weight, or all of one that is in none (place ()), however it is kept."""
    if is_stored(leaf):
        return np.asarray(jax.tree.map(lambda x: x[place], leaf).dequantised())
    return np.asarray(leaf[place])


def _ratio(losses: list[tuple[float, float]]) -> float:
    lost, change = np.linalg.norm(np.array(losses), axis=0)
    return float(lost / change) if change else 0.0
