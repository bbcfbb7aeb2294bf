"""LoRA+ and LoRA-FA: each array's update by hand, and what is not stored or computed for a frozen one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import Rule, Spec
from lora_jax.cost import flops

pytestmark = pytest.mark.usefixtures("quick")
L, B, D, F, R = 2, 5, 12, 20, 4


def layer(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"], None


def model(p, x):
    return jax.lax.scan(layer, x, p["layers"])[0]


@pytest.fixture
def case(key):
    up, down, data = jax.random.split(key, 3)
    params = {"layers": {"up": jax.random.normal(up, (L, D, F)) / 3, "down": jax.random.normal(down, (L, F, D)) / 3}}
    x = jax.random.normal(data, (B, D))
    return params, x, lora.trace(model, params, x)


def started(key, case, *rules, **fields):
    """Adapters with every array moved, `b` too."""
    params, _, sites = case
    adapters = lora.init(key, params, sites, Spec(*rules, **fields))
    keys = jax.random.split(key, len(leaves := jax.tree.leaves(adapters)))
    moved = [leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(adapters), moved)


def gradient(case, adapters):
    params, x, _ = case
    return jax.grad(lambda a: jnp.mean(lora.lift(model)(lora.attach(params, a), x) ** 2))(adapters)


def changed(tx, case, adapters, steps=1):
    @jax.jit
    def step(adapters, state):
        updates, state = tx.update(gradient(case, adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state = tx.init(adapters)
    for _ in range(steps):
        adapters, state = step(adapters, state)
    return adapters, state


@pytest.mark.parametrize(("method", "rate"), [("lora", optax.linear_schedule(1e-2, 0.0, 10)), ("dora", 1e-2)])
def test_lora_plus_multiplies_the_update_of_b(key, case, rate, method):
    adapters = started(key, case, target="layers", rank=R, method=method)
    steps, ratio = 3, 5.0
    tx = lora.lora_plus(lambda rate: optax.sgd(rate), rate, adapters, ratio)
    after, _ = changed(tx, case, adapters, steps)
    # By hand: gradient descent on each array at a rate of its own.
    want, even = adapters, adapters
    step = jax.jit(lambda a, now, ratio: descended(a, gradient(case, a), now, ratio))
    for i in range(steps):
        now = rate(i) if callable(rate) else rate
        want, even = step(want, now, ratio), step(even, now, 1.0)
    for got, hand in zip(jax.tree.leaves(after), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, hand, rtol=1e-5, atol=1e-6)
    low, plain = (tree["layers/up"].lora if method == "dora" else tree["layers/up"] for tree in (after, even))
    assert np.abs(low.b - plain.b).max() > 1e-4


def descended(adapters, gradient, rate, ratio):
    def one(key_path, p, g):
        return p - rate * (ratio if key_path[-1].name == "b" else 1) * g

    return jax.tree_util.tree_map_with_path(one, adapters, gradient)


def test_lora_plus_with_adam_moves_b_by_the_ratio(key, case):
    """Adam's first update is the sign of the gradient times the rate."""
    adapters = started(key, case, target="layers", rank=R)
    tx = lora.lora_plus(lambda rate: optax.adam(rate, eps=0), 1e-3, adapters)
    after, _ = changed(tx, case, adapters)
    for path, adapter in adapters.items():
        np.testing.assert_allclose(np.abs(after[path].a - adapter.a), 1e-3, rtol=1e-2)
        np.testing.assert_allclose(np.abs(after[path].b - adapter.b), 16e-3, rtol=1e-2)


def test_labels_name_every_array_and_what_is_frozen(key, case):
    rules = Rule("up", rank=R, method="lora-fa"), Rule("down", rank=R, method="dora")
    names = lora.labels(started(key, case, *rules))
    assert jax.tree.leaves(names["layers/up"]) == ["frozen", "b"]
    assert jax.tree.leaves(names["layers/down"]) == ["a", "b", "m"]
    vera = lora.labels(started(key, case, target="layers", rank=R, method="vera"))
    assert jax.tree.leaves(vera["/vera"]) == ["frozen", "frozen"]
    pissa = lora.labels(started(key, case, target="layers", rank=R, init="pissa"))
    assert jax.tree.leaves(pissa["layers/up"]) == ["a", "b", "frozen", "frozen"]


@pytest.mark.parametrize("how", ["mask", "lora+"])
def test_lora_fa_keeps_a_bit_for_bit_and_stores_nothing_for_it(key, case, how):
    adapters = started(key, case, target="layers", rank=R, method="lora-fa")
    adam = optax.adam(1e-2)
    tx = (
        lora.optimizer(adam, lora.trainable_mask(adapters))
        if how == "mask"
        else lora.lora_plus(optax.adam, 1e-2, adapters)
    )
    after, state = changed(tx, case, adapters, 3)
    for path, adapter in adapters.items():
        np.testing.assert_array_equal(after[path].a, adapter.a)
        assert np.abs(after[path].b - adapter.b).min() > 0
    size = sum(adapter.b.size for adapter in adapters.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * size
    plain = started(key, case, target="layers", rank=R)
    assert sum(leaf.size for leaf in jax.tree.leaves(adam.init(plain)) if leaf.ndim) > 2 * size


def test_lora_fa_computes_what_lora_does_and_less_backward(key, case):
    params, x, _ = case
    plain = started(key, case, target="layers", rank=R)
    frozen = started(key, case, target="layers", rank=R, method="lora-fa")
    run = jax.jit(lambda a: lora.lift(model)(lora.attach(params, a), x))
    np.testing.assert_array_equal(run(plain), run(frozen))
    got, want = jax.jit(lambda a: gradient(case, a))(frozen), jax.jit(lambda a: gradient(case, a))(plain)
    for path in got:
        np.testing.assert_allclose(got[path].b, want[path].b, rtol=1e-5, atol=1e-7)
        assert not np.any(got[path].a) and np.any(want[path].a)
    # What is saved is (γ dy·b)ᵀ x for each a: the product that would make its gradient, 2·B·D·R.
    saved = sum(2 * B * adapter.a.size for adapter in plain.values())
    costs = [flops(lambda a: gradient(case, a), adapters) for adapters in (plain, frozen)]
    assert costs[0] - costs[1] == saved


def test_the_tree_of_base_and_adapters_has_state_for_the_adapters_alone(key, case):
    params, x, _ = case
    tree = lora.attach(params, started(key, case, target="layers", rank=R, method="vera"))
    tx = lora.optimizer(optax.adam(1e-2), lora.trainable_mask(tree))
    state = tx.init(tree)
    trained = sum(leaf.size for p, a in tree.adapters.items() if p != "/vera" for leaf in jax.tree.leaves(a))
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * trained
    gradient = jax.jit(jax.grad(lambda tree: jnp.mean(lora.lift(model)(tree, x) ** 2)))(tree)
    updates, _ = tx.update(gradient, state, tree)
    after = optax.apply_updates(tree, updates)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.any(jax.tree.leaves(gradient.params)[0])  # it is the mask that keeps the base, not its gradient
    assert np.any(after.adapters["layers/up"].d != tree.adapters["layers/up"].d)
    np.testing.assert_array_equal(after.adapters["/vera"].a, tree.adapters["/vera"].a)
