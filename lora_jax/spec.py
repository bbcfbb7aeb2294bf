"""What to adapt and how: rules from patterns to methods and ranks, and which weights they select."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.inits import DECOMPOSITIONS, INITIALISERS
from lora_jax.trace import LINEAR, Site, Sites
from lora_jax.tree import nearest

_ATTENTION = r"attn|attention|(^|/)(q|k|v|o|qkv|query|key|value|out)(_proj)?(/|$)"
_MLP = r"mlp|ffn|feed_?forward|expert|(^|/)(gate|up|down|gate_up|wi|wo|fc\d?)(_proj)?(_\d)?(/|$)"
PRESETS: dict[str, Callable[[Site], bool]] = {
    "all-linear": lambda site: True,
    "attention": lambda site: bool(re.search(_ATTENTION, site.path)),
    "mlp": lambda site: bool(re.search(_MLP, site.path)) and not re.search(_ATTENTION, site.path),
}


class Method(NamedTuple):
    """What a method makes use of and where it works.

    Attributes:
      uses: the fields of a rule that mean something to it.
      kinds: of the weights that it works on.
      starts: the values of `init` that it takes.
    """

    uses: tuple[str, ...]
    kinds: tuple[str, ...]
    starts: tuple[str, ...] = ()


_LOW_RANK = ("rank", "alpha", "rslora", "dropout", "init", "active_experts")
_PRODUCTS = (*LINEAR, "convolution")
METHODS: dict[str, Method] = {
    "lora": Method((*_LOW_RANK, "share"), ("embedding", *_PRODUCTS), (*INITIALISERS, *DECOMPOSITIONS)),
    "lora-fa": Method((*_LOW_RANK, "share"), _PRODUCTS, tuple(INITIALISERS)),
    "dora": Method(_LOW_RANK, _PRODUCTS, tuple(INITIALISERS)),
    "adalora": Method(("rank", "alpha", "rslora", "dropout", "active_experts"), _PRODUCTS),
    "vera": Method(("rank", "dropout"), _PRODUCTS),
    "ia3": Method(("side",), _PRODUCTS),
    "bottleneck": Method(("rank", "init"), LINEAR, tuple(INITIALISERS)),
    "full": Method((), ()),
    "rows": Method(("rows",), ("embedding",)),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the weights that a pattern matches get.

    Attributes:
      target: a regular expression searched for in the path, or a preset: "all-linear" (every dense and expert weight
        but the output head), and those of them that belong to "attention" or to the "mlp", judged by their names.
      rank: R, the columns of `a`.
      alpha: α; the scale γ is α/R.
      rslora: whether γ is α/√R instead (arXiv 2312.03732).
      dropout: the probability with which an element of the adapter's input is dropped in training.
      init: what the factors start from: "uniform", "normal", "orthogonal", where `b` is zero; or "pissa", "olora", the
        base's own singular or QR vectors.
      method: "lora", "lora-fa", "dora", "adalora", "vera", "ia3", "bottleneck"; "full" trains the leaf itself (any
        float leaf: a bias, a norm, a head), "rows" some rows of an embedding.
      share: the factor that all experts have in common, "a" or "b" (on the side of the hidden state); "" for neither.
      active_experts: how many experts a token is sent to; an expert's rank is the rank divided by it.
      rows: of an embedding, for the method "rows".
      side: which activations "ia3" rescales, "out" or "in".
    """

    target: str = "all-linear"
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    init: str = "uniform"
    method: str = "lora"
    share: str = ""
    active_experts: int = 1
    rows: tuple[int, ...] = ()
    side: str = "out"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        about = f"(target {self.target!r})"
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank} {about}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, not {self.alpha} {about}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout} {about}")
        if self.active_experts < 1:
            raise ValueError(f"active_experts must be at least 1, not {self.active_experts} {about}")
        if self.method not in METHODS:
            raise ValueError(f"no method {self.method!r}; there are {', '.join(METHODS)}")
        starts = (*INITIALISERS, *DECOMPOSITIONS)
        if self.init not in starts:
            raise ValueError(f"no initialiser {self.init!r}; there are {', '.join(starts)}")
        if self.share not in ("", "a", "b") or self.side not in ("out", "in"):
            raise ValueError(f'share is "a" or "b", side is "out" or "in", not {self.share!r}, {self.side!r} {about}')
        method = METHODS[self.method]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("target", "method", *method.uses) and value != field.default:
                raise ValueError(f"method {self.method!r} has no {field.name} (given {value!r}) {about}")
        if "init" in method.uses and self.init not in method.starts:
            raise ValueError(
                f"method {self.method!r} starts from {', '.join(method.starts)}, not {self.init!r} {about}"
            )
        if self.share and self.init in DECOMPOSITIONS:
            both = f"share={self.share!r} and init={self.init!r}, which takes both factors from each matrix"
            raise ValueError(f"{both}, do not go together {about}")
        if (self.method == "rows") != bool(self.rows):
            raise ValueError(f"method 'rows' and the rows that it trains are given together {about}")
        if len(set(self.rows)) < len(self.rows) or min(self.rows, default=0) < 0:
            raise ValueError(f"rows must be distinct and not negative, not {self.rows} {about}")

    def rank_at(self, site: Site) -> int:
        """R at a site: the rank, for an expert divided by the number of those that are active."""
        if site.kind != "expert":
            return self.rank
        if self.rank % self.active_experts:
            raise ValueError(f"{self.active_experts} active experts do not divide rank {self.rank} of {site.path!r}")
        return self.rank // self.active_experts

    def scale_at(self, site: Site) -> float:
        """γ at a site, the factor before `a b`."""
        rank = self.rank_at(site)
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def why_not(self, site: Site) -> str:
        """Why the method does not work on a weight; "" if it does."""
        if not np.issubdtype(site.dtype, np.inexact) and site.dtype != "bfloat16":
            return f"it holds {site.dtype}, which cannot be trained"
        if self.method == "full":
            return ""
        if not site.adaptable or site.kind not in METHODS[self.method].kinds:
            kinds = ", ".join(METHODS[self.method].kinds)
            return f"it is of kind {site.kind}, and method {self.method!r} works on {kinds}"
        return ""

    def matches(self, site: Site) -> bool:
        """Whether the rule means this weight."""
        if self.target in PRESETS:
            return site.kind in LINEAR and site.adaptable and not site.head and PRESETS[self.target](site)
        return bool(re.search(self.target, site.path))


