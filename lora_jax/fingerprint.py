"""What tells one base from another."""

import hashlib
from typing import Any

import jax
import numpy as np

from lora_jax.sharding import Gathered
from lora_jax.tree import leaves_by_path

SAMPLES = 64


def fingerprint(params: Any) -> str:
    """Identifies a base cheaply: a digest of every leaf's path, shape, dtype and 64 evenly spaced elements.

    Args:
      params: pytree of arrays.

    Returns:
      16 hexadecimal digits, the same for the same base on every machine.
    """
    digest = hashlib.sha256()
    # On a mesh and off it a quantised base is the same.
    params = jax.tree.map(_own, params, is_leaf=lambda node: isinstance(node, Gathered))
    for path, leaf in sorted(leaves_by_path(params, is_leaf=lambda _: False).items()):
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        if leaf.size:
            # Indexed by axes, not flattened: a sharded leaf stays where it is.
            places = np.unique(np.linspace(0, leaf.size - 1, SAMPLES).astype(np.int64))
            index = np.unravel_index(places, leaf.shape) if leaf.ndim else ()
            digest.update(np.asarray(leaf[index]).tobytes())
    return digest.hexdigest()[:16]


def _own(node: Any) -> Any:
    return node.stored if isinstance(node, Gathered) else node
