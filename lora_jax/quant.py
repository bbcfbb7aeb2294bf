"""Quantised weights: NF4 with doubly quantised scales, int4, int8 and fp8, as pytrees of codes and scales."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK, NESTED_BLOCK = 64, 256
_TINY = 1e-19  # a block whose scale is smaller counts as zeros
# The quantiles of N(0, 1) that QLoRA chose, scaled to [-1, 1].
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic() -> np.ndarray:
    """The 256 values of the 8-bit dynamic type: 0, 1, and ±10^(i-6) times 2^i midpoints of [0.1, 1], i = 0 ... 6."""
    edges = [np.linspace(0.1, 1, 2**i + 1, dtype=np.float32) for i in range(7)]
    positive = [np.float32(10.0 ** (i - 6)) * (x[:-1] + x[1:]) / 2 for i, x in enumerate(edges)]
    return np.sort(np.concatenate([[0, 1], *positive, *(-x for x in positive)])).astype(np.float32)


DYNAMIC = _dynamic()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nested:
    """Block scales kept as 8-bit codes: DYNAMIC[codes] · scale + offset.

    Attributes:
      codes: uint8, one for each block of the weight, in the weight's axes.
      scale: float32 [*stacked, n], one for each 256 block scales of a matrix, these counted along the weight's
        quantised axis first.
      offset: float32 [*stacked], their mean.
    """

    codes: jax.Array
    scale: jax.Array
    offset: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A weight kept as codes and scales.

    Every array begins with the weight's stacked axes, so that what slices each of them there (a scan over layers,
    `jax.tree.map(lambda x: x[0], q)`) gives the quantised weight of that layer.

    Attributes:
      codes: in the weight's axes. uint8 for "nf4" and "int4", holding the first half of a block in the high bits and
        the second in the low ones; int8; float8_e4m3fn.
      scales: float32 with as many blocks along `axis` as the weight has, or `Nested` for "nf4".
      format: "nf4", "int4", "int8" or "fp8".
      axis: the axis along which blocks run, counted from the end.
      length: the weight's size along it; the codes may be padded.
      dtype: of the weight this stands for.
    """

    codes: jax.Array
    scales: Any
    format: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return _with_size(self.codes.shape, self.axis, self.length)

    @property
    def ndim(self) -> int:
        """How many axes the weight has."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """How many parameters the weight has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its codes and scales."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def dequantised(self) -> jax.Array:
        """The weight, in `dtype`: values · scales, computed in float32."""
        format = FORMATS[self.format]
        scales = _unnested(self.scales, self.axis) if isinstance(self.scales, Nested) else self.scales
        codes = _blocked(self.codes, self.axis, scales.shape[self.axis])
        values = format.decode(_unpacked(codes, self.axis) if format.packed else codes)
        w = values * jnp.expand_dims(scales, self.axis)
        w = w.reshape(_with_size(self.codes.shape, self.axis, -1))
        return jax.lax.slice_in_dim(w, 0, self.length, axis=w.ndim + self.axis).astype(self.dtype)

    def requantised(self, w: jax.Array) -> Quantised:
        """Another weight of this shape in this format."""
        stacked = self.scales.offset.ndim if isinstance(self.scales, Nested) else 0
        return quantize_leaf(w.astype(self.dtype), self.format, self.axis, stacked)


class Format(NamedTuple):
    """How numbers in [-bound, bound] become codes and back, and how many of them share a scale."""

    bound: float
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    block: int | None = None
    packed: bool = False
    nested: bool = False


def _nearest(x: jax.Array, table: np.ndarray) -> jax.Array:
    """The uint8 index of the entry of an ascending table nearest to each x."""
    midpoints = jnp.asarray((table[:-1] + table[1:]) / 2)
    # One at a time: all comparisons at once would be many times the size of x.
    zeros = jnp.zeros(x.shape, jnp.uint8)
    return jax.lax.fori_loop(0, midpoints.size, lambda i, n: n + (x > midpoints[i]).astype(jnp.uint8), zeros)


