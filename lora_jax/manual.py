"""Weights inside `jax.shard_map`, where a program says itself which part of a weight each device has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from lora_jax import _jaxpr
from lora_jax.control import CONTROL, Evaluation
from lora_jax.factored import Factor, Factored
from lora_jax.rules import Bind, NoRule, only, rearranged, rule
from lora_jax.stored import Deferred


def _shard_map(lifting: Evaluation, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    params = eqn.params
    jaxpr, consts = _jaxpr.opened(params["jaxpr"])
    where = _jaxpr.source_line(eqn)

    def whole(value: Any, spec: PartitionSpec) -> Any:
        if not isinstance(value, Factored):
            return value
        value = value.resolved()  # a norm is that of whole columns
        if isinstance(value.w, Deferred) and (any(spec[1:]) or (any(spec) and not value.w.by_parts)):
            return lifting.dense(value, "shard_map", where, "it is divided over devices while stored in another form")
        if any(spec) and value.after is not None:
            return lifting.dense(value, "shard_map", where, "the product that its adapter follows is divided")
        return value

    def divided(value: Any, spec: PartitionSpec) -> Any:
        # A factor is divided as the base is, along the axes that it has; its rank never is.
        if not isinstance(value, Factored):
            return spec
        axes = (*spec, *[None] * (value.ndim - len(spec)))

        def of(factor: Factor) -> Any:
            return dataclasses.replace(factor, array=PartitionSpec(*(axes[axis] for axis in factor.axes)))

        return value.each(spec, of)

    def body(*args: Any) -> list[Any]:
        outs = lifting.evaluate(jaxpr, consts, args)
        return [lifting.dense(out, "shard_map", where, "it is returned") for out in outs]

    values = [whole(value, spec) for value, spec in zip(values, params["in_specs"], strict=True)]
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(divided(value, spec) for value, spec in zip(values, params["in_specs"], strict=True)),
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*values)


CONTROL[_jaxpr.shard_map_p] = _shard_map


@rule("pvary")
def _pvary(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    # A mark, for the base to meet data that differs between devices; the factors get theirs where they are used.
    weight = only(args, 0)
    w = weight.w.sliced(lambda x: bind(x)[0]) if isinstance(weight.w, Deferred) else bind(weight.w)[0]
    return [dataclasses.replace(weight, w=w)]


@rule("all_gather")
def _all_gather(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, axis = only(args, 0), params["all_gather_dimension"]
    if not params["tiled"]:
        raise NoRule("only a tiled all_gather has a rule")

    def move(factor: jax.Array) -> jax.Array:
        # Of an axis of which each device has one element it is not known whether the factor has it; repeating what is
        # the same on all of them is right as well.
        if factor.shape[axis] == 1 != weight.shape[axis]:
            return factor
        groups = params["axis_index_groups"]
        return lax.all_gather(factor, params["axis_name"], axis_index_groups=groups, axis=axis, tiled=True)

    return [rearranged(weight, weight.based(lambda w: bind(w)[0]), move)]
