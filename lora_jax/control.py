"""How control flow acts on factored weights: inner jaxprs are evaluated inside the public transformation.

Each function takes the evaluation it is part of, the equation and its operands, and returns the outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core import primitives as P

from lora_jax import _jaxpr
from lora_jax.factored import Factor, Factored
from lora_jax.rules import form, settled
from lora_jax.stored import Deferred


class Evaluation(Protocol):
    """What is needed of the evaluation that an equation is part of (`lift.Lifting`)."""

    def evaluate(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr on arrays and factored weights."""
        ...

    def dense(self, value: Any, operation: str, where: str, why: str = "") -> Any:
        """The value as an array, where that is allowed."""
        ...


Control = Callable[[Evaluation, JaxprEqn, list[Any]], list[Any]]


def _inline(lifting: Evaluation, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    name = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    jaxpr, consts = _jaxpr.opened(eqn.params[name])
    values = _constrained(values, eqn.params.get("in_shardings"))
    outs = lifting.evaluate(jaxpr, consts, values)
    return _constrained(outs, eqn.params.get("out_shardings"))


def _constrained(values: Sequence[Any], shardings: Sequence[Any] | None) -> list[Any]:
    # What an inner jit asks of its operands and results still holds once it is inlined.
    def constrain(value: Any, sharding: Any) -> Any:
        if not isinstance(sharding, jax.sharding.Sharding):
            return value
        if isinstance(value, Factored):
            if isinstance(value.w, Deferred):
                return value
            return dataclasses.replace(value, w=jax.lax.with_sharding_constraint(value.w, sharding))
        return jax.lax.with_sharding_constraint(value, sharding)

    return [constrain(v, s) for v, s in zip(values, shardings or [None] * len(values), strict=True)]


def _remat(lifting: Evaluation, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    jaxpr, consts = _jaxpr.opened(eqn.params["jaxpr"])
    return jax.checkpoint(
        lambda *args: lifting.evaluate(jaxpr, consts, args),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )(*values)


def _scan(lifting: Evaluation, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    params = eqn.params
    jaxpr, consts = _jaxpr.opened(params["jaxpr"])
    n_consts, n_carry = _jaxpr.scan_counts(params)
    shared, init, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    carry_in, xs_in = jaxpr.invars[n_consts : n_consts + n_carry], jaxpr.invars[n_consts + n_carry :]
    carry_out, ys_out = jaxpr.outvars[:n_carry], jaxpr.outvars[n_carry:]
    length = params["length"]

    # A weight that the body carries unchanged, or returns as it was scanned, needs neither a carry nor a copy.
    fixed = {i: w for i, w in enumerate(init) if isinstance(w, Factored) and carry_out[i] is carry_in[i]}
    whole = {var: x for var, x in zip(xs_in, xs, strict=True) if isinstance(x, Factored)}
    passed = {j: whole[var] for j, var in enumerate(ys_out) if not isinstance(var, Literal) and var in whole}
    xs = [_movable(lifting, eqn, x) if isinstance(x, Factored) else x for x in xs]
    moving = [_moving(x) if isinstance(x, Factored) else (x, None) for x in xs]

    def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        layer = [
            slice_ if whole_ is None else _layer(whole_, slice_)
            for slice_, whole_ in zip(slices, (weight for _, weight in moving), strict=True)
        ]
        outs = lifting.evaluate(jaxpr, consts, [*shared, *_filled(carry, fixed), *layer])
        new = [out for i, out in enumerate(outs[:n_carry]) if i not in fixed]
        ys = [_stackable(lifting, eqn, out) for j, out in enumerate(outs[n_carry:]) if j not in passed]
        return _like(lifting, eqn, new, carry), ys

    start = [value for i, value in enumerate(init) if i not in fixed]
    slices = [slice_ for slice_, _ in moving]
    start = _stable(
        lifting, eqn, start, lambda carry: jax.eval_shape(lambda c, s: body(c, _first(s))[0], carry, slices)
    )
    carry, ys = jax.lax.scan(body, start, slices, length=length, reverse=params["reverse"], unroll=params["unroll"])
    ys = [_stacked(y) if isinstance(y, Factored) else y for y in ys]
    return [*_filled(carry, fixed), *_filled(ys, passed)]


def _movable(lifting: Evaluation, eqn: JaxprEqn, weight: Factored) -> Any:
    # Layers of what is stored can be sliced off as long as nothing was done to the layout of all of them.
    if isinstance(weight.w, Deferred) and weight.w.layer_moves is None:
        why = "its layout was changed before its layers are scanned, while it is stored in another form"
        return lifting.dense(weight, eqn.primitive.name, _jaxpr.source_line(eqn), why)
    return weight


def _moving(weight: Factored) -> tuple[list[Any], Factored]:
    # A factor that all layers share is not repeated: it stays outside the scan.
    w = weight.w.stored if isinstance(weight.w, Deferred) else weight.w
    return [w, *(factor.array for factor in weight.factors if 0 in factor.axes)], weight


def _layer(weight: Factored, slices: list[Any]) -> Factored | jax.Array:
    w, *arrays = slices
    layers = iter(arrays)

    def layer(factor: Factor) -> Factor:
        array = next(layers) if 0 in factor.axes else factor.array
        return Factor(array, tuple(axis - 1 for axis in factor.axes if axis))

    return settled(weight.each(weight.w.layer(w) if isinstance(weight.w, Deferred) else w, layer))


def _stackable(lifting: Evaluation, eqn: JaxprEqn, value: Any) -> Any:
    if isinstance(value, Factored) and isinstance(value.w, Deferred):
        why = "layers that are stored in another form are changed and stacked again"
        return lifting.dense(value, eqn.primitive.name, _jaxpr.source_line(eqn), why)
    return value


def _stacked(weight: Factored) -> Factored:
    # A scan has put an axis before the others of every array.
    return weight.each(weight.w, lambda factor: Factor(factor.array, (0, *(axis + 1 for axis in factor.axes))))


def _first(slices: Any) -> Any:
    return jax.tree.map(lambda x: x[0], slices)


def _filled(values: Sequence[Any], others: Mapping[int, Any]) -> list[Any]:
    rest = iter(values)
    return [others[i] if i in others else next(rest) for i in range(len(values) + len(others))]


def _stable(lifting: Evaluation, eqn: JaxprEqn, carry: list[Any], step: Callable[[list[Any]], list[Any]]) -> list[Any]:
    # A carried weight must leave the body in the form in which it entered; otherwise it is carried as an array.
    while any(isinstance(value, Factored) for value in carry):
        after = step(carry)
        changed = [i for i, (old, new) in enumerate(zip(carry, after, strict=True)) if form(old) != form(new)]
        if not changed:
            break
        why = "it is carried and does not keep its factors"
        for i in changed:
            carry[i] = lifting.dense(carry[i], eqn.primitive.name, _jaxpr.source_line(eqn), why)
    return carry


def _like(lifting: Evaluation, eqn: JaxprEqn, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    why = "it is carried in place of an array"
    return [
        dataclasses.replace(n, path=o.path)
        if isinstance(n, Factored) and isinstance(o, Factored)
        else n
        if isinstance(o, Factored)
        else lifting.dense(n, eqn.primitive.name, _jaxpr.source_line(eqn), why)
        for n, o in zip(new, old, strict=True)
    ]


def _while(lifting: Evaluation, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    params = eqn.params
    test, test_consts = _jaxpr.opened(params["cond_jaxpr"])
    jaxpr, consts = _jaxpr.opened(params["body_jaxpr"])
    n_test, n_body = params["cond_nconsts"], params["body_nconsts"]
    for_test, for_body, init = values[:n_test], values[n_test : n_test + n_body], values[n_test + n_body :]
    carried = jaxpr.invars[n_body:]
    fixed = {i: w for i, w in enumerate(init) if isinstance(w, Factored) and jaxpr.outvars[i] is carried[i]}

    def going(carry: list[Any]) -> jax.Array:
        return lifting.evaluate(test, test_consts, [*for_test, *_filled(carry, fixed)])[0]

    def body(carry: list[Any]) -> list[Any]:
        outs = lifting.evaluate(jaxpr, consts, [*for_body, *_filled(carry, fixed)])
        return _like(lifting, eqn, [out for i, out in enumerate(outs) if i not in fixed], carry)

    start = [value for i, value in enumerate(init) if i not in fixed]
    start = _stable(lifting, eqn, start, lambda carry: jax.eval_shape(body, carry))
    return _filled(jax.lax.while_loop(going, body, start), fixed)


def _cond(lifting: Evaluation, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    index, *operands = values
    branches = [_jaxpr.opened(branch) for branch in eqn.params["branches"]]

    def evaluated(branch: tuple[Jaxpr, Sequence[Any]], operands: Sequence[Any]) -> list[Any]:
        return lifting.evaluate(*branch, operands)

    shapes = [jax.eval_shape(functools.partial(evaluated, branch), operands) for branch in branches]
    same = [len({repr(form(out)) for out in outs}) == 1 for outs in zip(*shapes, strict=True)]
    paths = [
        ", ".join(dict.fromkeys(o.path for o in outs if isinstance(o, Factored))) for outs in zip(*shapes, strict=True)
    ]

    def branch_function(branch: tuple[Jaxpr, Sequence[Any]]) -> Callable[[Sequence[Any]], list[Any]]:
        def call(operands: Sequence[Any]) -> list[Any]:
            why = "the branches return it in different forms"
            return [
                dataclasses.replace(out, path=path)
                if isinstance(out, Factored) and keep
                else lifting.dense(out, "cond", _jaxpr.source_line(eqn), why)
                for out, keep, path in zip(evaluated(branch, operands), same, paths, strict=True)
            ]

        return call

    return jax.lax.switch(index, [branch_function(branch) for branch in branches], operands)


def _custom_jvp(lifting: Evaluation, eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    jaxpr, consts = _jaxpr.opened(eqn.params["call_jaxpr"])
    n_consts = eqn.params["num_consts"]
    values = [_differentiable(lifting, eqn, value) for value in values]

    def densely(outs: Sequence[Any]) -> list[jax.Array]:
        where = _jaxpr.source_line(eqn)
        return [lifting.dense(out, "custom_jvp", where, "it is returned") for out in outs]

    @jax.custom_jvp
    def call(*args: Any) -> list[jax.Array]:
        return densely(lifting.evaluate(jaxpr, consts, args))

    def pushed(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        if not eqn.params["symbolic_zeros"]:
            tangents = [_zeros(p) if t is None else t for p, t in zip(primals, tangents, strict=True)]
        zeros = [tangent is None for tangent in tangents]
        inner, inner_consts, out_zeros = _jaxpr.jvp_jaxpr(eqn.params, zeros)
        args = [*primals, *(tangent for tangent in tangents if tangent is not None)]
        outs = densely(lifting.evaluate(inner, inner_consts, args))
        ys, rest = outs[: len(out_zeros)], iter(outs[len(out_zeros) :])
        return ys, [_zeros(y) if zero else next(rest) for y, zero in zip(ys, out_zeros, strict=True)]

    @functools.partial(call.defjvp, symbolic_zeros=True)
    def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        # d(w + a b) = (dw + da b) + (a db): a factored weight for each factor. The rule is linear in them, so each goes
        # its own way; one weight of several would multiply da with db, which a transposition cannot take.
        primals = jax.tree.map(jnp.asarray, primals[n_consts:])
        terms = [_terms(p, t) for p, t in zip(primals, tangents[n_consts:], strict=True)]
        first, *others = itertools.zip_longest(*terms)
        ys, moved = pushed(primals, first)
        for term in others:
            _, more = pushed(primals, term)
            moved = [x + y if jnp.issubdtype(y.dtype, jnp.inexact) else x for x, y in zip(moved, more, strict=True)]
        return ys, moved

    return call(*values)


def _differentiable(lifting: Evaluation, eqn: JaxprEqn, value: Any) -> Any:
    if not isinstance(value, Factored):
        return value
    if value.after is not None or value.moments is not None:
        return lifting.dense(value, "custom_jvp", _jaxpr.source_line(eqn), "its adapter is not linear in the weight")
    return value.resolved()


def _terms(primal: Any, tangent: Any) -> list[Any]:
    """The tangent as a sum of weights, each with the tangent of one factor; `None` for zero."""

    def zero(t: Any) -> bool:
        return type(t) is SymbolicZero

    if not isinstance(primal, Factored):
        return [None if zero(tangent) else tangent]
    nothing = jnp.zeros(primal.shape, primal.dtype)
    still = isinstance(primal.w, Deferred) or zero(tangent.w)  # what is stored in another form is not differentiated
    based = dataclasses.replace(primal, w=nothing if still else tangent.w)
    terms: list[Any] = []
    if primal.a:
        da = tangent.a[0]
        still = still and zero(da.array)
        based = dataclasses.replace(based, a=(_zeros(da) if zero(da.array) else da, *primal.a[1:]))
    terms.append(None if still else based)
    for name, first in (("a", 1), ("b", 0)):
        factors = getattr(primal, name)
        for i, moving in list(enumerate(getattr(tangent, name)))[first:]:
            if not zero(moving.array):
                moved = (*factors[:i], moving, *factors[i + 1 :])
                terms.append(dataclasses.replace(primal, w=nothing, **{name: moved}))
    if primal.gain is not None and not zero(tangent.gain.array):
        terms.append(dataclasses.replace(primal, gain=tangent.gain))
    return terms


def _zeros(primal: Any) -> Any:
    if isinstance(primal, Factored):
        zeros = tuple(_zeros(factor) for factor in primal.a)
        return dataclasses.replace(primal, w=jnp.zeros(primal.shape, primal.dtype), a=zeros)
    if isinstance(primal, Factor):
        return dataclasses.replace(primal, array=jnp.zeros(primal.array.shape, primal.array.dtype))
    if jnp.issubdtype(primal.dtype, jnp.inexact):
        return jnp.zeros_like(primal)
    return np.zeros(primal.shape, jax.dtypes.float0)


CONTROL: dict[Any, Control] = {
    P.jit_p: _inline,
    P.closed_call_p: _inline,
    P.call_p: _inline,
    P.remat_p: _remat,
    P.scan_p: _scan,
    P.while_p: _while,
    P.cond_p: _cond,
    P.custom_jvp_call_p: _custom_jvp,
}
