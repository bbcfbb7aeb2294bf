"""From one tensor per layer, as files keep them, to parameters stacked over layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig

Read = Callable[[keys.Key, int], tuple[str, np.ndarray | None]]


def read(config: DecoderConfig, tensor: Read, dtype: jnp.dtype, source: Path) -> dict[str, Any]:
    """Fills the parameters one tensor at a time, so that one stacked parameter at most is held twice.

    Args:
      config: the decoder's shape.
      tensor: (key, layer) -> the tensor's name in the file, and its values or None if it is not there.
      dtype: of the parameters.
      source: path named in error messages.

    Returns:
      Nested dict of arrays.

    Raises:
      ValueError: a tensor is missing or has the wrong shape.
    """
    params: dict[str, Any] = {}
    for key in keys.table(config):
        layers = config.layers if "{}" in key.hf else None
        out = np.empty((layers or 1, *keys.shape(key, config)), dtype)
        for layer in range(len(out)):
            name, x = tensor(key, layer)
            expected = keys.file_shape(key, config)
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
            out[layer] = keys.from_file(x, key, config)
        group, leaf = key.path.rsplit("/", 1)
        node = params
        for part in group.split("/"):
            node = node.setdefault(part, {})
        node[leaf] = jax.device_put(out if layers else out[0])
    return params
