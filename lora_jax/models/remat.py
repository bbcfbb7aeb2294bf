"""What the backward pass of a layer finds kept, by name: policies of `jax.checkpoint`.

The decoder names a layer's input "layer", and the results of its products "kept".
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def _narrow(primitive: Any, *operands: Any, **params: Any) -> bool:
    # The result of a product that is much narrower than its input costs little to keep and much to make again.
    if primitive is not jax.lax.dot_general_p:
        return False
    (contracted, _), (batch, _) = params["dimension_numbers"]
    depth = math.prod(operands[0].shape[axis] for axis in contracted)
    return not batch and 8 * (operands[1].size // depth) < depth


_to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["kept", "layer"],
    offload_src="device",
    offload_dst="pinned_host",
)


def _offloaded(primitive: Any, *operands: Any, **params: Any) -> Any:
    # What is narrow is not worth the way. Nor are splash's sums, a number for a query: a TPU's compiler fails at them.
    sums = params.get("name") == "kept" and operands[0].ndim == 3
    return sums or _narrow(primitive, *operands, **params) or _to_host(primitive, *operands, **params)


REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        _narrow, jax.checkpoint_policies.save_only_these_names("kept")
    ),
    "offload": _offloaded,
}
