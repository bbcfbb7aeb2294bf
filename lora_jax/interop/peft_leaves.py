"""What of a PEFT file is trained as it is: modules and biases that are saved whole, and token rows."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop import peft_layout as layout
from lora_jax.interop.peft_layout import PREFIX
from lora_jax.interop.peft_reader import Reader
from lora_jax.leaves import Leaf, Rows
from lora_jax.models import keys

Maker = Callable[[], dict[str, Any]]


def whole(reader: Reader, targets: list[str]) -> Maker:
    """The modules and biases that a config says are saved whole.

    Biases that a file has for some layers of a model alone are the base's in the others.

    Args:
      reader: of the file; learns which tensors to expect.
      targets: the modules that are adapted.

    Returns:
      A function that reads them, for when all is checked.

    Raises:
      ValueError: some layers of a module that is no bias are missing from the config, or it asks for other biases.
    """
    tensors = {name: _tensor(reader, name) for name in reader.settings.ending("modules_to_save", list(reader.modules))}
    for name in tensors:
        if layout.embedding(reader.modules[name].key):
            reader.alone(name)
    tensors |= _biases(reader, targets)
    for name, tensor in tensors.items():
        reader.expected[tensor] = list(keys.file_shape(reader.modules[name].key, reader.config))

    def make() -> dict[str, Any]:
        found = {}
        for key, names in reader.grouped(tensors):
            missing = sorted(set(reader.names(key)) - set(names))
            if missing and not key.hf.endswith(".bias"):
                raise ValueError(
                    f"{reader.settings.path}: modules_to_save of some layers alone is not supported: "
                    f"{missing[0]} is not among them"
                )
            value = (
                np.array(reader.base[key.path], np.float32) if missing else np.empty(_shape(reader, key), np.float32)
            )
            parts = value.reshape(-1, *keys.shape(key, reader.config))
            for name in names:
                tensor = reader.file.tensor(tensors[name])
                parts[reader.modules[name].place] = keys.from_file(tensor, key, reader.config)
            found[key.path] = Leaf(jnp.array(value))
        return found

    return make


def rows(reader: Reader, asked: Any, prefix: str) -> Maker:
    """The rows of embeddings that a config says are trained.

    Args:
      reader: of the file; learns which tensors to expect.
      asked: numbers of rows, or these by the name of an embedding.
      prefix: of the tensors' names.

    Returns:
      A function that reads them, for when all is checked.

    Raises:
      ValueError: these are no rows of an embedding.
    """
    tables = [name for name, module in reader.modules.items() if layout.embedding(module.key)]
    by_name = asked if isinstance(asked, dict) else {name: asked for name in tables}
    path, chosen = reader.settings.path, {}
    for ending, which in by_name.items():
        named = [name for name in tables if name == ending or name.endswith(f".{ending}")]
        if not named or not isinstance(which, list) or not which:
            raise ValueError(f"{path}: token rows {ending!r}: {which!r} are not rows of an embedding")
        vocab = reader.config.vocab
        if not all(type(row) is int and 0 <= row < vocab for row in which) or len({*which}) < len(which):
            raise ValueError(f"{path}: token rows {which} are not different rows below {vocab}")
        chosen[named[0]] = tuple(which)
        reader.expected[f"{PREFIX}{named[0]}.{prefix}trainable_tokens_delta"] = [len(which), reader.config.dim]

    def make() -> dict[str, Any]:
        found = {}
        for name, which in chosen.items():
            key = reader.modules[name].key
            values = reader.file.tensor(f"{PREFIX}{name}.{prefix}trainable_tokens_delta")
            # The file holds the rows themselves, whatever its names say.
            base = layout.rows(reader.base[key.path], which)
            found[key.path] = Rows(jnp.array(values - base), which, layout.axes(key))
        return found

    return make


def _biases(reader: Reader, targets: list[str]) -> dict[str, str]:
    """The tensors of biases; of a module that is adapted, PEFT has it one level deeper."""
    asked, own = reader.settings.values.get("bias") or "none", reader.settings.kind.lower() + "_only"
    if asked not in ("none", "all", own):
        raise ValueError(f"{reader.settings.path}: bias={asked!r} is not supported")
    if asked == "none":
        return {}
    adapted = {f"{name}.bias" for name in targets}
    found = {}
    for name in reader.modules:
        if name.endswith(".bias") and (asked == "all" or name in adapted):
            deeper = f"{PREFIX}{name.removesuffix('.bias')}.base_layer.bias"
            found[name] = deeper if deeper in reader.file.names else _tensor(reader, name)
    return found


def _tensor(reader: Reader, name: str) -> str:
    return f"{PREFIX}{name}" if name.endswith(".bias") else f"{PREFIX}{name}.weight"


def _shape(reader: Reader, key: keys.Key) -> tuple[int, ...]:
    return (*keys.stack(key, reader.config), *keys.shape(key, reader.config))
