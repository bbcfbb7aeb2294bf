"""Evaluates any function with factored weights: `y = x·W + γ (x·a)·b` in place of `y = x·W`, wherever f uses W."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal

import lora_jax.manual
import lora_jax.products  # noqa: F401  registers its rules
from lora_jax import _jaxpr
from lora_jax.adapters import SHARED, Adapter, check, weights
from lora_jax.control import CONTROL
from lora_jax.factored import Factored
from lora_jax.rules import RULES, NoRule
from lora_jax.stored import Deferred, abstract, is_stored, weight
from lora_jax.tree import Tree, leaves_by_path, nearest


class LiftError(ValueError):
    """An adapted weight reached an operation through which its factors cannot be carried."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attached:
    """Parameters and the adapters that go with them, side by side; neither is changed.

    Attributes:
      params: the base tree.
      adapters: `{path: adapter}`.
      key: a PRNG key for the adapters' dropout, or `None` for none.
    """

    params: Tree
    adapters: Mapping[str, Adapter]
    key: jax.Array | None = None


def attach(params: Tree, adapters: Mapping[str, Adapter], key: jax.Array | None = None) -> Attached:
    """Puts adapters beside the parameters they adapt, as the argument of a lifted function.

    Args:
      params: the base tree.
      adapters: `{path: adapter}`, from `init`.
      key: a PRNG key; if given, the adapters' dropout is on (in training), otherwise off.

    Returns:
      A pytree of both.

    Raises:
      ValueError: if an adapter's path is not in `params`, or its factors do not fit the weight there.
    """
    leaves = leaves_by_path(params)
    for path, adapter in adapters.items():
        if path.startswith(SHARED):
            continue
        if path not in leaves:
            raise ValueError(f"no parameter {path!r} for this adapter; nearest: {nearest(path, leaves)}")
        check(adapter, path, leaves[path].shape)
    return Attached(params, adapters, key)


def lift(f: Callable[..., Any], materialise: Sequence[str] = ()) -> Callable[..., Any]:
    """Makes `f` accept parameters with adapters attached.

    The result computes what `f` computes with every adapted W replaced by W + γ a b, in factored form: the sum is
    never formed. It is an ordinary JAX function: transform it with `jit`, `grad`, `vmap`, `scan` as you like.

    Args:
      f: a function `f(params, *args, **kwargs)` that JAX can trace. Arrays in its arguments are traced, everything else
        is passed as it is.
      materialise: regular expressions; a weight whose path one of them matches may be added up to a dense array where
        it reaches an operation without a rule. `report` says where that happens.

    Returns:
      A function `(attached, *args, **kwargs)`; given plain parameters it is `f` itself, and it takes quantised ones.

    Raises:
      LiftError: when called, if an adapted weight reaches an operation without a rule.
    """

    @functools.wraps(f)
    def lifted(tree: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tree, Attached):
            if not any(map(is_stored, leaves_by_path(tree).values())):
                return f(tree, *args, **kwargs)
            tree = Attached(tree, {})
        return run(f, tree, args, kwargs, Lifting(tuple(materialise)))

    return lifted


def run(f: Callable[..., Any], tree: Attached, args: Sequence[Any], kwargs: Mapping[str, Any], lifting: Lifting) -> Any:
    """Traces `f` and evaluates it with the weights of `tree`, noting in `lifting` what had to be materialised."""
    staged = _jaxpr.stage(f, jax.tree.map(abstract, tree.params, is_leaf=is_stored), args, kwargs)
    operands = list(staged.leaves)
    leaves = leaves_by_path(tree.params)
    adapted = weights(leaves, tree.adapters, tree.key)
    for i, (path, leaf) in enumerate(leaves.items()):
        if path in adapted or is_stored(leaf):
            value = adapted.get(path) or Factored(weight(leaf), path=path)
            # A leaf that is trained as a whole is an array like any other.
            operands[i] = value if value.factors or isinstance(value.w, Deferred) else value.w
    values = lifting.evaluate(staged.jaxpr, staged.consts, [operands[i] for i in staged.traced])
    return staged.result([lifting.dense(value, "return", "the function's result") for value in values])


@dataclasses.dataclass(frozen=True)
class Lifting:
    """One evaluation: what may be materialised, and what was.

    Attributes:
      materialise: regular expressions over paths.
      materialised: (path, operation, source line) of each weight that was added up.
    """

    materialise: tuple[str, ...]
    materialised: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)

    def dense(self, value: Any, operation: str, where: str, why: str = "") -> Any:
        """The value as an array: a weight only if it may be materialised."""
        if not isinstance(value, Factored):
            return value
        kind = "adapted" if value.factors else "quantised"
        for path in value.path.split(", "):
            if not any(re.search(pattern, path) for pattern in self.materialise):
                raise LiftError(
                    f"the {kind} weight {path!r} {list(value.shape)} reaches `{operation}` at {where}"
                    f"{', where ' + why if why else ', which has no rule for factored weights'}: "
                    f"exclude it from the spec, or allow the dense sum with materialise=[{path!r}]"
                )
            if (path, operation, where) not in self.materialised:
                self.materialised.append((path, operation, where))
        return value.dense()

    def evaluate(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr on arrays and factored weights."""
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            values = [atom.val if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
            with _jaxpr.at_source(eqn):
                if any(isinstance(value, Factored) for value in values):
                    outs = self.apply(eqn, values)
                else:
                    outs = _jaxpr.bind(eqn, *values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [atom.val if isinstance(atom, Literal) else env[atom] for atom in jaxpr.outvars]

    def apply(self, eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
        """Evaluates one equation, at least one of whose operands is a factored weight."""
        name = eqn.primitive.name
        why = ""
        if eqn.primitive in CONTROL:
            return CONTROL[eqn.primitive](self, eqn, list(values))
        if name in RULES:
            try:
                return RULES[name](eqn.params, values, functools.partial(_jaxpr.bind, eqn))
            except NoRule as reason:
                why = str(reason)
        return _jaxpr.bind(eqn, *(self.dense(v, name, _jaxpr.source_line(eqn), why) for v in values))
