"""Dropout on the adapter's input: where it is on, that every site and layer draws its own, and what its mean is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import Rule, Spec

pytestmark = pytest.mark.usefixtures("quick")
L, B, D, R, P = 3, 4, 16, 4, 0.4
METHODS = ("lora", "dora", "vera", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora-fa", "adalora")))


def outputs(p, x):
    """What every product of every layer gives for the same input."""

    def layer(x, w):
        return x, (x @ w["one"], x @ w["two"])

    return jax.lax.scan(layer, x, p)[1]


def made(key, method, dropout=P, equal=False):
    """Parameters and trained adapters; if `equal`, the same in every site and layer."""
    shape = (L, D, D)
    params = {name: jax.random.normal(jax.random.fold_in(key, i), shape) for i, name in enumerate(("one", "two"))}
    x = jax.random.normal(key, (B, D))
    if equal:
        params = {name: jnp.broadcast_to(params["one"][:1], shape) for name in params}
    spec = Spec(Rule("one|two", rank=R, method=method, dropout=dropout))
    adapters = lora.init(key, params, lora.trace(outputs, params, x), spec)

    def moved(leaf):
        new = leaf + 0.3 * jax.random.normal(key, leaf.shape)
        return jnp.broadcast_to(new[:1], new.shape) if equal and leaf.shape[0] == L else new

    adapters = jax.tree.map(moved, adapters)
    return params, x, {**adapters, "two": adapters["one"]} if equal else adapters


def run(params, adapters, x, key=None):
    return jnp.stack(jax.jit(lambda a, key: lora.lift(outputs)(lora.attach(params, a, key), x))(adapters, key))


@pytest.mark.parametrize("method", METHODS)
def test_every_site_and_layer_draws_its_own(key, method):
    params, x, adapters = made(key, method, equal=True)
    off = run(params, adapters, x)  # [site, layer, B, D]
    np.testing.assert_allclose(off, jnp.broadcast_to(off[:1, :1], off.shape), rtol=1e-5, atol=1e-5)
    on = np.asarray(run(params, adapters, x, key)).reshape(2 * L, B, D)
    different = [np.abs(on[i] - on[j]).max() for i in range(2 * L) for j in range(i)]
    assert min(different) > 1e-2
    np.testing.assert_array_equal(on, np.asarray(run(params, adapters, x, key)).reshape(on.shape))  # of the key alone
    assert np.abs(on - np.asarray(run(params, adapters, x, jax.random.key(9))).reshape(on.shape)).max() > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_off_without_a_key_or_a_probability(key, method):
    params, x, adapters = made(key, method)
    none = made(key, method, dropout=0.0)[2]
    merged = jnp.stack(outputs(lora.merge(params, adapters), x))
    off = run(params, adapters, x)
    np.testing.assert_allclose(off, merged, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(off, run(params, none, x))
    np.testing.assert_array_equal(off, run(params, none, x, key))
    assert np.abs(run(params, adapters, x, key) - off).max() > 1e-1


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_over_keys_is_the_result_without(key, method):
    params, x, adapters = made(key, method)
    keys = jax.random.split(key, 2000)
    many = jax.jit(jax.vmap(lambda k: jnp.stack(lora.lift(outputs)(lora.attach(params, adapters, k), x))))(keys)
    off, mean, spread = run(params, adapters, x), many.mean(0), many.std(0)
    # Within five standard errors everywhere, where one draw is far away.
    assert np.all(np.abs(mean - off) <= 5 * spread / len(keys) ** 0.5 + 1e-4)
    assert np.abs(many[0] - off).max() > 20 * np.abs(mean - off).max()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_dropped_input_reaches_the_base_but_not_the_adapter(key, method):
    """Each result is the base's plus the adapter's of an input whose elements are 0 or 1/(1-p) times what they were."""
    params, x, adapters = made(key, method)
    eye = jnp.eye(D)[None].repeat(L, 0)
    adapter = adapters["one"]
    low = dataclasses.replace(adapter.lora if method == "dora" else adapter, a=eye, b=eye, scale=1.0)
    adapter = dataclasses.replace(adapter, lora=low) if method == "dora" else low
    on = run(params, {"one": adapter}, x, key)[0]
    base = x @ params["one"]
    if method == "dora":
        norm = jnp.linalg.norm(params["one"] + eye, axis=1)
        on = on * (norm / adapter.m)[:, None]
    kept = (on - base) / x  # the adapter is the identity: what is left is the mask
    near = np.minimum(np.abs(kept), np.abs(kept - 1 / (1 - P)))
    assert np.median(near) < 1e-5 and np.quantile(near, 0.9) < 1e-3
    assert np.mean(np.abs(kept) < 0.5) == pytest.approx(P, abs=0.12)


def test_the_mask_is_the_same_in_the_backward_pass(key):
    """Also where remat draws it a second time."""
    params, x, adapters = made(key, "lora")

    def looped(p, x, remat):
        def layer(x, w):
            return jnp.tanh(x @ w["one"]) @ w["two"] / D, None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, p)[0]

    def loss(adapters, remat):
        return jnp.sum(lora.lift(looped)(lora.attach(params, adapters, key), x, remat) ** 2)

    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(adapters, remat) for remat in (False, True))
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())
    direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), adapters)
    values = jax.jit(lambda t: loss(jax.tree.map(lambda p, d: p + t * d, adapters, direction), True))
    want = (values(1e-3) - values(-1e-3)) / 2e-3
    got = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(again), jax.tree.leaves(direction), strict=True))
    assert float(got) == pytest.approx(float(want), rel=2e-2) and abs(float(got)) > 1e-3


def test_bottlenecks_and_rescaled_activations_have_none(key):
    for method in ("bottleneck", "ia3"):
        rule = Rule("one", rank=R, method=method) if method == "bottleneck" else Rule("one", method=method)
        params, x, _ = made(key, "lora")
        adapters = lora.init(key, params, lora.trace(outputs, params, x), Spec(rule))
        np.testing.assert_array_equal(run(params, adapters, x), run(params, adapters, x, key))