def _nf4(codes: jax.Array) -> jax.Array:
    # Selections by the bits of the code, last bit first: exact, and no gather, which TPUs do slowly. The first are done
    # on the bits of the table's numbers: as operands of `where` these would be 16 arrays of the weight's shape that do
    # not depend on the weight, and JAX moves what is the same in every round of a scan out of it, and keeps it.
    bits, codes = NF4.view(np.int32), codes.astype(jnp.int32)
    odd = -(codes & 1)
    values = [int(low) ^ (odd & int(low ^ high)) for low, high in zip(bits[::2], bits[1::2], strict=True)]
    for bit in range(1, 4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(values[0], jnp.float32)


def _integer(bits: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jnp.clip(jnp.round(x), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _float32(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


# Integers are bounded half a step beyond the last, so that its values too lie within half a step.
FORMATS = {
    "nf4": Format(1, lambda x: _nearest(x, NF4), _nf4, BLOCK, packed=True, nested=True),
    "int4": Format(
        7.5, lambda x: (_integer(4)(x) + 8).astype(jnp.uint8), lambda codes: _float32(codes) - 8, BLOCK, packed=True
    ),
    "int8": Format(127.5, lambda x: _integer(8)(x).astype(jnp.int8), _float32),
    "fp8": Format(448, lambda x: x.astype(jnp.float8_e4m3fn), _float32),
}


@functools.partial(jax.jit, static_argnames=("format", "axis", "stacked"))
def quantize_leaf(w: jax.Array, format: str, axis: int, stacked: int = 0) -> Quantised:
    """Quantises one weight, matrix by matrix.

    Along `axis` the weight is cut into the fewest equal blocks of at most 64 for "nf4" and "int4", one block for
    "int8" and "fp8". A block's scale is its largest magnitude over the format's bound.

    Source: Dettmers et al. 2023, arXiv 2305.14314.

    Args:
      w: floating-point [*stacked, ...].
      format: "nf4", "int4", "int8" or "fp8".
      axis: along which blocks run.
      stacked: how many leading axes number matrices that have nothing to do with each other.

    Returns:
      The quantised weight.

    Raises:
      ValueError: an unknown format, or a weight that is not floating-point.
    """
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"a weight {list(w.shape)} of {w.dtype} cannot be quantised; only floating-point ones can")
    axis = axis if axis < 0 else axis - w.ndim
    one = functools.partial(_quantised, format=format, axis=axis)
    if not stacked:
        return one(w)
    lead = w.shape[:stacked]
    q = jax.lax.map(one, w.reshape(-1, *w.shape[stacked:]))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), q)


def _quantised(w: jax.Array, format: str, axis: int) -> Quantised:
    """Quantises a single matrix."""
    f, length = FORMATS[format], w.shape[axis]
    blocks = -(-length // (f.block or length))
    block = -(-length // blocks)
    block += f.packed and block % 2
    padding = [(0, 0)] * w.ndim
    padding[axis] = (0, blocks * block - length)
    x = _blocked(jnp.pad(w.astype(jnp.float32), padding), axis, blocks)
    absmax = jnp.max(jnp.abs(x), axis, keepdims=True)
    scales = absmax / f.bound
    codes = f.encode(x / jnp.where(scales > _TINY, scales, 1))
    if f.packed:
        codes = _packed(codes, axis)
    scales = scales.squeeze(axis)
    return Quantised(
        codes=codes.reshape(_with_size(w.shape, axis, -1)),
        scales=_nested(scales, axis) if f.nested else scales,
        format=format,
        axis=axis,
        length=length,
        dtype=np.dtype(w.dtype),
    )


def _with_size(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    axis %= len(shape)
    return (*shape[:axis], size, *shape[axis + 1 :])


def _blocked(x: jax.Array, axis: int, blocks: int) -> jax.Array:
    """Splits `axis` into blocks and places within a block, the latter at `axis`."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], blocks, x.shape[at] // blocks, *x.shape[at + 1 :])


def _packed(codes: jax.Array, axis: int) -> jax.Array:
    """The two halves of every block in the high and the low bits of one: no neighbours trade places."""
    high, low = jnp.split(codes, 2, axis)
    return (high << 4) | low


def _unpacked(codes: jax.Array, axis: int) -> jax.Array:
    shifts = jnp.array([4, 0], jnp.uint8).reshape(2, *[1] * -axis)
    halves = (jnp.expand_dims(codes, axis - 1) >> jnp.expand_dims(shifts, range(codes.ndim + axis))) & 15
    return halves.reshape(_with_size(codes.shape, axis, 2 * codes.shape[axis]))


def _nested(scales: jax.Array, axis: int) -> Nested:
    """Quantises the block scales of one matrix, in the order in which PyTorch's (out, in) layout has them."""
    offset = scales.mean()
    ordered = jnp.moveaxis(scales - offset, axis, -1)
    groups = jnp.pad(ordered.ravel(), (0, -scales.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    absmax = jnp.max(jnp.abs(groups), 1)
    codes = _nearest(groups / jnp.where(absmax > _TINY, absmax, 1)[:, None], DYNAMIC)
    codes = codes.ravel()[: scales.size].reshape(ordered.shape)
    return Nested(jnp.moveaxis(codes, -1, axis), absmax, offset)


def _unnested(nested: Nested, axis: int) -> jax.Array:
    """The float32 block scales."""
    codes, lead = nested.codes, nested.offset.shape
    ordered = list(codes.shape[len(lead) :])
    ordered.append(ordered.pop(axis))
    scale = jnp.repeat(nested.scale, NESTED_BLOCK, -1)[..., : math.prod(ordered)]
    scale = jnp.moveaxis(scale.reshape(*lead, *ordered), -1, axis)
    offset = jnp.expand_dims(nested.offset, range(len(lead), codes.ndim))
    return jnp.take(DYNAMIC, codes) * scale + offset
