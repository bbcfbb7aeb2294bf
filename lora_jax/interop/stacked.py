"""From one tensor per layer, as files keep them, to parameters stacked over layers, and back."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models import decoder, keys
from lora_jax.models.config import DecoderConfig
from lora_jax.quant import Quantised, quantize_leaf
from lora_jax.quantize import Choice, Rules, choose
from lora_jax.trace import trace

Read = Callable[[keys.Key, int], tuple[str, np.ndarray | None]]


def read(
    config: DecoderConfig, tensor: Read, dtype: jnp.dtype, source: Path, quantize: Rules | None = None
) -> dict[str, Any]:
    """Fills the parameters one tensor at a time, so that one stacked parameter at most is held twice.

    A parameter to quantise is quantised as its layers are read, so that one layer of it at most is held as floats.

    Args:
      config: the decoder's shape.
      tensor: (key, layer) -> the tensor's name in the file, and its values or None if it is not there.
      dtype: of the parameters.
      source: path named in error messages.
      quantize: patterns and formats as for `lora_jax.quantize.choose`.

    Returns:
      Nested dict of arrays, and of `Quantised` weights where rules ask for them.

    Raises:
      ValueError: a tensor is missing or has the wrong shape, or a rule is wrong.
    """
    chosen = {} if quantize is None else choose(_sites(config, dtype), quantize)
    params: dict[str, Any] = {}
    for key in keys.table(config):
        layers = config.layers if "{}" in key.hf else None
        weights = _weights(key, config, tensor, source)
        group, leaf = key.path.rsplit("/", 1)
        node = params
        for part in group.split("/"):
            node = node.setdefault(part, {})
        if key.path in chosen:
            node[leaf] = _quantised(weights, dtype, chosen[key.path], layers)
        else:
            out = np.empty((layers or 1, *keys.shape(key, config)), dtype)
            for layer, w in enumerate(weights):
                out[layer] = w
            node[leaf] = jax.device_put(out if layers else out[0])
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
        layers = config.layers if "{}" in name else None
        leaves = [_leaf(params, key, config, layers) for key in parts]
        nbytes = sum(leaf.nbytes for leaf in leaves) // (layers or 1)
        for layer in range(layers or 1):
            values = functools.partial(_tensor, parts, leaves, layer if layers else None, config)
            yield Tensor(name.format(layer), nbytes, values)


def _leaf(params: dict[str, Any], key: keys.Key, config: DecoderConfig, layers: int | None) -> jax.Array:
    expected = (*([layers] if layers else []), *keys.shape(key, config))
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


def _tensor(parts, leaves, layer, config) -> np.ndarray:
    values = [np.asarray(leaf if layer is None else leaf[layer]) for leaf in leaves]
    rows = [keys.to_file(x, key, config) for x, key in zip(values, parts, strict=True)]
    return np.ascontiguousarray(np.concatenate(rows))


def _weights(key: keys.Key, config: DecoderConfig, tensor: Read, source: Path) -> Iterator[np.ndarray]:
    """The parameter of each layer, in the axes used here."""
    expected = keys.file_shape(key, config)
    for layer in range(config.layers if "{}" in key.hf else 1):
        name, x = tensor(key, layer)
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
        yield keys.from_file(x, key, config)


def _quantised(weights: Iterator[np.ndarray], dtype: jnp.dtype, how: Choice, layers: int | None) -> Quantised:
    if not layers:
        return quantize_leaf(next(weights).astype(dtype), *how)
    # Waiting for each layer keeps the next from being read while this one is still held as floats.
    parts = [jax.block_until_ready(quantize_leaf(w.astype(dtype)[None], *how)) for w in weights]
    return jax.tree.map(lambda *layer: jnp.concatenate(layer), *parts)


def _sites(config: DecoderConfig, dtype: jnp.dtype):
    """How the decoder uses its parameters."""
    params = jax.eval_shape(functools.partial(decoder.init, config=config, dtype=dtype), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return trace(functools.partial(decoder.forward, config=config), params, tokens)
