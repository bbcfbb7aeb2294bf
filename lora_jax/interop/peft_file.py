"""PEFT's `adapter_model.safetensors`: its tensors are checked before they are read, and no pickle is opened."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.interop import peft_config
from lora_jax.interop.peft_layout import PREFIX

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
FLOATS = ("F16", "BF16", "F32", "F64")


class File:
    """A safetensors file, whose tensors are checked before they are read."""

    def __init__(self, folder: Path):
        self.path = folder / WEIGHTS
        if not self.path.is_file():
            if (folder / PICKLED).exists():
                raise ValueError(
                    f"{folder / PICKLED}: pickled weights can run code and are never opened; ask for, or have PEFT "
                    f"save, {WEIGHTS}"
                )
            raise FileNotFoundError(f"{self.path}: no such file; give the folder of a PEFT adapter")
        try:
            self._file = safe_open(self.path, framework="numpy")
            self.names = set(self._file.keys())
        except SafetensorError as error:
            raise ValueError(f"{self.path}: not a whole safetensors file ({error}); download it again") from None
        self.metadata: Mapping[str, str] = self._file.metadata() or {}

    def check(self, expected: Mapping[str, list[int]], allowed: Iterable[str] = ()) -> None:
        """Raises ValueError unless the tensors are those that are expected, and perhaps others that are allowed."""
        wrong = [
            f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (
                ("missing", expected.keys() - self.names),
                ("unexpected", self.names - expected.keys() - set(allowed)),
            )
            if names
        ]
        if wrong:
            raise ValueError(
                f"{self.path}: tensors {' and '.join(wrong)}; the file, its {peft_config.NAME} and this model do not "
                f"belong together, or names do not begin with {PREFIX!r}"
            )
        for name, shape in expected.items():
            found = self._file.get_slice(name)
            if found.get_shape() != shape:
                raise ValueError(
                    f"{self.path}: tensor {name} has shape {found.get_shape()} where the config and this model ask "
                    f"for {shape}"
                )
            if found.get_dtype() not in FLOATS:
                raise ValueError(f"{self.path}: tensor {name} holds {found.get_dtype()}, not one of {FLOATS}")

    def tensor(self, name: str) -> np.ndarray:
        """The tensor, float32."""
        try:
            x = self._file.get_tensor(name).astype(np.float32)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: cannot read tensor {name} ({error}); download it again") from None
        if not np.isfinite(x).all():
            raise ValueError(f"{self.path}: tensor {name} is not finite everywhere")
        return x
