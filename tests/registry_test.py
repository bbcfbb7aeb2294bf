"""Every method over every base, eager, jitted, scanned and rematerialised, through the same invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lora_jax as lora
from lora_jax import Rule, Spec
from lora_jax.quantize import dequantize, quantize

pytestmark = pytest.mark.usefixtures("quick")
L, V, D, F = 2, 12, 16, 32
LINEAR = dict(target="layers/w", rank=4, alpha=8.0)
METHODS = {
    "lora": Rule(**LINEAR),
    "rslora": Rule(**LINEAR, rslora=True),
    "orthogonal": Rule(**LINEAR, init="orthogonal"),
    "normal": Rule(**LINEAR, init="normal"),
    "pissa": Rule(**LINEAR, init="pissa"),
    "olora": Rule(**LINEAR, init="olora"),
    "lora-fa": Rule(**LINEAR, method="lora-fa"),
    "dora": Rule(**LINEAR, method="dora"),
    "adalora": Rule(**LINEAR, method="adalora"),
    "vera": Rule("layers/w", rank=8, method="vera"),
    "ia3": Rule("layers/w", method="ia3"),
    "ia3 in": Rule("layers/w", method="ia3", side="in"),
    "bottleneck": Rule("layers/w", rank=4, method="bottleneck"),
    "full": Rule("bias|layers/w", method="full"),
    "rows": Rule("embed", method="rows", rows=(1, 5)),
}
QUICK = ("lora", "dora", "vera", "ia3")  # one of each kind of arithmetic
BASES = ("float32", "bfloat16", "nf4", "int8", "int4", "fp8")
# How far a start is from the base: exactly equal, but for what is divided by a norm or cancels a start.
START = {"dora": 1e-6, "pissa": 3e-6, "olora": 3e-6}
# Products in bfloat16 and their sums round to 8 bits, and merging rounds the weight to 8 bits as well.
CLOSE = {"bfloat16": 4e-2}


def layer(x, w):
    x = x + jnp.tanh(x @ w["w_up"].astype(x.dtype) + w["bias"].astype(x.dtype)) @ w["w_down"].astype(x.dtype)
    return x, None


def unrolled(p, ids):
    x = p["embed"][ids].astype(p["head"].dtype)
    for i in range(L):
        x, _ = layer(x, {name: leaf[i] for name, leaf in p["layers"].items()})
    return x @ p["head"]


def scanned(p, ids, body=layer):
    x = p["embed"][ids].astype(p["head"].dtype)
    return jax.lax.scan(body, x, p["layers"])[0] @ p["head"]


def rematerialised(p, ids):
    return scanned(p, ids, jax.checkpoint(layer))


IDS = jnp.array([[1, 2, 3], [5, 1, 7]])


def base_of(kind):
    shapes = {
        "embed": (V, D),
        "layers": {"w_up": (L, D, F), "w_down": (L, F, D), "bias": (L, F)},
        "head": (D, V),
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    arrays = [(jax.random.normal(k, s) / 4).astype(dtype) for k, s in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, arrays)
    sites = lora.trace(scanned, params, IDS)
    return params if kind in ("float32", "bfloat16") else quantize(params, sites, {"layers/w": kind})


def trained(adapters, key):
    """The adapters with everything that is trained moved away from where it started."""
    mask, leaves = jax.tree.leaves(lora.trainable_mask(adapters)), jax.tree.leaves(adapters)
    keys = jax.random.split(key, len(leaves))
    moved = [
        leaf + 0.5 * jax.random.normal(k, leaf.shape) if train else leaf
        for k, leaf, train in zip(keys, leaves, mask, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(adapters), moved)


def modes(f=lambda g: g):
    return [f(g) for g in (unrolled, scanned, rematerialised)]


def bottlenecked(params, adapters):
    """The model with a bottleneck behind every product, written by hand."""
    p = dequantize(params)
    small = {path.split("/")[1]: adapters[path] for path in adapters}
    x = p["embed"][IDS]

    def product(x, name, i):
        y = x @ p["layers"][name][i].astype(x.dtype)
        down, up = small[name].down[i].astype(x.dtype), small[name].up[i].astype(x.dtype)
        return y + jax.nn.gelu(y @ down) @ up.T

    for i in range(L):
        x = x + product(jnp.tanh(product(x, "w_up", i) + p["layers"]["bias"][i]), "w_down", i)
    return x @ p["head"]


@pytest.mark.parametrize("base", [b if b == "float32" else pytest.param(b, marks=pytest.mark.slow) for b in BASES])
@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_invariants(method, base, key, tmp_path):
    params, spec = base_of(base), Spec(METHODS[method])
    sites = lora.trace(scanned, params, IDS)
    adapters = lora.init(key, params, sites, spec)
    tolerance = CLOSE.get(base, 1e-5)

    # It starts as the base, in every mode.
    plain = [np.asarray(f(dequantize(params), IDS), np.float32) for f in modes()]
    start = jax.jit(lambda a: [lora.lift(f)(lora.attach(params, a), IDS) for f in modes()])
    for got, want in zip(start(adapters), plain, strict=True):
        assert got.dtype == (jnp.bfloat16 if base == "bfloat16" else jnp.float32)
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=tolerance * np.abs(want).max())
    eager = np.asarray(lora.lift(unrolled)(lora.attach(params, adapters), IDS), np.float32)
    if base == "float32":
        np.testing.assert_allclose(eager, plain[0], atol=START.get(method, 0) * np.abs(plain[0]).max(), rtol=0)

    # Trained, it is the merged model, and another than the base.
    moved = trained(adapters, key)
    if method == "bottleneck":
        with pytest.raises(ValueError, match="is not linear in the weight: it cannot be added into it"):
            lora.merge(params, moved)
        want = np.asarray(bottlenecked(params, moved), np.float32)
    else:
        merged = dequantize(lora.merge(params, moved, full_precision=True))  # rows leave the layers as they are
        assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
            lambda x: (x.shape, x.dtype), dequantize(params)
        )
        want = np.asarray(unrolled(merged, IDS), np.float32)
    assert np.abs(want - plain[0]).max() > 4 * tolerance * np.abs(want).max()
    gots = [*start(moved), lora.lift(unrolled)(lora.attach(params, moved), IDS)]
    for got in gots:
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=tolerance * np.abs(want).max())

    # Merging and taking out again gives the base, bit for bit.
    if method != "bottleneck":
        again = lora.unmerge(lora.merge(params, moved), moved, lora.replaced(params, moved))
        assert same(again, params)
        assert not same(lora.merge(params, moved), params)

    # Training moves what is trained and nothing else.
    @jax.jit
    def loss(adapters):
        return jnp.mean(jnp.square(rematerialised_lifted(lora.attach(params, adapters), IDS).astype(jnp.float32)))

    mask = lora.trainable_mask(moved)
    tx = lora.optimizer(optax.adam(1e-2), mask)
    state, now = tx.init(moved), moved
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(now), state)
        now = optax.apply_updates(now, updates)
    for old, new, train in zip(*map(jax.tree.leaves, (moved, now, mask)), strict=True):
        assert np.array_equal(old, new) != train
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * lora.count(lora.split(moved, mask)[0])

    # Saved and loaded, it is the same.
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "adapter", now)
        saver.wait_until_finished()
        assert same(saver.restore(tmp_path / "adapter", jax.tree.map(jnp.zeros_like, now)), now)


rematerialised_lifted = lora.lift(rematerialised)


def same(x, y):
    leaves = list(zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    return jax.tree.structure(x) == jax.tree.structure(y) and all(np.array_equal(a, b) for a, b in leaves)


def test_every_method_is_here():
    from lora_jax.spec import METHODS as ALL

    assert {rule.method for rule in METHODS.values()} == set(ALL)


@pytest.mark.parametrize("changed", [True, False])
def test_the_invariances_of_the_four_scales(key, changed):
    """Under Adam with ε = 0, α/(pq), p·init_A, p·lr_A, q·lr_B leave training unchanged; p and p alone do not."""
    params = base_of("float32")
    sites = lora.trace(scanned, params, IDS)
    p, q = 4.0, 0.25

    def run(alpha, p, q):
        adapters = lora.init(key, params, sites, Spec(dataclasses.replace(METHODS["lora"], alpha=alpha)))
        adapters = {path: dataclasses.replace(x, a=x.a * p) for path, x in adapters.items()}
        rates = {"a": optax.adam(1e-3 * p, eps=1e-30), "b": optax.adam(1e-3 * q, eps=1e-30)}
        tx = optax.partition(rates, lora.labels(adapters))

        def step(carry, _):
            adapters, state = carry
            grad = jax.grad(lambda a: jnp.mean(lora.lift(scanned)(lora.attach(params, a), IDS) ** 2))(adapters)
            updates, state = tx.update(grad, state)
            return (optax.apply_updates(adapters, updates), state), None

        run = jax.jit(lambda adapters: jax.lax.scan(step, (adapters, tx.init(adapters)), None, length=50)[0][0])
        trained = run(adapters)
        return {path: trained[path].factored(jnp.zeros(sites[path].shape), path).delta() for path in trained}

    plain, scaled = run(8.0, 1.0, 1.0), run(8.0 / (p * q) if not changed else 8.0, p, q if not changed else 1.0)
    error = max(float(jnp.linalg.norm(plain[path] - scaled[path]) / jnp.linalg.norm(plain[path])) for path in plain)
    assert (error > 1e-1) if changed else (error < 1e-3)


def test_a_rescaled_input_keeps_its_dtype():
    """The scale is float32; a product of bfloat16 stays one."""
    params, x = {"w": jnp.ones((6, 4), jnp.bfloat16)}, jnp.ones((5, 6), jnp.bfloat16)
    adapters = {"w": lora.IA3(jnp.full(6, 1.5), lora.Axes((), (0,), (1,)), "in")}

    def f(p, x):
        return jax.lax.dot(x, p["w"])

    for tree, y in ((params, 6), (lora.attach(params, adapters), 9)):
        (dot,) = [eqn for eqn in jax.make_jaxpr(lora.lift(f))(tree, x).eqns if eqn.primitive.name == "dot_general"]
        assert [operand.aval.dtype for operand in dot.invars] == [jnp.bfloat16] * 2
        np.testing.assert_array_equal(lora.lift(f)(tree, x), jnp.full((5, 4), y, jnp.bfloat16))
