"""The adaptation methods: each is data that knows which factored weight it makes of a base weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Along, Axes, dropout_keys, factor, marked
from lora_jax.factored import Factored
from lora_jax.stored import weight

PROJECTIONS = "/vera"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: the weight becomes W + γ a b.

    Both factors are float32 whatever the base's dtype, and are cast to the data's dtype where they are used.

    Both end in the rank, so that bringing them into the layout of any weight is a reshape and moves nothing. As
    matrices they are a_DR and b_FR, the transposes of the papers' A and PEFT's B itself.

    Attributes:
      a: [*stacked, *in, R].
      b: [*stacked, *out, R].
      scale: γ, α/r or α/√r.
      axes: where the stacked, in and out axes are in the weight.
      dropout: the probability with which an element of the adapter's input is dropped while a key is attached.
      start: the values that `a` and `b` began with, where their product is not zero (PiSSA, OLoRA): the weight is then
        W + γ (a b - a₀ b₀), so that the base stays the one that the user has.
      frozen: names of factors that are not trained; LoRA-FA's are `("a",)` (arXiv 2308.03303).
      common: stacked axes that `a` or `b` does not have, since all experts share it: `("a", axes)`.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    start: tuple[jax.Array, jax.Array] | None = None
    frozen: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    common: tuple[str, tuple[int, ...]] = dataclasses.field(default=("", ()), metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a.shape[-1]

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The weight `w + γ a b`; `key` turns dropout on, with a key of its own for each path and stacked layer."""
        a, b = (jax.lax.stop_gradient(x) if n in self.frozen else x for n, x in (("a", self.a), ("b", self.b)))
        if self.start is not None:
            a0, b0 = jax.lax.stop_gradient(self.start)
            a, b = jnp.concatenate([a, a0], -1), jnp.concatenate([b, -b0], -1)
        stacked = self.axes.stacked
        return Factored(
            weight(w),
            (factor(a, self._axes("a")),),
            (factor(b, self._axes("b")),),
            key=dropout_keys(self.dropout, path, key, stacked, [w.shape[axis] for axis in stacked]),
            path=path,
            scale=self.scale,
            dropout=self.dropout,
        )

    def layout(self) -> LoRA:
        """Both end in the rank."""
        a, b = (Along((*self._axes(name), None)) for name in ("a", "b"))
        return dataclasses.replace(self, a=a, b=b, start=self.start and (a, b))

    def trained(self) -> LoRA:
        """`a` and `b`, but those that are frozen, and never where they started."""
        return marked(self, {"start", *self.frozen})

    def _axes(self, name: str) -> tuple[int, ...]:
        # In the order in which the factor's array has them.
        shared = self.common[1] if self.common[0] == name else ()
        own = self.axes.inp if name == "a" else self.axes.out
        return (*(axis for axis in self.axes.stacked if axis not in shared), *own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoRA:
    """Magnitude and direction apart: m ∘ (W + γ a b) / ‖W + γ a b‖, the norm of each output column.

    The norm is a constant of the backward pass, and is found without forming `a b`.

    Attributes:
      lora: the direction's factors.
      m: [*stacked, *out], the magnitudes; ‖W‖ at first.

    Source: Liu et al. 2024, arXiv 2402.09353.
    """

    lora: LoRA
    m: jax.Array

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The weight; dropout acts on the low-rank part alone."""
        stacked, inp, out = self.axes
        return dataclasses.replace(
            self.lora.factored(w, path, key),
            gain=factor(self.m[..., None], (*stacked, *out)),
            fan_in=math.prod(w.shape[axis] for axis in inp),
        )

    @property
    def axes(self) -> Axes:
        """The axes of the weight, by their use."""
        return self.lora.axes

    def layout(self) -> DoRA:
        """A magnitude for every column."""
        return DoRA(self.lora.layout(), Along((*self.axes.stacked, *self.axes.out)))  # type: ignore[arg-type]

    def trained(self) -> DoRA:
        """The magnitudes, and what of the factors is trained."""
        return DoRA(self.lora.trained(), True)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaLoRA:
    """A decomposition whose singular values are pruned in training: W + γ a diag(e) b.

    `lora_jax.adalora` is the optimizer that prunes, and keeps the columns of `a` and of `b` near orthonormal.

    Attributes:
      a: [*stacked, *in, R].
      e: [*stacked, R], zero at first.
      b: [*stacked, *out, R].
      scale: γ.
      axes: as for `LoRA`.
      dropout: as for `LoRA`.

    Source: Zhang et al. 2023, arXiv 2303.10512.
    """

    a: jax.Array
    e: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The weight."""
        lora = LoRA(self.a, self.b, self.scale, self.axes, self.dropout).factored(w, path, key)
        return dataclasses.replace(lora, a=(*lora.a, factor(self.e, self.axes.stacked)))

    def layout(self) -> AdaLoRA:
        """All end in the rank."""
        stacked, inp, out = self.axes
        a, e, b = (Along((*stacked, *own, None)) for own in (inp, (), out))
        return dataclasses.replace(self, a=a, e=e, b=b)

    def trained(self) -> AdaLoRA:
        """All of it."""
        return marked(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projections:
    """VeRA's random matrices, frozen and shared by all layers: each uses its first rows.

    Attributes:
      a: [the widest input, R].
      b: [the widest output, R].
    """

    a: jax.Array
    b: jax.Array

    def layout(self) -> Projections:
        """No weight's."""
        return Projections(Along((None, None)), Along((None, None)))  # type: ignore[arg-type]

    def trained(self) -> Projections:
        """Nothing."""
        return marked(self, {"a", "b"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VeRA:
    """Two trained vectors between shared random matrices: W + a diag(d) b diag(e).

    The matrices are the entry `"/vera"` of the adapters, a `Projections`, saved with them.

    Attributes:
      d: [*stacked, R], 0.1 at first.
      e: [*stacked, *out], zero at first.
      axes: as for `LoRA`.
      dropout: as for `LoRA`.

    Source: Kopiczko et al. 2024, arXiv 2310.11454.
    """

    d: jax.Array
    e: jax.Array
    axes: Axes = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The weight: four factors, of which those of the layers are vectors."""
        if not shared or PROJECTIONS not in shared:
            raise ValueError(f"the adapter of {path!r} is VeRA's, but {PROJECTIONS!r}, its matrices, is not attached")
        stacked, inp, out = self.axes
        matrices = jax.lax.stop_gradient(shared[PROJECTIONS])
        rank, have = self.d.shape[-1], matrices.a.shape[-1]
        if rank != have:
            raise ValueError(f"the adapter of {path!r} has rank {rank}, and {PROJECTIONS!r}, its matrices, {have}")
        (d_in, ins), (d_out, outs) = ((math.prod(n), n) for n in ([w.shape[i] for i in group] for group in (inp, out)))
        if d_in > len(matrices.a) or d_out > len(matrices.b):
            have = f"{len(matrices.a)} and {len(matrices.b)}"
            raise ValueError(f"{path!r} is {d_in} x {d_out}, more than the {have} rows of {PROJECTIONS!r}")
        a, b = matrices.a[:d_in].reshape(*ins, -1), matrices.b[:d_out].reshape(*outs, -1)
        return Factored(
            weight(w),
            (factor(a, inp), factor(self.d, stacked)),
            (factor(b, out), factor(self.e[..., None], (*stacked, *out))),
            key=dropout_keys(self.dropout, path, key, stacked, [w.shape[axis] for axis in stacked]),
            path=path,
            dropout=self.dropout,
        )

    def layout(self) -> VeRA:
        """One along the rank, one along the out axes."""
        stacked, _, out = self.axes
        return dataclasses.replace(self, d=Along((*stacked, None)), e=Along((*stacked, *out)))

    def trained(self) -> VeRA:
        """Both vectors."""
        return marked(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IA3:
    """Activations rescaled by a trained vector: the weight becomes l ∘ W, along its out axes or its in axes.

    A bias that the model adds to the product is not rescaled; PEFT's is, for its IA³ belongs to a layer.

    Attributes:
      l: [*stacked, *out] or [*stacked, *in], one at first.
      axes: as for `LoRA`.
      side: "out" or "in".

    Source: Liu et al. 2022, arXiv 2205.05638.
    """

    l: jax.Array
    axes: Axes = dataclasses.field(metadata={"static": True})
    side: str = dataclasses.field(default="out", metadata={"static": True})

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The weight: a gain, and no factors."""
        return Factored(weight(w), gain=factor(self.l[..., None], self._axes()), path=path)

    def layout(self) -> IA3:
        """Along one side."""
        return dataclasses.replace(self, l=Along(self._axes()))

    def trained(self) -> IA3:
        """The vector."""
        return marked(self)

    def _axes(self) -> tuple[int, ...]:
        return (*self.axes.stacked, *(self.axes.out if self.side == "out" else self.axes.inp))
