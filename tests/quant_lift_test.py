"""A function lifted over quantised weights is what it is over the same weights as arrays: values and derivatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from steps import SMOLLM2

import lora_jax as lora
from lora_jax.lift import LiftError
from lora_jax.merge import merge_error, replaced
from lora_jax.models import decoder
from lora_jax.quant import FORMATS, Quantised, quantize_leaf
from lora_jax.quantize import dequantize, quantize

L, D, N, H, V, E = 3, 12, 2, 5, 10, 4
IDS = np.array([[1, 4, 2, 9], [0, 3, 3, 7]])
SLOW = pytest.mark.slow
EVERY_FORMAT = pytest.mark.parametrize("format", [f if f == "nf4" else pytest.param(f, marks=SLOW) for f in FORMATS])


@pytest.fixture(scope="module", autouse=True)
def quick():
    with tiny.quick_compilation():
        yield


def model(params, ids, run):
    """A tied head; kernels [D, N, H] made matrices, and others cast, before the layers run; one used transposed."""
    layers = {
        "heads": params["heads"].reshape(L, D, N * H),
        "cast": params["cast"].astype(jnp.float32),
        "turned": params["turned"],
    }

    def layer(x, p):
        return x + jnp.tanh(jnp.tanh(x @ p["heads"]) @ p["cast"]) @ p["turned"].T, None

    return run(layer, params["table"][ids], layers) @ params["table"].T


def by_index(layer, x, layers):
    for i in range(L):
        x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], layers))
    return x


def scanned(layer, x, layers):
    return jax.lax.scan(layer, x, layers)[0]


def checkpointed(policy):
    return lambda layer, x, layers: scanned(jax.checkpoint(layer, policy=policy), x, layers)


RUNS = {
    "eager": scanned,
    "by index": by_index,
    "scan": scanned,
    "remat full": checkpointed(None),
    "remat dots": checkpointed(jax.checkpoint_policies.dots_saveable),
}


@functools.cache
def weights():
    shapes = {"table": (V, D), "heads": (L, D, N, H), "cast": (L, N * H, D), "turned": (L, D, D)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(k, shape) / 4 for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return params | {"cast": params["cast"].astype(jnp.bfloat16)}


def moved(adapters):
    """Both factors away from their start."""
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure, [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def setting(f, params, x, format, target="."):
    """Quantised parameters and adapters, on every weight."""
    sites = lora.trace(f, params, x)
    q = quantize(params, sites, {target: format})
    return q, moved(lora.init(jax.random.key(2), params, sites, lora.Spec(target=target, rank=2, alpha=2)))


def close(got, want, tolerance=2e-5):
    def equal(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))

    jax.tree.map(equal, got, want)


def away(got, other):
    assert any(
        np.abs(np.asarray(x) - np.asarray(y)).max() > 1e-3 * np.abs(np.asarray(y)).max()
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(other), strict=True)
    )


def check(f, q, adapters, floats, x, jit=True):
    """Values and gradients over `q` are those over its arrays, and not those over the weights that were quantised."""

    def loss(adapters, base, x):
        return jnp.sum(jnp.sin(lora.lift(f)(lora.attach(base, adapters), x).astype(jnp.float32)))

    step = jax.value_and_grad(loss)
    step = jax.jit(step) if jit else step
    got = step(adapters, q, x)
    close(got, step(adapters, dequantize(q), x))
    away(got[1], step(adapters, floats, x)[1])
    away(got[1], step(jax.tree.map(lambda a: 1.1 * a, adapters), q, x)[1])
    # Without adapters it is a tree like any other.
    plain, lifted = (jax.jit(f), jax.jit(lora.lift(f))) if jit else (f, lora.lift(f))
    close(lifted(q, x), plain(dequantize(q), x))
    away(lifted(q, x), plain(floats, x))


@EVERY_FORMAT
@pytest.mark.parametrize("run", [pytest.param(r, marks=SLOW) if r in ("eager", "by index") else r for r in RUNS])
def test_equals_the_arrays(format, run):
    f = functools.partial(model, run=RUNS[run])
    q, adapters = setting(f, weights(), IDS, format)
    assert all(isinstance(leaf, Quantised) for leaf in q.values()) and adapters.keys() == q.keys()
    check(f, q, adapters, weights(), IDS, jit=run != "eager")


TINY = dataclasses.replace(SMOLLM2, vocab=40, dim=24, hidden=40, layers=2, heads=2, kv_heads=1, head_dim=12)


@pytest.mark.slow
@EVERY_FORMAT
@pytest.mark.parametrize(("remat", "tied"), [("full", True), ("none", False), ("dots", False)])
def test_decoder(format, remat, tied):
    config = dataclasses.replace(TINY, tied=tied)
    params = decoder.init(jax.random.key(0), config)
    ids = np.arange(12).reshape(2, 6)
    f = functools.partial(decoder.forward, config=config, remat=remat)
    q, adapters = setting(f, params, ids, format, target="kernel|embedding")
    assert isinstance(q["embed"]["embedding"], Quantised) and isinstance(q["layers"]["q_proj"]["kernel"], Quantised)
    check(f, q, adapters, params, ids)


def experts(params, x):
    return jnp.einsum("etf,efd->etd", jnp.tanh(jnp.einsum("etd,edf->etf", x, params["up"])), params["down"])


def ragged(params, x):
    x, sizes = x.reshape(-1, D), jnp.array([3, 0, 5, 4])
    return jax.lax.ragged_dot(jnp.tanh(jax.lax.ragged_dot(x, params["up"], sizes)), params["down"], sizes)


def numbered(params, x):
    up, down = (params[name][jnp.array([2, 0, 0, 3])] for name in ("up", "down"))
    return jnp.einsum("etf,efd->etd", jnp.tanh(jnp.einsum("etd,edf->etf", x, up)), down)


def scanned_experts(params, x):
    stack = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), x)
    return jax.lax.scan(lambda x, y: (jnp.tanh(experts(params, x)) + y, None), x, stack)[0]


@EVERY_FORMAT
@pytest.mark.parametrize("f", [experts, ragged, numbered, scanned_experts])
def test_experts(f, format):
    a, b, c = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(a, (E, D, H)), "down": jax.random.normal(b, (E, H, D))}
    x = jax.random.normal(c, (E, 3, D))
    q, adapters = setting(f, params, x, format)
    check(f, q, adapters, params, x)


@EVERY_FORMAT
def test_tangents(format):
    f = functools.partial(model, run=scanned)
    q, adapters = setting(f, weights(), IDS, format)

    def tangent(base):
        return jax.jvp(lambda a: lora.lift(f)(lora.attach(base, a), IDS), (adapters,), (moved(adapters),))

    close(tangent(q), tangent(dequantize(q)))
    away(tangent(q), tangent(weights()))


@EVERY_FORMAT
def test_codes_and_scales_get_no_gradient(format):
    f = functools.partial(model, run=scanned)
    q, adapters = setting(f, weights(), IDS, format)

    def gradient(base):
        loss = lambda base: jnp.sum(lora.lift(f)(lora.attach(base, adapters), IDS) ** 2)  # noqa: E731
        leaves = jax.tree.leaves(jax.grad(loss, allow_int=True)(base))
        return [leaf for leaf in leaves if leaf.dtype != jax.dtypes.float0]

    assert gradient(q) and not any(np.asarray(leaf, np.float32).any() for leaf in gradient(q))
    assert all(np.asarray(leaf, np.float32).any() for leaf in gradient(dequantize(q)))


WITHOUT_A_RULE = {
    "sin": lambda p, x: x @ jnp.sin(p["up"]),
    "added": lambda p, x: x @ (p["up"] + 1),
    "concatenate": lambda p, x: x @ jnp.concatenate([p["up"], p["down"]], 1),
}


@pytest.mark.parametrize("operation", WITHOUT_A_RULE)
def test_an_operation_without_a_rule_is_named(operation):
    f, w = WITHOUT_A_RULE[operation], jax.random.normal(jax.random.key(0), (D, H))
    q = {"up": quantize_leaf(w, "nf4", -2), "down": quantize_leaf(w, "nf4", -2)}
    message = r"the quantised weight 'up' \[12, 5\] reaches `(sin|add|concatenate)`"
    with pytest.raises(LiftError, match=message) as e:
        lora.lift(f)(q, jnp.ones((2, D)))
    assert "\n" not in str(e.value)
    close(lora.lift(f, materialise=["up|down"])(q, jnp.ones((2, D))), f(dequantize(q), jnp.ones((2, D))))


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_merging_loses(format, dtype):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 48)).astype(dtype)}
    q, adapters = setting(lambda p, x: x @ p["w"], params, jnp.ones((2, 64), dtype), format)
    base = np.asarray(q["w"].dequantised(), np.float64)
    a, b = (np.asarray(x, np.float64) for x in (adapters["w"].a, adapters["w"].b))
    exact = base + adapters["w"].scale * a @ b.T

    merged, full = lora.merge(q, adapters)["w"], lora.merge(q, adapters, full_precision=True)["w"]
    assert merged.format == format and full.dtype == dtype and full.shape == (64, 48)
    lost = np.linalg.norm(np.asarray(merged.dequantised(), np.float64) - exact) / np.linalg.norm(exact - base)
    assert merge_error(q, adapters)["w"] == pytest.approx(lost, rel=1e-4)
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(full, np.float64), exact, rtol=rounding, atol=4 * rounding**2 + 1e-6)
    assert lost > 2 * np.linalg.norm(np.asarray(full, np.float64) - exact) / np.linalg.norm(exact - base)

    for tree in (lora.merge(q, adapters), lora.merge(q, adapters, full_precision=True)):
        back = lora.unmerge(tree, adapters, replaced(q, adapters))
        jax.tree.map(np.testing.assert_array_equal, back, q)
    assert np.asarray(merged.codes != q["w"].codes).any()
