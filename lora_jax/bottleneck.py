"""Bottleneck adapters: a small network behind a layer, y + up(gelu(down y)). They are not linear and do not merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.adapters import Along, Axes, factor, marked
from lora_jax.factored import After, Factored
from lora_jax.stored import weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What a weight's product y becomes: y + gelu(y·down)·upᵀ.

    Houlsby's places are the attention's output projection and the MLP's.

    Attributes:
      down: [*stacked, *out, R].
      up: [*stacked, *out, R], zero at first.
      axes: where the stacked, in and out axes are in the weight.

    Source: Houlsby et al. 2019, arXiv 1902.00751.
    """

    down: jax.Array
    up: jax.Array
    axes: Axes = dataclasses.field(metadata={"static": True})

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The weight as it is, and what follows its product."""
        own = (*self.axes.stacked, *self.axes.out)
        after = After(factor(self.down, own), factor(self.up, own), jax.nn.gelu)
        return Factored(weight(w), after=after, path=path)

    def layout(self) -> Bottleneck:
        """Both along the output."""
        own = Along((*self.axes.stacked, *self.axes.out, None))
        return dataclasses.replace(self, down=own, up=own)

    def trained(self) -> Bottleneck:
        """Both matrices."""
        return marked(self)
