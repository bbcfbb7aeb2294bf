"""What `trace` says of functions whose use of their weights is known."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax import Axes


def site(f, shape, *args, **kwargs):
    return lora.trace(f, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, *args, **kwargs)["w"]


X = jax.ShapeDtypeStruct((5, 6), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 3), jnp.int32)

CASES = {
    "x @ w": (lambda p, x: x @ p["w"], (6, 8), X, "dense", ((), (0,), (1,))),
    "x @ w.T": (lambda p, x: x @ p["w"].T, (8, 6), X, "dense", ((), (1,), (0,))),
    "w on the left": (lambda p, x: p["w"] @ x.T, (8, 6), X, "dense", ((), (1,), (0,))),
    "cast and reshaped": (
        lambda p, x: x @ p["w"].astype(jnp.float32).reshape(6, 8), (6, 4, 2), X, "dense", ((), (0,), (1, 2)),
    ),
    "heads in": (
        lambda p, x: jnp.einsum("btnh,nhd->btd", jnp.ones((1, 2, 4, 3)), p["w"]), (4, 3, 6), X, "dense",
        ((), (0, 1), (2,)),
    ),
    "scanned": (
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0], (3, 6, 6), X, "dense", ((0,), (1,), (2,)),
    ),
    "scanned under remat": (
        lambda p, x: jax.lax.scan(jax.checkpoint(lambda x, w: (x @ w, None)), x, p["w"])[0], (3, 6, 6), X, "dense",
        ((0,), (1,), (2,)),
    ),
    "picked by index": (lambda p, x: x @ p["w"][1] @ p["w"][0], (3, 6, 6), X, "dense", ((0,), (1,), (2,))),
    "layers last": (
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.moveaxis(p["w"], 1, 0))[0], (6, 3, 6), X, "dense",
        ((1,), (0,), (2,)),
    ),
    "experts": (
        lambda p, x: jnp.einsum("etd,edf->etf", jnp.ones((3, 5, 6)), p["w"]), (3, 6, 8), X, "expert",
        ((0,), (1,), (2,)),
    ),
    "ragged experts": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 1, 2])), (3, 6, 8), X, "expert", ((0,), (1,), (2,)),
    ),
    "experts by number": (
        lambda p, x: jnp.einsum("gmd,gdf->gmf", jnp.ones((4, 5, 6)), p["w"][jnp.array([0, 2, 2, 1])]), (3, 6, 8), X,
        "expert", ((0,), (1,), (2,)),
    ),
    "rows of two axes": (lambda p, ids: 2 * p["w"][ids[0]], (11, 2, 3), IDS, "embedding", ((), (0,), (1, 2))),
    "embedding": (lambda p, ids: p["w"][ids], (11, 6), IDS, "embedding", ((), (0,), (1,))),
    "one row": (lambda p, i: p["w"][i[0, 0]], (11, 6), IDS, "embedding", ((), (0,), (1,))),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(jnp.ones((2, 9, 9, 4)), p["w"], (1, 1), "SAME",
                                                  dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (3, 3, 4, 7), X, "convolution", ((), (0, 1, 2), (3,)),
    ),
    "bias": (lambda p, x: x + p["w"], (6,), X, "elementwise", ((), (), (0,))),
    "scale in a scan": (
        lambda p, x: jax.lax.scan(lambda x, w: (x * w, None), x, p["w"])[0], (3, 6), X, "elementwise",
        ((0,), (), (1,)),
    ),
    "unused": (lambda p, x: x, (6, 8), X, "unused", ((), (), (0, 1))),
    "in a custom_vjp": (lambda p, x: _product(x, p["w"]), (6, 8), X, "other", ((), (), (0, 1))),
}  # fmt: skip


@jax.custom_vjp
def _product(x, w):
    return x @ w


_product.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w.T, None))


@pytest.mark.parametrize("name", CASES)
def test_kind_and_axes(name):
    f, shape, x, kind, axes = CASES[name]
    found = site(f, shape, x)
    assert found.kind == kind
    assert found.axes == Axes(*axes)
    assert found.shape == shape


def test_tied_embedding_has_two_uses():
    found = site(lambda p, ids: jnp.tanh(p["w"][ids]) @ p["w"].T, (11, 6), IDS)
    assert [(use.kind, use.operation) for use in found.uses] == [("embedding", "gather"), ("dense", "dot_general")]
    assert found.uses[1].axes == Axes((), (1,), (0,))
    assert "trace_test.py" in found.uses[0].where


def test_the_head_is_the_product_that_no_other_product_follows():
    def f(p, x):
        h = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
        return jax.nn.log_softmax(h @ p["head"] + p["bias"])

    params = {"layers": jnp.ones((3, 6, 6)), "head": jnp.ones((6, 9)), "bias": jnp.ones(9)}
    sites = lora.trace(f, params, jnp.ones((5, 6)))
    assert [path for path in sites if sites[path].head] == ["head"]


def test_nothing_is_computed_and_shapes_suffice():
    calls = []

    def f(p, x):
        jax.debug.callback(lambda: calls.append(None))
        return x @ p["w"]

    huge = (10**6, 10**6)
    assert site(f, huge, jax.ShapeDtypeStruct((4, 10**6), jnp.float32)).shape == huge
    assert not calls


def test_table():
    printed = str(lora.trace(lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}, jnp.ones(6)))
    lines = printed.splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "kind", "stacked", "in", "out", "uses"]
    assert any(line.split()[0] == "w" and "dense (head)" in line for line in lines)


def test_the_same_eager_and_jitted():
    def f(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    params = {"w": jnp.ones((6, 6)), "v": jnp.ones((6, 6))}
    placements = [
        {path: (s.kind, s.axes, s.head) for path, s in lora.trace(g, params, jnp.ones((5, 6))).items()}
        for g in (f, jax.jit(f), jax.checkpoint(f))
    ]
    assert placements[0] == placements[1] == placements[2]
