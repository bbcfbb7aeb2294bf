"""Paths, splitting, counting; and the optimizer that keeps state for the adapters alone."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracle import adapter

import lora_jax as lora
from lora_jax import Axes
from lora_jax.tree import leaves_by_path, replace


@pytest.fixture
def tree(key):
    """Parameters with one adapter attached."""
    params = {"w": jnp.ones((6, 8)), "b": jnp.zeros(8)}
    return lora.attach(params, {"w": adapter(key, (6, 8), Axes((), (0,), (1,)))})


def test_paths_of_flax_and_equinox():
    state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[1]
    assert set(leaves_by_path(state)) == {"kernel", "bias"}
    module = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    assert "layers/0/weight" in leaves_by_path(eqx.filter(module, eqx.is_array))


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves of the tree have the path 'a/b'"):
        leaves_by_path({"a/b": 1, "a": {"b": 2}})


def test_replace_names_the_nearest_path():
    with pytest.raises(KeyError, match="no parameter 'kernal' in this tree; nearest: 'kernel'"):
        replace({"kernel": 1}, {"kernal": 2})


def test_split_and_combine(tree):
    trainable, frozen = lora.split(tree, lora.trainable_mask(tree))
    chex.assert_trees_all_equal(lora.combine(trainable, frozen), tree)
    assert lora.count(trainable) == 2 * (6 + 8) and lora.count(frozen) == 6 * 8 + 8
    assert lora.count(trainable) + lora.count(frozen) == lora.count(tree)
    with pytest.raises(ValueError, match="is in 2 of the trees"):
        lora.combine(tree, trainable)


def test_split_gives_gradients_of_the_adapters_alone(tree):
    trainable, frozen = lora.split(tree, lora.trainable_mask(tree))
    x = jnp.ones((5, 6))
    f = lora.lift(lambda p, x: x @ p["w"] + p["b"])
    gradient = jax.grad(lambda t: jnp.sum(f(lora.combine(t, frozen), x)))(trainable)
    assert lora.count(gradient) == 2 * (6 + 8)


def test_optimizer_has_two_moments_of_the_adapters_and_moves_nothing_else(tree):
    tx = lora.optimizer(optax.adam(0.1), lora.trainable_mask(tree))
    state = tx.init(tree)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 2 * lora.count(tree.adapters)
    assert {leaf.ndim for leaf in jax.tree.leaves(state)} == {0, 2}
    whole = jax.tree.leaves(optax.adam(0.1).init(tree))
    assert sum(leaf.size for leaf in whole if leaf.ndim) == 2 * lora.count(tree)  # the must-differ partner

    gradient = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(gradient, state, tree)
    after = optax.apply_updates(tree, updates)
    chex.assert_trees_all_equal(after.params, tree.params)
    for old, new in zip(jax.tree.leaves(tree.adapters), jax.tree.leaves(after.adapters), strict=True):
        assert np.all(new != old)
    masked = optax.masked(optax.adam(0.1), lora.trainable_mask(tree))  # what masking alone would do
    passed, _ = masked.update(gradient, masked.init(tree), tree)
    assert np.any(passed.params["w"] != 0)
