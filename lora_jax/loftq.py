"""LoftQ: a quantised base and adapters that make up for what quantising lost."""

from __future__ import annotations

from typing import Any

import jax

from lora_jax.adapters import weights
from lora_jax.inits import pissa
from lora_jax.methods import LoRA
from lora_jax.quant import quantize_leaf
from lora_jax.quantize import Rules, choose, quantize
from lora_jax.spec import Spec, select
from lora_jax.start import decomposed, init
from lora_jax.trace import Sites
from lora_jax.tree import Tree, leaves_by_path, replace


def loftq(
    key: jax.Array, params: Tree, sites: Sites, spec: Spec, rules: Rules, steps: int = 1
) -> tuple[Tree, dict[str, Any]]:
    """Quantises a base and starts LoRA from the best approximation of the error: W ≈ Q + γ a b.

    Alternates Q = quantise(W - γ a b) and γ a b = the top singular vectors of W - Q.

    Args:
      key: a PRNG key, for adapters of weights that are not quantised.
      params: the base tree, not yet quantised.
      sites: from `trace`.
      spec: which weights are adapted.
      rules: which are quantised, as for `quantize`.
      steps: how often the two alternate.

    Returns:
      The quantised base, and the adapters that go with it.

    Raises:
      ValueError: as `init` and `quantize`, if an adapted and quantised weight's method is not plain LoRA, or if no
        weight is both.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    chosen, choices = select(sites, spec), choose(sites, rules)
    both = [path for path in chosen if path in choices]
    if not both:
        raise ValueError(f"no weight is both adapted and quantised: the spec takes {', '.join(map(repr, chosen))}")
    for path in both:
        if chosen[path].method != "lora" or chosen[path].share or sites[path].kind == "embedding":
            raise ValueError(
                f"LoftQ starts LoRA's factors of matrices; {path!r} is {sites[path].kind}, "
                f"its method {chosen[path].method!r}, share={chosen[path].share!r}"
            )
    leaves, base = leaves_by_path(params), quantize(params, sites, rules)
    adapters, stored = init(key, params, sites, spec), {}
    for path in both:
        site, rule, w = sites[path], chosen[path], leaves[path].astype("float32")
        left = w
        for _ in range(steps):
            stored[path] = quantize_leaf(left.astype(leaves[path].dtype), *choices[path])
            a, b = decomposed(pissa, w - stored[path].dequantised().astype("float32"), site, rule)
            adapters[path] = LoRA(a, b, rule.scale_at(site), site.axes, rule.dropout)
            left = w - weights({path: w}, {path: adapters[path]})[path].delta()
    return replace(base, stored), adapters
