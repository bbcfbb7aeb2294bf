"""A dry run: what a spec would do to a function, without computing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.lift import Attached, Lifting, run
from lora_jax.optim import trainable_mask
from lora_jax.spec import METHODS, Rule, Spec, select
from lora_jax.start import init
from lora_jax.trace import Sites, table, trace
from lora_jax.tree import Tree, count, nbytes, split


@dataclasses.dataclass(frozen=True)
class Report:
    """What a spec would do to a function, found out without computing anything; printed, a table.

    Attributes:
      sites: every parameter and its use.
      rules: the rule of each weight to adapt.
      adapters: the adapters' shapes.
      base_parameters: how many parameters the base has.
      base_bytes: their size.
      materialised: (path, operation, source line) where a dense sum would be formed.
    """

    sites: Sites
    rules: Mapping[str, Rule]
    adapters: Mapping[str, Any]
    base_parameters: int
    base_bytes: int
    materialised: Sequence[tuple[str, str, str]]

    def __str__(self) -> str:
        rows = [("target", "shape", "kind", "method", "rank", "scale", "parameters")]
        for path, rule in self.rules.items():
            site = self.sites[path]
            parameters = f"{count(self.adapters[path]):,}"
            uses = METHODS[rule.method].uses
            rank = str(rule.rank_at(site)) if "rank" in uses else "-"
            scale = f"{rule.scale_at(site):g}" if "alpha" in uses else "-"
            rows.append((path, str(list(site.shape)), site.kind, rule.method, rank, scale, parameters))
        trained, size = count(split(self.adapters, trainable_mask(self.adapters))[0]), nbytes(self.adapters)
        frozen = count(self.adapters) - trained
        lines = [
            table(rows),
            f"{len(self.rules)} targets, {trained:,} adapter parameters"
            f"{f' and {frozen:,} frozen ones' if frozen else ''} ({size / 1e6:.1f} MB), "
            f"{trained / self.base_parameters:.2%} of the base's {self.base_parameters:,} "
            f"({self.base_bytes / 1e6:.1f} MB)",
        ]
        if heads := [site.path for site in self.sites.values() if site.head and site.path not in self.rules]:
            lines.append(f"output head, left out: {', '.join(heads)}")
        lines += [f"materialised: {path} at `{op}`, {where}" for path, op, where in self.materialised]
        return "\n".join(lines)


def report(
    f: Callable[..., Any],
    params: Tree,
    *args: Any,
    spec: Spec,
    materialise: Sequence[str] = (),
    **kwargs: Any,
) -> Report:
    """A dry run: what would be adapted, at what size, and where a dense weight would be formed.

    Args:
      f: a function `f(params, *args, **kwargs)`.
      params: arrays or `jax.ShapeDtypeStruct`s.
      *args: likewise.
      spec: which weights, and at which rank.
      materialise: as for `lift`.
      **kwargs: as `*args`.

    Returns:
      A report to print or to read.

    Raises:
      ValueError: as `init`.
      LiftError: as `lift`.
    """
    sites = trace(f, params, *args, **kwargs)
    adapters = jax.eval_shape(lambda key, params: init(key, params, sites, spec), jax.random.key(0), params)
    lifting = Lifting(tuple(materialise))
    jax.eval_shape(lambda params, adapters: run(f, Attached(params, adapters), args, kwargs, lifting), params, adapters)
    return Report(sites, select(sites, spec), adapters, count(params), nbytes(params), tuple(lifting.materialised))
