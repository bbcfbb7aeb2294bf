"""Finds out how a function uses each of its parameters, from its jaxpr alone: nothing is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as P

from lora_jax import _jaxpr
from lora_jax.adapters import Axes
from lora_jax.stored import abstract, is_stored
from lora_jax.tree import Tree, leaves_by_path
from lora_jax.views import View, consumed, moved, union

LINEAR = ("dense", "expert")


@dataclasses.dataclass(frozen=True)
class Use:
    """One operation that consumes a weight.

    Attributes:
      kind: "dense", "expert", "embedding", "convolution", "elementwise" or "other".
      operation: the JAX primitive.
      axes: the weight's axes as this operation uses them.
      where: the model's source line.
      experts: which of the stacked axes select an expert.
    """

    kind: str
    operation: str
    axes: Axes
    where: str
    experts: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter as the function uses it.

    Attributes:
      path: where it stands in the parameter tree.
      shape: its shape.
      dtype: its dtype.
      uses: the operations that consume it, in the order of the program; tied embeddings have two.
      head: whether its product reaches no other weight's product: an output head.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    uses: tuple[Use, ...] = ()
    head: bool = False

    @property
    def kind(self) -> str:
        """The kind of the first lookup if there is one, else of the first use; "unused" without any."""
        return self.main.kind if self.uses else "unused"

    @property
    def main(self) -> Use:
        """The use that decides how the weight is factored."""
        order = ("embedding", "dense", "expert", "convolution")
        return min(self.uses, key=lambda use: order.index(use.kind) if use.kind in order else len(order))

    @property
    def axes(self) -> Axes:
        """Which axes are stacked, contracted and kept."""
        return self.main.axes if self.uses else Axes((), (), tuple(range(len(self.shape))))

    @property
    def adaptable(self) -> bool:
        """Whether factors of a lower rank make sense here: every axis is stacked, contracted or kept."""
        stacked, inp, out = self.axes
        covered = sorted((*stacked, *inp, *out)) == list(range(len(self.shape)))
        return bool(self.uses) and self.main.kind not in ("elementwise", "other") and covered and bool(inp and out)

    def dimensions(self) -> tuple[int, int, int]:
        """How many matrices the weight holds, and each one's input and output dimension."""
        stacked, inp, out = (math.prod(self.shape[axis] for axis in axes) for axes in self.axes)
        return stacked, inp, out


