"""Where PEFT keeps an adapter's arrays: tensors for each module and layer, the heads of a weight flattened.

All names and axes come from the model's key table; the layers and experts that are stacked here are tensors of
their own there.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Axes
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
from lora_jax.stored import array

PREFIX = "base_model.model."


class Module(NamedTuple):
    """One tensor of a parameter: what PEFT adapts by the name of a module.

    Attributes:
      key: the parameter's.
      place: which of its tensors it is, counted layer by layer, and expert by expert within a layer.
    """

    key: keys.Key
    place: int

    @property
    def matrix(self) -> bool:
        """Whether it is a weight that methods can adapt."""
        return len(self.key.file_axes.split()) == 2


class Part(NamedTuple):
    """An array of an adapter: its field here, and the end of its name, side of the weight and axes there.

    The side is a field of `Axes`; of the axes, n stands for all of that side's, R for the rank.
    """

    field: str
    suffix: str
    side: str
    axes: str


LORA = (Part("a", "lora_A.weight", "inp", "Rn"), Part("b", "lora_B.weight", "out", "nR"))
EMBEDDING = (Part("a", "lora_embedding_A", "inp", "Rn"), Part("b", "lora_embedding_B", "out", "nR"))
DORA = (*LORA, Part("m", "lora_magnitude_vector", "out", "n"))
VERA = (Part("d", "vera_lambda_d", "", "R"), Part("e", "vera_lambda_b", "out", "n"))
IA3 = {"out": (Part("l", "ia3_l", "out", "n1"),), "in": (Part("l", "ia3_l", "inp", "1n"),)}


def modules(config: DecoderConfig) -> dict[str, Module]:
    """The modules of a model by their Hugging Face names, in the order of its layers.

    Tensors that hold several parameters one after another are not among them: PEFT has one adapter for all of these.
    Nor are arrays of experts, which are no modules.
    """
    return {
        key.hf.format(*place).removesuffix(".weight"): Module(key, i)
        for key in keys.table(config)
        if "|" not in key.file_axes and not key.array
        for i, place in enumerate(keys.places(key, config))
    }


def count(key: keys.Key, config: DecoderConfig) -> int:
    """How many modules a parameter is in files."""
    return math.prod(keys.stack(key, config))


def embedding(key: keys.Key) -> bool:
    """Whether a weight is looked up, not multiplied with: its file axes are then (in, out)."""
    return key.path.endswith("/embedding")


def input_first(key: keys.Key) -> bool:
    """Whether a tensor's last two axes are in and out, as here: of an embedding, and of experts in one array."""
    return embedding(key) or key.array


def axes(key: keys.Key) -> Axes:
    """The use of a parameter's axes, as tracing the decoder finds it, from the table."""
    first, second = (axis.split("|")[0].split(".") for axis in key.file_axes.split()[-2:])
    inp, out = (first, second) if input_first(key) else (second, first)
    letters, stacked = key.axes.split(), key.hf.count("{}")
    sides = (tuple(letters.index(letter) + stacked for letter in side) for side in (inp, out))
    return Axes(tuple(range(keys.leading(key))), *sides)


def sizes(key: keys.Key, config: DecoderConfig, side: str) -> list[int]:
    """The sizes of the axes on one side of one tensor of a weight; of no side, none."""
    shape, stacked = keys.shape(key, config), key.hf.count("{}")
    return [shape[axis - stacked] for axis in getattr(axes(key), side)] if side else []


def shape(part: Part, key: keys.Key, config: DecoderConfig, rank: int) -> list[int]:
    """The shape of an array's tensor in files."""
    size = {"n": math.prod(sizes(key, config, part.side)), "R": rank, "1": 1}
    return [size[letter] for letter in part.axes]


def to_file(x: Any, part: Part, own: Sequence[int], key: keys.Key, config: DecoderConfig) -> np.ndarray:
    """An array of an adapter as its tensors in files.

    Args:
      x: [*stack, *axes, R], or without R.
      part: which array it is.
      own: the weight's axes that it has, in its order.
      key: the weight.
      config: the decoder's shape.

    Returns:
      [S, *shape(part, ...)], with S tensors.
    """
    x, want = np.asarray(x, np.float32), getattr(axes(key), part.side) if part.side else ()
    first = keys.leading(key)
    order = [*range(first), *(first + list(own).index(axis) for axis in want)]
    x = x.transpose([*order, *range(len(order), x.ndim)])
    x = x.reshape(math.prod(x.shape[:first]), *_flat(part, x.shape[first + len(want) :]))
    return np.ascontiguousarray(x.swapaxes(-1, -2) if part.axes == "Rn" else x)


def _flat(part: Part, rest: tuple[int, ...]) -> list[int]:
    size = {"n": -1, "1": 1, "R": rest[-1] if rest else 1}
    return [size[letter] for letter in part.axes.replace("Rn", "nR")]


def from_file(x: np.ndarray, part: Part, key: keys.Key, config: DecoderConfig) -> jnp.ndarray:
    """The inverse of `to_file`, its axes those of `axes(key)`."""
    x = x.swapaxes(-1, -2) if part.axes == "Rn" else x
    rank = [x.shape[-1]] if "R" in part.axes else []
    return jnp.asarray(x.reshape(*keys.matrices(key, config), *sizes(key, config, part.side), *rank))


def rows(leaf: Any, which: Sequence[int]) -> np.ndarray:
    """Rows of an embedding, float32."""
    return np.asarray(array(leaf)[np.array(which)], np.float32)
