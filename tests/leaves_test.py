"""Leaves trained whole, chosen rows of an embedding, and several methods in one spec: trained, lifted and merged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import DoRA, Leaf, LoRA, Rows, Rule, Spec

pytestmark = pytest.mark.usefixtures("quick")
L, V, D, F = 2, 11, 8, 12
IDS = jnp.array([[1, 2, 3, 4], [9, 1, 0, 10]])
ROWS = (1, 7, 4)


def model(p, ids):
    """Its embedding is its head."""

    def layer(x, w):
        x = x + jnp.tanh(x * w["norm"] @ w["attn"]) @ w["attn_out"]
        return x + jax.nn.relu(x @ w["mlp"] + w["bias"]) @ w["mlp_out"], None

    x = jax.lax.scan(layer, p["embed"][ids], p["layers"])[0]
    return x * p["norm"] @ p["embed"].T


def parameters(key, dtype=jnp.float32):
    shapes = {"attn": (L, D, D), "attn_out": (L, D, D), "mlp": (L, D, F), "mlp_out": (L, F, D), "bias": (L, F)}
    keys = iter(jax.random.split(key, 9))
    layers = {name: (jax.random.normal(next(keys), shape) / 3).astype(dtype) for name, shape in shapes.items()}
    layers["norm"] = jnp.ones((L, D), dtype)
    return {"embed": jax.random.normal(next(keys), (V, D)).astype(dtype), "layers": layers, "norm": jnp.ones(D, dtype)}


def made(key, params, *rules):
    return lora.init(key, params, lora.trace(model, params, IDS), Spec(*rules))


def fitted(params, adapters, steps=5):
    """The adapters after some steps."""
    tx = optax.adam(3e-2)

    def loss(adapters):
        logits = lora.lift(model)(lora.attach(params, adapters), IDS).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(IDS, 1)).mean()

    @jax.jit
    def run(adapters):
        def step(carry, _):
            adapters, state = carry
            updates, state = tx.update(jax.grad(loss)(adapters), state)
            return (optax.apply_updates(adapters, updates), state), loss(adapters)

        return jax.lax.scan(step, (adapters, tx.init(adapters)), None, length=steps)

    (after, _), losses = run(adapters)
    assert losses[-1] < losses[0]
    return after


def lifted(params, adapters):
    return jax.jit(lambda a: lora.lift(model)(lora.attach(params, a), IDS))(adapters)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_rows_of_a_tied_embedding(key, dtype):
    """Used as a lookup and as the head: both see the trained rows, no other row changes by a bit."""
    params = parameters(key, dtype)
    adapters = made(key, params, Rule("embed", method="rows", rows=ROWS))
    assert isinstance(adapters["embed"], Rows) and adapters["embed"].delta.shape == (3, D)
    np.testing.assert_array_equal(lifted(params, adapters), jax.jit(model)(params, IDS))
    after = fitted(params, adapters)
    merged = lora.merge(params, after)
    others = np.array([row for row in range(V) if row not in ROWS])
    np.testing.assert_array_equal(merged["embed"][others], params["embed"][others])
    want = np.asarray(params["embed"][np.array(ROWS)], np.float64) + np.asarray(after["embed"].delta, np.float64)
    got = np.asarray(merged["embed"][np.array(ROWS)], np.float64)
    np.testing.assert_allclose(got, want, rtol=float(jnp.finfo(dtype).eps))
    assert np.abs(after["embed"].delta).min() > 0  # row 7 is not looked up, but the head has it
    close = 1e-5 if dtype == jnp.float32 else 6e-2
    np.testing.assert_allclose(
        np.asarray(lifted(params, after), np.float32),
        np.asarray(model(merged, IDS), np.float32),
        atol=close,
        rtol=close,
    )
    assert np.abs(np.asarray(model(merged, IDS) - model(params, IDS), np.float32)).max() > 4 * close


def test_rows_have_the_gradient_of_the_dense_embedding(key):
    params = parameters(key)
    adapters = made(key, params, Rule("embed", method="rows", rows=ROWS))
    got = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(lora.lift(model)(lora.attach(params, a), IDS)))))(adapters)
    want = jax.jit(jax.grad(lambda e: jnp.sum(jnp.sin(model({**params, "embed": e}, IDS)))))(params["embed"])
    np.testing.assert_allclose(got["embed"].delta, want[np.array(ROWS)], rtol=1e-4, atol=1e-4)
    assert np.abs(got["embed"].delta - want[np.array(ROWS[::-1])]).max() > 1e-2


@pytest.mark.parametrize("target", ["bias$|norm$", "embed"])
def test_leaves_are_trained_as_if_they_were_parameters(key, target):
    """Biases, norms and a tied head: the gradient is that of the leaf itself."""
    params = parameters(key)
    adapters = made(key, params, Rule(target, method="full"))
    assert all(isinstance(adapter, Leaf) for adapter in adapters.values())
    np.testing.assert_array_equal(lifted(params, adapters), jax.jit(model)(params, IDS))
    got = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(lora.lift(model)(lora.attach(params, a), IDS)))))(adapters)
    want = lora.tree.leaves_by_path(jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model(p, IDS)))))(params))
    for path, gradient in got.items():
        np.testing.assert_allclose(gradient.value, want[path], rtol=1e-4, atol=1e-4)
        assert np.abs(want[path]).max() > 1e-2
    after = lora.tree.leaves_by_path(lora.merge(params, fitted(params, adapters)))
    for path, leaf in lora.tree.leaves_by_path(params).items():
        assert np.array_equal(after[path], leaf) == (path not in adapters)


def test_the_base_is_not_what_is_trained(key):
    """A copy: donating the adapters must not take the parameters away."""
    params = parameters(key)
    adapters = made(key, params, Rule("norm$", method="full"))
    jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)(adapters)
    np.testing.assert_array_equal(params["norm"], 1)


MIXED = (
    Rule("attn$", rank=2, alpha=4.0),
    Rule("attn_out", rank=3, alpha=9.0, rslora=True),
    Rule("mlp", rank=4, method="dora"),
    Rule("norm$|bias", method="full"),
    Rule("embed", method="rows", rows=ROWS),
)


@pytest.mark.slow
def test_several_methods_in_one_spec(key):
    """Rank and scale by pattern; what is lifted is what is merged, after training all of it."""
    params = parameters(key)
    adapters = made(key, params, *MIXED)
    ranks = {path: a.rank for path, a in adapters.items() if isinstance(a, LoRA)}
    assert ranks == {"layers/attn": 2, "layers/attn_out": 3}
    assert adapters["layers/attn"].scale == 2.0 and adapters["layers/attn_out"].scale == pytest.approx(9 / 3**0.5)
    assert {path for path, a in adapters.items() if isinstance(a, DoRA)} == {"layers/mlp", "layers/mlp_out"}
    assert {path for path, a in adapters.items() if isinstance(a, Leaf)} == {"layers/norm", "layers/bias", "norm"}
    assert len(adapters) == len(lora.tree.leaves_by_path(params))
    np.testing.assert_allclose(lifted(params, adapters), model(params, IDS), atol=1e-5)
    after = fitted(params, adapters)
    merged = lora.merge(params, after)
    np.testing.assert_allclose(lifted(params, after), model(merged, IDS), atol=1e-4, rtol=1e-4)
    assert np.abs(model(merged, IDS) - model(params, IDS)).max() > 1e-1
    again = lora.unmerge(merged, after, lora.replaced(params, after))
    for old, new, trained in zip(*map(jax.tree.leaves, (params, again, merged)), strict=True):
        np.testing.assert_array_equal(old, new)
        assert np.any(old != trained)


def test_a_table_says_what_each_gets(key):
    printed = str(lora.report(model, parameters(key), IDS, spec=Spec(*MIXED)))
    rows = {
        line.split()[0]: line.split() for line in printed.splitlines() if line.startswith(("layers", "embed", "norm"))
    }
    assert rows["layers/attn"][-3:] == ["2", "2", f"{L * 2 * 2 * D}"]
    assert rows["layers/attn_out"][-3:] == ["3", "5.19615", f"{L * 3 * 2 * D}"]
    assert "dora" in rows["layers/mlp"] and rows["layers/mlp"][-1] == f"{L * (4 * (D + F) + F)}"
    assert rows["norm"][-3:] == ["-", "-", f"{D}"] and rows["embed"][-1] == f"{3 * D}"
