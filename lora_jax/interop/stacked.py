"""From one tensor per layer and expert, as files keep them, to parameters stacked over these, and back."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.interop import guard
from lora_jax.models import decoder, keys
from lora_jax.models.config import DecoderConfig
from lora_jax.quant import Quantised, quantize_leaf
from lora_jax.quantize import Choice, Rules, choose
from lora_jax.trace import trace
from lora_jax.tree import leaves_by_path, replace

ALIGNMENT = 64  # bytes, of XLA's buffers
Place = tuple[int, ...]
Read = Callable[[keys.Key, Place], tuple[str, Any]]
Places = Callable[[DecoderConfig, Any], Any]
Weight = Callable[[Place, keys.Index], np.ndarray]


def read(
    config: DecoderConfig,
    tensor: Read,
    dtype: jnp.dtype,
    source: Path,
    quantize: Rules | None = None,
    places: Places | None = None,
) -> dict[str, Any]:
    """Fills the parameters one tensor at a time: in memory are the model in its dtype, and one tensor of the file.

    Where the device is not the CPU, one parameter at a time, its layers stacked, is in the host's memory as well. One
    to quantise is quantised as its layers are read, so that one layer of it at most is held as floats.

    With places, what a device has is read and put there, one device after another, and nothing else.

    Args:
      config: the decoder's shape.
      tensor: (key, place) -> the tensor's name in the file, and its values, or what has its shape and gives slices of
        it, or None if it is not there; the place is the layer and the expert, as far as the parameter is stacked.
      dtype: of the parameters.
      source: path named in error messages.
      quantize: patterns and formats as for `lora_jax.quantize.choose`.
      places: (config, parameters as shapes) -> where each goes, a tree of `jax.sharding.NamedSharding`; without, all
        are on the default device.

    Returns:
      Nested dict of arrays, and of `Quantised` weights where rules ask for them.

    Raises:
      ValueError: a tensor is missing, has the wrong shape or is not finite, or a rule is wrong.
    """
    shapes = jax.eval_shape(functools.partial(decoder.init, config=config, dtype=dtype), jax.random.key(0))
    chosen = {} if quantize is None else choose(_sites(config, shapes), quantize)
    where = places and places(config, _stored(shapes, chosen))
    params: dict[str, Any] = {}
    for key in keys.table(config):
        weight = functools.partial(_weight, key, config, tensor, source)
        stack, shape = keys.stack(key, config), keys.shape(key, config)
        *groups, leaf = key.path.split("/")
        node, place = params, where
        for group in groups:
            node, place = node.setdefault(group, {}), place and place[group]
        place = place and place[leaf]
        if key.path in chosen:
            node[leaf] = _quantised(weight, dtype, chosen[key.path], stack, shape, place)
        else:
            node[leaf] = _put(weight, dtype, stack, shape, place)
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
    return np.ascontiguousarray(np.concatenate(rows, keys.shared_axis(parts[0])))


def _weight(
    key: keys.Key, config: DecoderConfig, tensor: Read, source: Path, place: Place, index: keys.Index
) -> np.ndarray:
    """A part of one tensor of a parameter, in the axes used here."""
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
    part = keys.from_file(x, key, config, index)
    if not guard.finite(part):
        raise ValueError(f"{source}: tensor {name} has values that are not finite; download the file again")
    return part


def _put(weight: Weight, dtype: jnp.dtype, stack: Place, shape: Place, where: NamedSharding | None) -> jax.Array:
    """The tensors of all places on their devices, a part that several have being read once."""
    whole = (*stack, *shape)
    if where is None:
        return jax.device_put(_filled(weight, dtype, [(0, size) for size in whole], len(stack)))
    parts: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in where.addressable_devices_indices_map(whole).items():
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index or (), whole, strict=True))
        parts.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in parts.items():
        part = _filled(weight, dtype, bounds, len(stack))
        # Waiting keeps the next part from being read while this one is still in the host's memory.
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(whole, where, arrays)


def _filled(weight: Weight, dtype: jnp.dtype, bounds: Sequence[tuple[int, int]], stacked: int) -> np.ndarray:
    """What lies within bounds of the tensors of all places, in one array."""
    out = _aligned(tuple(stop - start for start, stop in bounds), np.dtype(dtype))
    index = tuple(slice(*bound) for bound in bounds[stacked:])
    for place in np.ndindex(*out.shape[:stacked]):
        out[place] = weight(tuple(i + start for i, (start, _) in zip(place, bounds, strict=False)), index)
    return out


def _aligned(shape: Place, dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes as it is, where it would copy another."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _quantised(weight: Weight, dtype: jnp.dtype, how: Choice, stack: Place, shape: Place, where: Any) -> Quantised:
    """The same quantised; of a tree of shardings, that of the codes is the weight's."""

    def put(weight: Weight, stack: Place, where: Any) -> Quantised:
        floats = _put(weight, dtype, stack, shape, where and where.codes)
        if where:  # whole on every device, so that sums over a matrix have the bits of one device's
            floats = jax.device_put(floats, NamedSharding(where.codes.mesh, PartitionSpec()))
        # Waiting for each layer keeps the next from being read while this one is still held as floats.
        return jax.block_until_ready(jax.device_put(quantize_leaf(floats, *how), where))

    if not stack:
        return put(weight, stack, where)

    def one(layer: int) -> Quantised:
        place = jax.tree.map(lambda x: NamedSharding(x.mesh, PartitionSpec(None, *x.spec[1:])), where)
        return put(lambda place, index: weight((layer, *place[1:]), index), (1, *stack[1:]), place)

    layers = jax.tree.map(lambda *layer: jnp.concatenate(layer), *map(one, range(stack[0])))
    return jax.device_put(layers, where)


def _stored(shapes: dict[str, Any], chosen: dict[str, Choice]) -> dict[str, Any]:
    """The shapes of parameters of which some are quantised."""
    leaves = leaves_by_path(shapes)
    new = {
        path: jax.eval_shape(lambda w, how=how: quantize_leaf(w, *how), leaves[path]) for path, how in chosen.items()
    }
    return replace(shapes, new)


def _sites(config: DecoderConfig, shapes: dict[str, Any]):
    """How the decoder uses its parameters."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return trace(functools.partial(decoder.forward, config=config), shapes, tokens)
