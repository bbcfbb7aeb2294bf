"""What a function costs, read from its jaxpr: nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

from lora_jax import _jaxpr


def flops(f: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Counts the floating-point operations of the products in `f(*args, **kwargs)`.

    2·M·K·N for a product [M, K] x [K, N], and likewise for batched and grouped products and for convolutions. Nothing
    else is counted: a language model spends its time there. The body of a scan counts as often as it runs, that of a
    `shard_map` once for each device, what remat computes twice counts twice, of a `cond` the dearest branch counts. How
    often a `while_loop` runs is not known: its body counts once.

    Args:
      f: a function that JAX can trace.
      *args: arrays, or `jax.ShapeDtypeStruct`s; what is not an array is passed as it is.
      **kwargs: likewise.

    Returns:
      The number of multiplications and additions.
    """
    return _count(_jaxpr.stage(lambda _, *args, **kwargs: f(*args, **kwargs), (), args, kwargs).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_operations(eqn) for eqn in jaxpr.eqns)


def _operations(eqn: JaxprEqn) -> int:
    name = eqn.primitive.name
    if name in _PRODUCTS:
        return 2 * math.prod(_jaxpr.shape(eqn.outvars[0])) * _PRODUCTS[name](eqn)
    inner = [_count(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
    if name == "cond":
        return max(inner)
    if name == "shard_map":
        return sum(inner) * math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    return sum(inner) * eqn.params.get("length", 1)


# --- how many products of two numbers are added up in each element of the result ---


def _dot(eqn: JaxprEqn) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    return math.prod(_jaxpr.shape(eqn.invars[0])[axis] for axis in contracting)


def _ragged_dot(eqn: JaxprEqn) -> int:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    n = math.prod(_jaxpr.shape(eqn.invars[0])[axis] for axis in contracting)
    groups = _jaxpr.shape(eqn.invars[2])[-1]
    # Where the groups divide the contracted axis, each of them has only its share of it, on average.
    return n // groups if set(numbers.lhs_ragged_dimensions) & set(contracting) else n


def _convolution(eqn: JaxprEqn) -> int:
    _, *contracted = eqn.params["dimension_numbers"].rhs_spec
    return math.prod(_jaxpr.shape(eqn.invars[1])[axis] for axis in contracted)


_PRODUCTS: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}
