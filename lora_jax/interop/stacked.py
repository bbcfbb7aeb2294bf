"""From one tensor per layer and expert, as files keep them, to parameters stacked over these, and back."""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.interop import guard
from lora_jax.models import decoder, keys
from lora_jax.models.config import DecoderConfig
from lora_jax.quant import Quantised, quantize_leaf
from lora_jax.quantize import Choice, Rules, choose
from lora_jax.trace import trace

ALIGNMENT = 64  # bytes, of XLA's buffers
Place = tuple[int, ...]
Read = Callable[[keys.Key, Place], tuple[str, np.ndarray | None]]


def read(
    config: DecoderConfig, tensor: Read, dtype: jnp.dtype, source: Path, quantize: Rules | None = None
) -> dict[str, Any]:
    """Fills the parameters one tensor at a time: in memory are the model in its dtype, and one tensor of the file.

    Where the device is not the CPU, one parameter at a time, its layers stacked, is in the host's memory as well. One
    to quantise is quantised as its layers are read, so that one layer of it at most is held as floats.

    Args:
      config: the decoder's shape.
      tensor: (key, place) -> the tensor's name in the file, and its values or None if it is not there; the place is
        the layer and the expert, as far as the parameter is stacked.
      dtype: of the parameters.
      source: path named in error messages.
      quantize: patterns and formats as for `lora_jax.quantize.choose`.

    Returns:
      Nested dict of arrays, and of `Quantised` weights where rules ask for them.

    Raises:
      ValueError: a tensor is missing, has the wrong shape or is not finite, or a rule is wrong.
    """
    chosen = {} if quantize is None else choose(_sites(config, dtype), quantize)
    params: dict[str, Any] = {}
    for key in keys.table(config):
        weight = functools.partial(_weight, key, config, tensor, source)
        sizes = keys.stack(key, config), keys.shape(key, config)
        group, leaf = key.path.rsplit("/", 1)
        node = params
        for part in group.split("/"):
            node = node.setdefault(part, {})
        if key.path in chosen:
            node[leaf] = _quantised(weight, dtype, chosen[key.path], *sizes)
        else:
            node[leaf] = jax.device_put(_filled(weight, dtype, *sizes))
    return params


class Tensor(NamedTuple):
    """A tensor of a Hugging Face file: its name, its bytes, and a function that fetches its values."""

    name: str
    nbytes: int
    values: Callable[[], np.ndarray]


def tensors(config: DecoderConfig, params: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of Hugging Face files that hold some parameters, in their dtypes.

    Args:
      config: the decoder's shape.
      params: nested dict of arrays.

    Yields:
      One tensor after another.

    Raises:
      ValueError: a parameter is missing, quantised, or has the wrong shape.
    """
    for name, parts in keys.tensors(config).items():
        leaves = [_leaf(params, key, config) for key in parts]
        places = keys.places(parts[0], config)
        nbytes = sum(leaf.nbytes for leaf in leaves) // len(places)
        for place in places:
            yield Tensor(name.format(*place), nbytes, functools.partial(_tensor, parts, leaves, place, config))


def _leaf(params: dict[str, Any], key: keys.Key, config: DecoderConfig) -> jax.Array:
    expected = (*keys.stack(key, config), *keys.shape(key, config))
    node: Any = params
    for part in key.path.split("/"):
        if not isinstance(node, dict) or part not in node:
            raise ValueError(f"{key.path} {list(expected)} is missing from the parameters; is this their config?")
        node = node[part]
    if isinstance(node, Quantised):
        raise ValueError(f"{key.path} is quantised, which model files here are not; merge it into floats first")
    if node.shape != expected:
        raise ValueError(f"{key.path} has shape {list(node.shape)} where the config asks for {list(expected)}")
    return node


def _tensor(parts, leaves, place, config) -> np.ndarray:
    values = [np.asarray(leaf[place]) for leaf in leaves]
    rows = [keys.to_file(x, key, config) for x, key in zip(values, parts, strict=True)]
    return np.ascontiguousarray(np.concatenate(rows))


def _weight(key: keys.Key, config: DecoderConfig, tensor: Read, source: Path, place: Place) -> np.ndarray:
    """One tensor of a parameter, in the axes used here."""
    expected = keys.file_shape(key, config)
    name, x = tensor(key, place)
    if x is None:
        raise ValueError(
            f"{source}: tensor {name} {list(expected)} is missing; the file and its config do not "
            "belong together, or it was not copied whole"
        )
    if x.shape != expected:
        raise ValueError(
            f"{source}: tensor {name} has shape {list(x.shape)} where the config asks for "
            f"{list(expected)}; use the config.json this file came with"
        )
    if not guard.finite(x):
        raise ValueError(f"{source}: tensor {name} has values that are not finite; download the file again")
    return keys.from_file(x, key, config)


def _filled(weight: Callable[[Place], np.ndarray], dtype: jnp.dtype, stack: Place, shape: Place) -> np.ndarray:
    """The tensors of all places, in one array."""
    out = _aligned((*stack, *shape), np.dtype(dtype))
    for place in np.ndindex(*stack):
        out[place] = weight(place)
    return out


def _aligned(shape: Place, dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes as it is, where it would copy another."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _quantised(
    weight: Callable[[Place], np.ndarray], dtype: jnp.dtype, how: Choice, stack: Place, shape: Place
) -> Quantised:
    if not stack:
        return quantize_leaf(_filled(weight, dtype, stack, shape), *how)

    def one(layer: int) -> Quantised:
        floats = _filled(lambda place: weight((layer, *place[1:])), dtype, (1, *stack[1:]), shape)
        # Waiting for each layer keeps the next from being read while this one is still held as floats.
        return jax.block_until_ready(quantize_leaf(floats, *how))

    return jax.tree.map(lambda *layer: jnp.concatenate(layer), *map(one, range(stack[0])))


def _sites(config: DecoderConfig, dtype: jnp.dtype):
    """How the decoder uses its parameters."""
    params = jax.eval_shape(functools.partial(decoder.init, config=config, dtype=dtype), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return trace(functools.partial(decoder.forward, config=config), params, tokens)
