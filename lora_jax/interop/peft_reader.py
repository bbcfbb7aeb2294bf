"""What the readers of PEFT's methods share: the file, the model's modules, and which tensors are expected."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.interop import peft_layout as layout
from lora_jax.interop.peft_config import Settings
from lora_jax.interop.peft_file import File
from lora_jax.interop.peft_layout import PREFIX, Module, Part
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig


class Reader:
    """A file being read: what its config asks for is listed in `expected` first, then checked, then read.

    Args:
      settings: its config.
      file: its tensors.
      config: of the decoder that it is for.
      base: the decoder's parameters, by path.
    """

    def __init__(self, settings: Settings, file: File, config: DecoderConfig, base: Mapping[str, Any]):
        self.settings, self.file, self.config, self.base = settings, file, config, base
        self.modules: dict[str, Module] = layout.modules(config)
        self.expected: dict[str, list[int]] = {}

    def alone(self, name: str) -> None:
        """Raises ValueError if an adapted end of the model is one matrix with the other end."""
        if self.config.tied:
            raise ValueError(
                f"{self.settings.path}: {name} is adapted, but this model's head is the same matrix, which PEFT leaves "
                "as it was; save the model with a head of its own first (tie_word_embeddings false; "
                "train.export --format=merged does both)"
            )

    def names(self, key: keys.Key) -> list[str]:
        """The modules of a parameter."""
        return [name for name, module in self.modules.items() if module.key == key]

    def grouped(self, names: Iterable[str]) -> list[tuple[keys.Key, list[str]]]:
        """Modules by the parameter that they belong to, in the model's order."""
        chosen = set(names)
        table = dict.fromkeys(module.key for name, module in self.modules.items() if name in chosen)
        return [(key, [name for name in self.names(key) if name in chosen]) for key in table]

    def expect(
        self, names: Iterable[str], parts: Callable[[keys.Key], tuple[Part, ...]], ranks: Mapping[str, int]
    ) -> None:
        """Notes which tensors modules must have, and their shapes."""
        for name in names:
            key = self.modules[name].key
            for part in parts(key):
                self.expected[f"{PREFIX}{name}.{part.suffix}"] = layout.shape(part, key, self.config, ranks[name])

    def stacked(
        self, key: keys.Key, names: Iterable[str], parts: tuple[Part, ...], rank: int, fill: float = 0.0
    ) -> dict[str, Any]:
        """The arrays of one weight, of all its layers, filled up where a layer has none or a smaller rank."""
        arrays = {}
        for part in parts:
            count, shape = layout.count(key, self.config), layout.shape(part, key, self.config, rank)
            turned = part.axes == "Rn"  # in memory as it is used here, so that no copy is made of all layers
            x = np.full((count, *(shape[::-1] if turned else shape)), fill, np.float32)
            x = x.swapaxes(-1, -2) if turned else x
            for name in names:
                one = self.file.tensor(f"{PREFIX}{name}.{part.suffix}")
                x[(self.modules[name].place, *map(slice, one.shape))] = one
            arrays[part.field] = layout.from_file(x, part, key, self.config)
        return arrays
