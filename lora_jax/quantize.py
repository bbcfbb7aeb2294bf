"""Which weights of a tree are quantised, and the whole tree there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.quant import FORMATS, Quantised, quantize_leaf
from lora_jax.spec import PRESETS, Rule
from lora_jax.trace import Site, Sites, table
from lora_jax.tree import Tree, leaves_by_path, nearest, replace

Rules = Mapping[str, str] | Sequence[tuple[str, str]]


class Choice(NamedTuple):
    """How one weight is quantised: the arguments of `quantize_leaf`."""

    format: str
    axis: int
    stacked: int


def choose(sites: Sites, rules: Rules) -> dict[str, Choice]:
    """Finds the format of every weight to quantise, and the axis along which its blocks run.

    That axis is the last input axis, or for an embedding, of which a lookup takes whole rows, the last output axis.

    Args:
      sites: from `trace`.
      rules: patterns and formats, in order of precedence. A pattern is a regular expression searched for in the path
        or a preset of `Rule.target`; so output heads and embeddings are quantised only if a pattern names them.

    Returns:
      `{path: choice}`, in the order of the sites.

    Raises:
      ValueError: if a rule matches nothing that can be quantised, or a format is unknown.
    """
    rules = list(rules.items() if isinstance(rules, Mapping) else rules)
    found: list[list[Site]] = [[] for _ in rules]
    chosen: dict[str, Choice] = {}
    for site in sites.values():
        for (pattern, format), matched in zip(rules, found, strict=True):
            if Rule(pattern).matches(site):
                matched.append(site)
                if _quantisable(site):
                    chosen[site.path] = Choice(format, *_blocks_of(site))
                break
    for (pattern, format), matched in zip(rules, found, strict=True):
        if format not in FORMATS:
            raise ValueError(f"no format {format!r} (rule {pattern!r}); there are {', '.join(FORMATS)}")
        if not any(map(_quantisable, matched)):
            raise ValueError(_no_match(pattern, matched, sites))
    return chosen


def quantize(params: Tree, sites: Sites, rules: Rules) -> Tree:
    """Quantises the weights that rules name.

    Args:
      params: the base tree.
      sites: from `trace`.
      rules: as for `choose`, such as `{"all-linear": "nf4", "head": "int8"}`; the first that matches decides.

    Returns:
      The tree with `Quantised` weights at those paths; its other leaves are the same arrays.

    Raises:
      ValueError: as `choose`, or if a leaf is not the weight that was traced.
    """
    leaves, new = leaves_by_path(params, is_leaf=_is_quantised), {}
    for path, choice in choose(sites, rules).items():
        leaf, shape = leaves.get(path), sites[path].shape
        if isinstance(leaf, Quantised):
            raise ValueError(f"{path!r} is quantised already, to {leaf.format}; dequantize the parameters first")
        if leaf is None or leaf.shape != shape:
            has = "does not have" if leaf is None else f"has {list(leaf.shape)} at"
            raise ValueError(
                f"the tree {has} {path!r}, traced as {list(shape)}; trace the function with these parameters"
            )
        new[path] = quantize_leaf(leaf, *choice)
    return replace(params, new, is_leaf=_is_quantised)


def dequantize(params: Tree) -> Tree:
    """Turns every `Quantised` weight of a tree into an array of the dtype it had."""
    return jax.tree.map(lambda x: x.dequantised() if _is_quantised(x) else x, params, is_leaf=_is_quantised)


def quantize_report(params: Tree, sites: Sites, rules: Rules) -> str:
    """A dry run: a table of what `quantize` would do to each weight and to the size of the tree.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`s.
      sites: from `trace`.
      rules: as for `quantize`.

    Returns:
      Lines of text.

    Raises:
      ValueError: as `quantize`.
    """
    before = leaves_by_path(params)
    after = leaves_by_path(jax.eval_shape(lambda p: quantize(p, sites, rules), params), is_leaf=_is_quantised)
    rows = [("weight", "shape", "format", "bits/parameter", "MB before", "MB after")]
    total = {"before": 0, "after": 0}
    for path, leaf in after.items():
        bytes_before = before[path].size * before[path].dtype.itemsize
        total["before"] += bytes_before
        total["after"] += leaf.nbytes if _is_quantised(leaf) else bytes_before
        if _is_quantised(leaf):
            sizes = (f"{8 * leaf.nbytes / leaf.size:.3f}", f"{bytes_before / 1e6:.3f}", f"{leaf.nbytes / 1e6:.3f}")
            rows.append((path, str(list(leaf.shape)), leaf.format, *sizes))
    return "\n".join(
        [
            table(rows),
            f"{len(rows) - 1} of {len(after)} weights; all parameters {total['before'] / 1e6:.3f} MB before, "
            f"{total['after'] / 1e6:.3f} MB after",
        ]
    )


def _is_quantised(leaf: object) -> bool:
    return isinstance(leaf, Quantised)


def _quantisable(site: Site) -> bool:
    return site.adaptable and jnp.issubdtype(site.dtype, jnp.floating)


def _blocks_of(site: Site) -> tuple[int, int]:
    """The axis along which blocks run, counted from the end, and how many leading axes are stacked."""
    stacked, inp, out = site.axes
    axis = (out if site.kind == "embedding" else inp)[-1]
    leading = sum(i == stacked_axis for i, stacked_axis in enumerate(sorted(stacked)))
    return axis - len(site.shape), leading


def _no_match(pattern: str, matched: Sequence[Site], sites: Sites) -> str:
    if matched:
        site = matched[0]
        return (
            f"rule {pattern!r} matches only {site.path!r} and the like, {site.kind} and {site.dtype}: "
            "only floating-point weights of products, convolutions and embeddings can be quantised"
        )
    taken = [site.path for site in sites.values() if Rule(pattern).matches(site)]
    if taken:
        return f"rule {pattern!r} matches only weights that an earlier rule takes, such as {taken[0]!r}"
    if pattern in PRESETS:
        heads = [site.path for site in sites.values() if site.head]
        hint = f" (the output head {heads[0]!r} is left out: name it to quantise it)" if heads else ""
        return f"rule {pattern!r} matches no weight{hint}; nearest: {nearest(pattern, sites)}"
    return f"rule {pattern!r} matches no parameter; nearest: {nearest(pattern, sites)}"
