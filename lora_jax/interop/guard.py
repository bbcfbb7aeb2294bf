"""What keeps broken and hostile files from more than one line of error: every value of theirs may be anything."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig

LAYERS = 10_000  # more than any model has


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns whatever a file's values make fail into a ValueError of one line that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a library's may be of that very class
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and str(path.parent) in text:
            raise
        raise ValueError(f"{path}: a value in it makes no sense ({text[:300]}); download the file again") from None


def numbers(settings: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for numbers of layers that no model has, before anything is made for each of them."""
    counts = ("num_hidden_layers", "num_experts", "num_local_experts", ".block_count", ".expert_count")
    for name in settings:
        value = settings[name] if name.endswith(counts) else None
        if value is not None and (type(value) is not int or not 0 <= value <= LAYERS):
            raise ValueError(f"{path}: {name} is {value!r}, and should be a number, at most {LAYERS}")


def held(config: DecoderConfig, nbytes: int, path: Path) -> None:
    """Raises ValueError if a model is larger than its files can hold, before memory is taken for it."""
    sizes = [(*keys.stack(key, config), *keys.shape(key, config)) for key in keys.table(config)]
    if any(type(n) is not int or n < 1 for size in sizes for n in size):
        raise ValueError(f"{path}: a size of the model is no number, or less than 1; download the file again")
    if (count := sum(map(math.prod, sizes))) > 8 * nbytes:  # no format takes less than a bit
        raise ValueError(f"{path}: asks for {count:,} parameters, and the files beside it have {nbytes:,} bytes")


def finite(x: np.ndarray) -> bool:
    """Whether no value is infinite or none; as fast as a sum in float32, which is not finite if one of them is not."""
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(np.add.reduce(x, None, np.float32)) or np.isfinite(x).all())


def inside(folder: Path, name: Any, path: Path) -> Path:
    """The path of a file that another one names, in the same folder.

    Raises:
      ValueError: it is no name, or one that leads out of the folder.
    """
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{path}: {name!r} is not the name of a file in its folder")
    return folder / name
