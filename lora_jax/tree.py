"""Paths into a parameter tree, and splitting a tree in two and putting it together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey, keystr

from lora_jax.stored import is_stored

Tree = Any


def path_string(key_path: tuple[Any, ...]) -> str:
    """Writes a key path as `layers/0/kernel`.

    Flax NNX states end every path in the attribute `value` of a variable; it carries no information and is left out.

    Args:
      key_path: a path as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      The keys joined by "/".
    """
    if len(key_path) > 1 and key_path[-1] == GetAttrKey("value") and isinstance(key_path[-2], DictKey | SequenceKey):
        key_path = key_path[:-1]
    return keystr(key_path, simple=True, separator="/")


def leaves_by_path(tree: Tree, is_leaf: Callable[[Any], bool] = is_stored) -> dict[str, Any]:
    """Lists the leaves of a tree under their paths, in the tree's own order.

    A quantised weight is one leaf.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.map`.

    Returns:
      `{path: leaf}`.

    Raises:
      ValueError: if two leaves have the same path.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    named = {path_string(key_path): leaf for key_path, leaf in leaves}
    if len(named) != len(leaves):
        seen = [path_string(key_path) for key_path, _ in leaves]
        twice = next(path for path in seen if seen.count(path) > 1)
        raise ValueError(f"two leaves of the tree have the path {twice!r}; give them different names")
    return named


def replace(tree: Tree, leaves: Mapping[str, Any], is_leaf: Callable[[Any], bool] = is_stored) -> Tree:
    """Puts new leaves at some paths of a tree.

    Args:
      tree: any pytree.
      leaves: `{path: new leaf}`.
      is_leaf: as in `jax.tree.map`.

    Returns:
      A tree of the same structure.

    Raises:
      KeyError: if a path is not in the tree.
    """
    named = leaves_by_path(tree, is_leaf)
    if missing := [path for path in leaves if path not in named]:
        raise KeyError(f"no parameter {missing[0]!r} in this tree; nearest: {nearest(missing[0], named)}")
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    return jax.tree.unflatten(structure, [leaves.get(path, leaf) for path, leaf in named.items()])


def nearest(name: str, names: Any, n: int = 3) -> str:
    """Names what a mistyped path or pattern probably meant, for error messages.

    Args:
      name: what was not found.
      names: what exists.
      n: how many to name.

    Returns:
      Up to `n` of `names`, nearest first, joined by commas.
    """
    import difflib  # only on the way to an error

    def likeness(candidate: str) -> float:
        parts = [candidate, *candidate.split("/")]
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    return ", ".join(repr(name) for name in sorted(names, key=likeness, reverse=True)[:n]) or "none"


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Separates the leaves a mask selects from the others.

    Args:
      tree: any pytree.
      mask: a tree of booleans of the same structure, such as `trainable_mask(tree)`.

    Returns:
      `(selected, rest)`, both of the tree's structure with `None` in place of the other's leaves, so that
      `jax.grad`, optax and Orbax see only what is there.
    """
    selected = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, mask)
    rest = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, mask)
    return selected, rest


def combine(*trees: Tree) -> Tree:
    """Puts together what `split` separated.

    Args:
      *trees: trees of one structure; at each leaf at most one is not `None`.

    Returns:
      The tree of the leaves that are not `None`.

    Raises:
      ValueError: if a leaf is present in two trees.
    """

    def pick(key_path: tuple[Any, ...], *leaves: Any) -> Any:
        present = [leaf for leaf in leaves if leaf is not None]
        if len(present) > 1:
            raise ValueError(f"{path_string(key_path)} is in {len(present)} of the trees to combine")
        return present[0] if present else None

    return jax.tree_util.tree_map_with_path(pick, *trees, is_leaf=lambda leaf: leaf is None)


def count(tree: Tree) -> int:
    """Counts the parameters in a tree: the sum of its arrays' sizes.

    Args:
      tree: any pytree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The number of elements; of a quantised weight, those that it stands for.
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_stored) if hasattr(leaf, "size"))


def nbytes(tree: Tree) -> int:
    """Counts the bytes of a tree's arrays.

    Args:
      tree: any pytree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      Bytes.
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))