class Spec:
    """The user's choice: rules, of which the first that matches a weight decides, and what to leave out.

    `Spec(rank=8)` is short for `Spec(Rule(rank=8))`.

    Args:
      *rules: in order of precedence.
      exclude: regular expressions; a weight whose path one of them matches is not adapted.
      **fields: the fields of a single rule.
    """

    def __init__(self, *rules: Rule, exclude: Sequence[str] = (), **fields: Any):
        if rules and fields:
            raise ValueError(f"give rules or a single rule's fields ({', '.join(fields)}), not both")
        self.rules = rules or (Rule(**fields),)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and (self.rules, self.exclude) == (other.rules, other.exclude)

    def __hash__(self) -> int:
        return hash((self.rules, self.exclude))

    def __repr__(self) -> str:
        rules = ", ".join(map(repr, self.rules))
        return f"Spec({rules}, exclude={self.exclude!r})"


def select(sites: Sites, spec: Spec) -> dict[str, Rule]:
    """Finds the rule of every weight to adapt.

    Args:
      sites: from `trace`.
      spec: the rules.

    Returns:
      `{path: rule}`, in the order of the sites.

    Raises:
      ValueError: if a rule or an exclusion matches nothing, a rank is larger than the matrix, or VeRA's ranks differ.
    """
    for pattern in spec.exclude:
        if not any(re.search(pattern, path) for path in sites):
            raise ValueError(f"exclude={pattern!r} matches no parameter; nearest: {nearest(pattern, sites)}")
    chosen: dict[str, Rule] = {}
    matched: dict[Rule, list[Site]] = {rule: [] for rule in spec.rules}
    for site in sites.values():
        if any(re.search(pattern, site.path) for pattern in spec.exclude):
            continue
        for rule in spec.rules:
            if rule.matches(site):
                matched[rule].append(site)
                if not rule.why_not(site):
                    chosen[site.path] = rule
                    _check_rank(site, rule)
                break
    for rule, found in matched.items():
        if all(rule.why_not(site) for site in found):
            raise ValueError(_no_match(rule, found, sites))
    vera = [(rule.rank, path) for path, rule in chosen.items() if rule.method == "vera"]
    if vera and min(vera)[0] != max(vera)[0]:
        (low, one), (high, other) = min(vera), max(vera)
        raise ValueError(f"VeRA's matrices are shared, so that ranks are equal: {one!r} has {low}, {other!r} {high}")
    return chosen


def _check_rank(site: Site, rule: Rule) -> None:
    _, d_in, d_out = site.dimensions()
    low = "alpha" in METHODS[rule.method].uses
    if low and rule.rank_at(site) > min(d_in, d_out):
        raise ValueError(
            f"rank {rule.rank_at(site)} is larger than the matrix {d_in} x {d_out} of {site.path!r}: "
            f"choose at most {min(d_in, d_out)}, or exclude it"
        )
    if rule.rows and max(rule.rows) >= d_in:
        raise ValueError(f"{site.path!r} has {d_in} rows: there is no row {max(rule.rows)} to train")
    if site.kind == "embedding" and rule.init in DECOMPOSITIONS:
        raise ValueError(f"init={rule.init!r} is for products, and {site.path!r} is an embedding: exclude it")
    if rule.share and not site.main.experts:
        raise ValueError(f"share={rule.share!r} is for experts, and {site.path!r} has none")


def _no_match(rule: Rule, found: Sequence[Site], sites: Sites) -> str:
    if found:
        site = found[0]
        return f"target {rule.target!r} matches only {site.path!r} and the like: {rule.why_not(site)}"
    if rule.target in PRESETS:
        heads = [site.path for site in sites.values() if site.head]
        hint = f" (the output head {heads[0]!r} is left out: name it to adapt it)" if heads else ""
        linear = [site.path for site in sites.values() if site.kind in LINEAR]
        return f"target {rule.target!r} matches no weight{hint}; linear weights: {', '.join(linear) or 'none'}"
    taken = [path for path in sites if re.search(rule.target, path)]
    if taken:
        return (
            f"target {rule.target!r} matches only weights that an earlier rule or exclude takes, such as {taken[0]!r}"
        )
    return f"target {rule.target!r} matches no parameter; nearest: {nearest(rule.target, sites)}"
