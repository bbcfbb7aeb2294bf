"""Parameters that are never held whole: each part is fetched, or computed, when it is asked for."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop import safetensors
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig

Place = tuple[int, ...]


class Parts:
    """An array in parts, one for each index of its leading axes; it has what exporters ask of an array.

    Args:
      shape: of the whole.
      dtype: of every part.
      leading: how many axes lead to a part.
      part: fetches the part at a place, `leading` numbers.
    """

    def __init__(self, shape: Place, dtype: Any, leading: int, part: Callable[[Place], np.ndarray]):
        self.shape, self.dtype, self.leading, self._part = tuple(shape), jnp.dtype(dtype), leading, part
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part, the parts below a shorter index, or single elements by arrays of indices, as NumPy has it."""
        index = index if isinstance(index, tuple) else (index,)
        if all(isinstance(i, int | np.integer) for i in index) and len(index) <= self.leading:
            return self._below(tuple(map(int, index)))
        if not self.leading:
            return self._below(())[index]
        places, inner = np.stack(index[: self.leading], -1), index[self.leading :]
        found = np.empty(len(places), self.dtype)
        for place in {tuple(map(int, place)) for place in places}:
            here = (places == place).all(-1)
            found[here] = self._below(place)[tuple(i[here] for i in inner)]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._below(()).astype(dtype or self.dtype, copy=False)

    def _below(self, place: Place) -> np.ndarray:
        rest = self.shape[len(place) : self.leading]
        if not rest:
            return np.asarray(self._part(place)).astype(self.dtype, copy=False)
        parts = [self._below((*place, *inner)) for inner in itertools.product(*map(range, rest))]
        return np.stack(parts).reshape(self.shape[len(place) :])


def load(folder: str | Path, dtype: Any = None) -> tuple[DecoderConfig, dict[str, Any]]:
    """The config of a model folder, and its parameters where they are: in the files, read a tensor at a time.

    Args:
      folder: holds config.json and safetensors.
      dtype: of the parameters; as in the files unless given.

    Returns:
      config, and a nested dict of `Parts`.

    Raises:
      FileNotFoundError, ValueError: as `safetensors.load`, a tensor's when it is read.
    """
    folder = Path(folder)
    config, files = safetensors.decoder_config(folder), safetensors.Files(folder)
    params: dict[str, Any] = {}
    for key in keys.table(config):
        stack = keys.stack(key, config)
        part = functools.partial(_tensor, key, config, files, folder)
        own = dtype or part((0,) * len(stack)).dtype
        put(params, key.path, Parts((*stack, *keys.shape(key, config)), own, len(stack), part))
    return config, params


def put(params: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf into a nested dict."""
    *groups, name = path.split("/")
    functools.reduce(lambda node, group: node.setdefault(group, {}), groups, params)[name] = leaf


def _tensor(key: keys.Key, config: DecoderConfig, files: safetensors.Files, folder: Path, place: Place) -> np.ndarray:
    name, expected = key.hf.format(*place), list(keys.file_shape(key, config))
    if name not in files:
        raise ValueError(f"{folder}: tensor {name} {expected} is missing; download the model again")
    x = files.tensor(name)
    if list(x.shape) != expected:
        raise ValueError(f"{folder}: tensor {name} has shape {list(x.shape)} where the config asks for {expected}")
    return keys.from_file(x, key, config)
