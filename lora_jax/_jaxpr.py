"""The only file that knows what differs between JAX versions: how jaxprs are stored and evaluated."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import source_info_util
from jax._src.shard_map import shard_map_p as shard_map_p
from jax.extend import core


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced (an array, or a `ShapeDtypeStruct` in place of one) rather than passed as it is."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


@dataclasses.dataclass(frozen=True)
class Staged:
    """A call `f(params, *args, **kwargs)` as a jaxpr over the arrays in its arguments.

    Attributes:
      jaxpr: the program.
      consts: its constants.
      leaves: all leaves of `(params, args, kwargs)`.
      traced: which of them are the program's operands; those of `params` come first.
      outputs: the leaves of the result; those that are arrays are the program's outputs.
      structure: the result's tree.
    """

    jaxpr: core.Jaxpr
    consts: Sequence[Any]
    leaves: Sequence[Any]
    traced: Sequence[int]
    outputs: Sequence[Any]
    structure: Any

    def result(self, values: Sequence[Any]) -> Any:
        """The function's result, given the program's outputs."""
        rest = iter(values)
        return jax.tree.unflatten(self.structure, [next(rest) if is_array(leaf) else leaf for leaf in self.outputs])


def stage(f: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Staged:
    """Traces a call whose arguments may mix arrays with anything else."""
    leaves, structure = jax.tree.flatten((params, tuple(args), dict(kwargs)))
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    result: list[Any] = []

    def on_arrays(*arrays: Any) -> list[Any]:
        full = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            full[i] = array
        params, args, kwargs = jax.tree.unflatten(structure, full)
        outputs, out_structure = jax.tree.flatten(f(params, *args, **kwargs))
        # Only what is known of the outputs may outlive the trace.
        result[:] = [np.empty(0) if is_array(leaf) else leaf for leaf in outputs], out_structure
        return [leaf for leaf in outputs if is_array(leaf)]

    jaxpr, consts = opened(jax.make_jaxpr(on_arrays)(*(leaves[i] for i in traced)))
    return Staged(jaxpr, consts, leaves, traced, *result)


def opened(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """Separates a jaxpr, closed or open, from its constants (from 0.12 on there is one class for both)."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def shape(atom: Any) -> tuple[int, ...]:
    """The shape of an equation's operand or result."""
    return atom.aval.shape


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried (`ft_in` from 0.11 on)."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def jvp_jaxpr(params: dict[str, Any], zeros: Sequence[bool]) -> tuple[core.Jaxpr, Sequence[Any], Sequence[bool]]:
    """The derivative rule of a `custom_jvp_call`, for operands whose tangents are zero where `zeros` says so.

    Returns:
      Its jaxpr (operands, then the tangents that are not zero), its constants, and which output tangents are zero.
    """
    jaxpr, consts, out_zeros = params["jvp_jaxpr_fun"].call_wrapped(*zeros)
    return (*opened(jaxpr)[:1], consts, out_zeros)


def bind(eqn: core.JaxprEqn, *values: Any) -> list[Any]:
    """Evaluates one equation on arrays, and returns its outputs as a list."""
    outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


@contextlib.contextmanager
def at_source(eqn: core.JaxprEqn) -> Iterator[None]:
    """Keeps the model's own names and source lines on whatever is traced in place of an equation."""
    source = eqn.source_info
    if not source_info_util.summarize(source):  # within a function of JAX's own: it is the line that calls that
        source = source_info_util.current()
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(source.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def source_line(eqn: core.JaxprEqn) -> str:
    """The user's line that an equation comes from, as `file.py:12 (function)`; to be asked `at_source`."""
    return source_info_util.summarize(eqn.source_info) or source_info_util.summarize(source_info_util.current())
