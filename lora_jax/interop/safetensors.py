"""Reads and writes a Hugging Face model folder: `config.json` and one or several safetensors files."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.interop import guard, stacked
from lora_jax.models import config as configs
from lora_jax.models import keys
from lora_jax.quantize import Rules

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAPPED = 2**25  # bytes read of open files before they are opened again


def decoder_config(folder: Path) -> configs.DecoderConfig:
    """The shape of the model in a folder.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is corrupt, or the model is not supported.
    """
    path = folder / "config.json"
    settings = read_json(path)
    with guard.told(path):
        guard.numbers(settings, path)
        return configs.from_hf(settings, str(path))


def load(
    folder: str | Path, dtype: jnp.dtype, quantize: Rules | None = None, places: stacked.Places | None = None
) -> tuple[configs.DecoderConfig, dict[str, Any]]:
    """The config and the parameters of a model folder.

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
      dtype: of the parameters.
      quantize: which to quantise as they are read; patterns and formats as for `lora_jax.quantize.choose`.
      places: where they go, as for `stacked.read`; only what the devices of this host have is read.

    Returns:
      config, and the parameters as nested dict of arrays or `Quantised` weights, layers stacked.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is corrupt, the model is not supported, a tensor is missing or has the wrong shape.
    """
    folder = Path(folder)
    config = decoder_config(folder)
    files = Files(folder)
    guard.held(config, sum(file.stat().st_size for file in folder.glob("*.safetensors")), folder / "config.json")

    def read(key: keys.Key, place: stacked.Place) -> tuple[str, np.ndarray | Slices | None]:
        name = key.hf.format(*place)
        if name not in files:
            return name, None
        return name, Slices(files, name) if places else files.tensor(name)

    return config, stacked.read(config, read, dtype, folder, quantize, places)


def save(
    folder: str | Path, config: configs.DecoderConfig, params: dict[str, Any], shard_bytes: int = 5 * 2**30
) -> None:
    """Writes parameters as the files that `load` and transformers read, in their dtype, a file at a time.

    Args:
      folder: made if it is missing; its config.json is the caller's, the one that the model came with.
      config: the decoder's shape.
      params: nested dict of arrays, layers stacked.
      shard_bytes: most bytes of a file, unless one tensor alone is larger.

    Raises:
      ValueError: a parameter is missing, quantised, or has the wrong shape.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[stacked.Tensor]] = [[]]
    for tensor in stacked.tensors(config, params):
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for file, shard in zip(files, shards, strict=True):
        save_file({tensor.name: tensor.values() for tensor in shard}, folder / file, {"format": "pt"})
    if count > 1:
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


class Files:
    """The tensors of a folder, by name, whichever file holds them; each is read when asked for."""

    def __init__(self, folder: Path):
        self._open, self._read = functools.cache(_open), 0
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX)
            if not isinstance(index.get("weight_map"), dict):
                raise ValueError(f"{folder / INDEX}: has no weight_map; download the file again")
            names = index["weight_map"].items()
            self._files = {name: guard.inside(folder, file, folder / INDEX) for name, file in names}
        else:
            self._files = dict.fromkeys(self._open(folder / WEIGHTS).keys(), folder / WEIGHTS)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def tensor(self, name: str, index: keys.Index | None = None) -> np.ndarray:
        """The named tensor, or a part of it: nothing beside the index is read."""
        path = self._files[name]
        if self._read > MAPPED:
            # The pages that were read of a file are in memory as long as it is mapped.
            self._open.cache_clear()
            self._read = 0
        try:
            file = self._open(path)
            x = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        except (SafetensorError, AttributeError, TypeError) as error:  # the latter two of dtypes that NumPy lacks
            raise ValueError(f"{path}: cannot read tensor {name} ({error}); download the file again") from None
        self._read += x.nbytes
        return x

    def shape(self, name: str) -> tuple[int, ...]:
        """The named tensor's."""
        return tuple(self._open(self._files[name]).get_slice(name).get_shape())


class Slices:
    """A tensor whose parts are read when they are asked for."""

    def __init__(self, files: Files, name: str):
        self.files, self.name, self.shape = files, name, files.shape(name)

    def __getitem__(self, index: keys.Index) -> np.ndarray:
        return self.files.tensor(self.name, index)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give the folder of a Hugging Face model") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__} where an object is needed")
    return value


def _open(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; download the model's safetensors files into its folder")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from None