class Sites(Mapping[str, Site]):
    """The sites of a function by path; printed, a table."""

    def __init__(self, sites: Mapping[str, Site]):
        self._sites = dict(sites)

    def __getitem__(self, path: str) -> Site:
        return self._sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        rows: list[tuple[str, ...]] = [("path", "shape", "dtype", "kind", "stacked", "in", "out", "uses")]
        for site in self.values():
            axes = [",".join(map(str, axes)) or "-" for axes in (site.axes if site.uses else ((), (), ()))]
            uses = ", ".join(
                f"{n}x {operation}" if n > 1 else operation
                for operation, n in _counts(use.operation for use in site.uses).items()
            )
            kind = f"{site.kind} (head)" if site.head else site.kind
            rows.append((site.path, str(list(site.shape)), str(site.dtype), kind, *axes, uses or "-"))
        return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Sets rows of text in columns, the first row as a heading.

    Args:
      rows: rows of equal length.

    Returns:
      Lines of text.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _counts(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def trace(f: Callable[..., Any], params: Tree, *args: Any, **kwargs: Any) -> Sites:
    """Follows every parameter of `f(params, *args)` to the operations that consume it.

    Casts, transpositions, reshapes, slices, scans, remat, inner jits and custom derivatives are followed.

    Args:
      f: a function that JAX can trace.
      params: its parameters; arrays, or `jax.ShapeDtypeStruct`s (see `jax.eval_shape`), since nothing is computed.
      *args: the other arguments, likewise; what is not an array is passed as it is.
      **kwargs: likewise.

    Returns:
      `{path: Site}` for every array in `params`.
    """
    staged = _jaxpr.stage(f, jax.tree.map(abstract, params, is_leaf=is_stored), args, kwargs)
    named = list(leaves_by_path(params).items())
    found: dict[str, Site] = {}
    facts = []
    for i in staged.traced:
        if i < len(named):
            path, leaf = named[i]
            found[path] = Site(path, tuple(leaf.shape), np.dtype(leaf.dtype))
            facts.append(Fact(View((path,), tuple(frozenset({n}) for n in range(len(leaf.shape))), frozenset())))
        else:
            facts.append(Fact())
    walk = _Walk()
    walk.follow(staged.jaxpr, facts)
    return Sites(
        {
            path: dataclasses.replace(
                site,
                uses=tuple(walk.uses.get(path, {}).values()),
                head=path in walk.products and path not in walk.consumed and path not in walk.layered,
            )
            for path, site in found.items()
        }
    )


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of a value.

    Attributes:
      view: the parameter it is, if it is one.
      products: the parameters whose products with data it depends on.
    """

    view: View | None = None
    products: frozenset[str] = frozenset()


class _Walk:
    """The walk through a program: what it has met so far."""

    def __init__(self) -> None:
        self.uses: dict[str, dict[Any, Use]] = {}
        self.products: set[str] = set()
        self.consumed: set[str] = set()
        self.layered: set[str] = set()

    def follow(self, jaxpr: Jaxpr, facts: Sequence[Fact]) -> list[Fact]:
        env: dict[Any, Fact] = dict(zip(jaxpr.invars, facts, strict=True))

        def read(atom: Any) -> Fact:
            return Fact() if isinstance(atom, Literal) else env.get(atom, Fact())

        for eqn in jaxpr.eqns:
            with _jaxpr.at_source(eqn):
                env.update(zip(eqn.outvars, self.equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, facts: list[Fact]) -> list[Fact]:
        if eqn.primitive in _INNER:
            return _INNER[eqn.primitive](self, eqn, facts)
        products = frozenset().union(*(fact.products for fact in facts))
        views = [fact.view for fact in facts]
        still = moved(eqn, views)
        if still is not None:
            if still.numbered and views[0] and not views[0].numbered:
                self.use(views[0], eqn, 0, products)
            return [Fact(still, products)] * len(eqn.outvars)
        for position, view in enumerate(views):
            if view is not None:
                products |= self.use(view, eqn, position, products)
        return [Fact(None, products)] * len(eqn.outvars)

    def use(self, view: View, eqn: JaxprEqn, position: int, products: frozenset[str]) -> frozenset[str]:
        kind, contracted, batch = consumed(view, eqn, position)
        batched = union(view.axes[axis] for axis in batch)
        if view.numbered - batched:
            return frozenset()  # rows of a table: that they were looked up is noted
        if view.numbered:  # they were not rows, but experts
            for path in view.paths:
                self.uses[path] = {key: use for key, use in self.uses[path].items() if use.kind != "embedding"}
        stacked = view.stacked | batched
        inp = union(view.axes[axis] for axis in contracted) - stacked
        out = union(view.axes) - stacked
        axes = Axes(*(tuple(sorted(axes)) for axes in (stacked, inp, out - inp)))
        if inp & union(own for axis, own in enumerate(view.axes) if axis not in (*contracted, *batch)):
            kind = "other"  # one axis is partly contracted and partly kept
        where = _jaxpr.source_line(eqn)
        experts = tuple(sorted(batched)) if kind == "expert" else ()
        use = Use(kind, eqn.primitive.name, axes, where, experts)
        for path in view.paths:
            # A scan's body is followed more than once; an equation is one use.
            self.uses.setdefault(path, {})[id(eqn), position] = use
        if kind not in LINEAR:
            return frozenset()
        self.products |= set(view.paths)
        self.consumed |= products
        if view.stacked or len(view.paths) > 1:
            self.layered |= set(view.paths)
        return frozenset(view.paths)


# --- operations that contain functions ---


def _call(walk: _Walk, eqn: JaxprEqn, facts: list[Fact]) -> list[Fact]:
    name = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    return walk.follow(_jaxpr.opened(eqn.params[name])[0], facts)


def _scan(walk: _Walk, eqn: JaxprEqn, facts: list[Fact]) -> list[Fact]:
    jaxpr, _ = _jaxpr.opened(eqn.params["jaxpr"])
    n_consts, n_carry = _jaxpr.scan_counts(eqn.params)
    shared, init, xs = facts[:n_consts], facts[n_consts : n_consts + n_carry], facts[n_consts + n_carry :]
    layer = [Fact(x.view.without([0]) if x.view else None, x.products) for x in xs]
    outs = _loop(walk, jaxpr, shared, init, layer)
    ys = []
    for var, fact in zip(jaxpr.outvars[n_carry:], outs[n_carry:], strict=True):
        inputs = dict(zip(jaxpr.invars[n_consts + n_carry :], xs, strict=True))
        # Returned as it was scanned, a weight is stacked again; changed on the way, it is data.
        whole = None if isinstance(var, Literal) else inputs.get(var)
        if whole is None and fact.view is not None:
            fact = Fact(None, fact.products)
        ys.append(whole or fact)
    return [*outs[:n_carry], *ys]


def _while(walk: _Walk, eqn: JaxprEqn, facts: list[Fact]) -> list[Fact]:
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    shared, init = facts[n_test : n_test + n_body], facts[n_test + n_body :]
    test, body = _jaxpr.opened(eqn.params["cond_jaxpr"])[0], _jaxpr.opened(eqn.params["body_jaxpr"])[0]
    outs = _loop(walk, body, shared, init, [])
    walk.follow(test, [*facts[:n_test], *outs])
    return outs


def _loop(walk: _Walk, jaxpr: Jaxpr, shared: Sequence[Fact], init: Sequence[Fact], layer: Sequence[Fact]) -> list[Fact]:
    # Repeated until what is known of the carry holds for every iteration.
    carry = list(init)
    while True:
        outs = walk.follow(jaxpr, [*shared, *carry, *layer])
        merged = [
            Fact(old.view if old.view == new.view else None, old.products | new.products)
            for old, new in zip(carry, outs, strict=False)
        ]
        if merged == carry:
            return [*merged, *outs[len(carry) :]]
        carry = merged


def _cond(walk: _Walk, eqn: JaxprEqn, facts: list[Fact]) -> list[Fact]:
    branches = [walk.follow(_jaxpr.opened(branch)[0], facts[1:]) for branch in eqn.params["branches"]]
    return [
        Fact(
            outs[0].view if all(out.view == outs[0].view for out in outs) else None,
            frozenset().union(*(out.products for out in outs)),
        )
        for outs in zip(*branches, strict=True)
    ]


def _opaque(walk: _Walk, eqn: JaxprEqn, facts: list[Fact]) -> list[Fact]:
    products = frozenset().union(*(fact.products for fact in facts))
    for position, fact in enumerate(facts):
        if fact.view is not None:
            walk.use(fact.view, eqn, position, products)
    return [Fact(None, products)] * len(eqn.outvars)


_INNER: dict[Any, Callable[[_Walk, JaxprEqn, list[Fact]], list[Fact]]] = {
    P.jit_p: _call,
    P.closed_call_p: _call,
    P.call_p: _call,
    P.remat_p: _call,
    _jaxpr.shard_map_p: _call,
    P.custom_jvp_call_p: _call,
    P.custom_vjp_call_p: _opaque,
    P.scan_p: _scan,
    P.while_p: _while,
    P.cond_p: _cond,
}
