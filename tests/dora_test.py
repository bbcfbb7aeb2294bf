"""DoRA and VeRA: the norm and its gradient against float64, and what the compiled programs do not contain."""

import dataclasses
import math

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import lora_jax as lora
from lora_jax import Axes, DoRA, LoRA, Rule, Spec, _jaxpr

pytestmark = pytest.mark.usefixtures("quick")
L, B, D, F, R = 3, 5, 24, 40, 2


def layer(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"], None


def model(p, x):
    return jax.lax.scan(jax.checkpoint(layer), x, p["layers"])[0]


def parameters(key):
    up, down = jax.random.split(key)
    draw = jax.random.normal
    return {"layers": {"up": draw(up, (L, D, F)) / D**0.5, "down": draw(down, (L, F, D)) / F**0.5}}


def adapted(key, method, **fields):
    """The parameters, a batch, and adapters with everything that is trained moved."""
    params, x = parameters(key), jax.random.normal(key, (B, D))
    spec = Spec(Rule("layers", rank=R, method=method, **fields))
    adapters = lora.init(key, params, lora.trace(model, params, x), spec)
    leaves, structure = jax.tree.flatten(adapters)
    mask = jax.tree.leaves(lora.trainable_mask(adapters))
    keys = jax.random.split(key, len(leaves))
    moved = [
        x + 0.3 * jax.random.normal(k, x.shape) if train else x for x, k, train in zip(leaves, keys, mask, strict=True)
    ]
    return params, x, jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize(
    ("shape", "axes", "rank"),
    [
        ((6, 9), Axes((), (0,), (1,)), 1),
        ((9, 6), Axes((), (1,), (0,)), 3),
        ((2, 6, 3, 4), Axes((0,), (1,), (2, 3)), 3),
        ((3, 4, 2, 6), Axes((2,), (0, 1), (3,)), 1),
    ],
)
def test_the_norm_is_that_of_the_dense_sum(key, shape, axes, rank):
    stacked, inp, out = ([shape[axis] for axis in group] for group in axes)
    keys = jax.random.split(key, 4)
    a, b = jax.random.normal(keys[0], (*stacked, *inp, rank)), jax.random.normal(keys[1], (*stacked, *out, rank))
    w, m = jax.random.normal(keys[2], shape), jax.random.normal(keys[3], (*stacked, *out))
    adapter = DoRA(LoRA(a, b, 0.7, axes), m)
    # Index arithmetic in float64: [S, D, F].
    order = [axis for group in axes for axis in group]
    groups = [math.prod(group) for group in (stacked, inp, out)]
    w_SDF = np.asarray(w, np.float64).transpose(order).reshape(groups)
    a_SDR, b_SFR = (np.asarray(x, np.float64).reshape(groups[0], -1, rank) for x in (a, b))
    sum_SDF = w_SDF + 0.7 * a_SDR @ b_SFR.swapaxes(1, 2)
    want = np.asarray(m, np.float64).reshape(groups[0], 1, -1) * sum_SDF / np.linalg.norm(sum_SDF, axis=1)[:, None]
    dense = np.asarray(adapter.factored(w, "w").dense(), np.float64).transpose(order).reshape(groups)
    np.testing.assert_allclose(dense, want, atol=1e-5)
    gain = adapter.factored(w, "w").resolved().gain
    gain_SF = np.asarray(gain.expanded(len(shape)), np.float64)[..., 0].transpose(order).reshape(groups[0], -1)
    wanted = np.asarray(m, np.float64).reshape(groups[0], -1) / np.linalg.norm(sum_SDF, axis=1)
    np.testing.assert_allclose(gain_SF, wanted, rtol=2e-5)
    unadapted = np.asarray(m, np.float64).reshape(groups[0], -1) / np.linalg.norm(w_SDF, axis=1)
    assert np.abs(gain_SF / unadapted - 1).max() > 1e-2


def test_the_norm_is_a_constant_of_the_backward_pass(key):
    params, x, adapters = adapted(key, "dora")

    def by_hand(adapters, stop):
        w = {}
        for path, adapter in adapters.items():
            name, low = path.split("/")[1], adapter.lora
            total = params["layers"][name] + low.scale * jnp.einsum("ldr,lfr->ldf", low.a, low.b)
            w[name] = adapter.m[:, None] * total / stop(jnp.linalg.norm(total, axis=1, keepdims=True))
        return jnp.sum(jnp.sin(model({"layers": w}, x)))

    def lifted(adapters):
        return jnp.sum(jnp.sin(lora.lift(model)(lora.attach(params, adapters), x)))

    losses = lifted, lambda a: by_hand(a, jax.lax.stop_gradient), lambda a: by_hand(a, lambda norm: norm)
    got, want, whole = jax.jit(lambda a: [jax.grad(f)(a) for f in losses])(adapters)
    for have, detached in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(have, detached, atol=1e-4 * np.abs(detached).max())
    differences = [np.abs(got[path].lora.a - whole[path].lora.a).max() / np.abs(got[path].lora.a).max() for path in got]
    assert min(differences) > 1e-2


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_no_product_of_the_factors_is_formed(key, method):
    """Under scan and remat, forward and backward: DoRA squares W, and nothing else of W's size is computed."""
    params, x, adapters = adapted(key, method)

    def loss(adapters, params):
        return jnp.sum(jnp.sin(lora.lift(model)(lora.attach(params, adapters), x)))

    def dense(adapters, params):
        return jnp.sum(jnp.sin(model(lora.merge(params, adapters), x)))

    def large(f):
        program = hlo.parse(jax.jit(jax.grad(f)).lower(adapters, params).compile().as_text())
        return sorted({i.opcode for i in program.computed({D * F, L * D * F})})

    assert large(loss) == {"dora": ["multiply"], "lora": []}[method]  # w * w, summed
    assert "dot" in large(dense)


def test_a_column_of_zeros_is_not_divided_by_its_norm(key):
    """A padded vocabulary or an output projection that starts at zero."""
    params, x = parameters(key), jax.random.normal(key, (B, D))
    params["layers"]["down"] = params["layers"]["down"].at[:, :, 1].set(0)
    sites = lora.trace(model, params, x)
    adapters = lora.init(key, params, sites, Spec(Rule("down", rank=R, method="dora")))

    def run(adapters):
        return lora.lift(model)(lora.attach(params, adapters), x)

    np.testing.assert_allclose(run(adapters), model(params, x), atol=1e-5)
    np.testing.assert_array_equal(lora.merge(params, adapters)["layers"]["down"][:, :, 1], 0)
    gradient = jax.grad(lambda a: jnp.sum(jnp.sin(run(a))))(adapters)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.abs(gradient["layers/down"].lora.b[:, 0]).max() > 0 == np.abs(gradient["layers/down"].lora.b[:, 1]).max()


def scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(inner)


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_the_shared_matrices_stay_outside_the_scan(key, method):
    params, x, adapters = adapted(key, method)
    program = jax.make_jaxpr(lambda tree: lora.lift(model)(tree, x))(lora.attach(params, adapters))
    (scan,) = scans(program.jaxpr)
    n_consts, n_carry = _jaxpr.scan_counts(scan.params)
    consts, scanned = ([v.aval.shape for v in vs] for vs in (scan.invars[:n_consts], scan.invars[n_consts + n_carry :]))
    shared = {(D, R), (F, R)}
    stacked = {(L, *shape) for shape in shared}
    assert (shared <= set(consts) and not stacked & set(scanned)) == (method == "vera")
    assert (stacked <= set(scanned)) == (method == "lora")


def test_the_shared_matrices_are_kept_once_and_never_trained(key):
    params, x, adapters = adapted(key, "vera")
    assert {path: sum(leaf.size for leaf in jax.tree.leaves(entry)) for path, entry in adapters.items()} == {
        "/vera": 2 * F * R,
        "layers/up": L * (R + F),
        "layers/down": L * (R + D),
    }
    mask = lora.trainable_mask(adapters)
    assert jax.tree.leaves(mask["/vera"]) == [False, False]
    assert all(jax.tree.leaves([mask[path] for path in adapters if path != "/vera"]))
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(lora.lift(model)(lora.attach(params, a), x)))))(adapters)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient["/vera"]))
    assert all(np.any(g) for path in gradient if path != "/vera" for g in jax.tree.leaves(gradient[path]))


def test_vera_is_the_formula_on_the_first_rows_of_the_shared_matrices(key):
    params, _, adapters = adapted(key, "vera")
    a, b = (np.asarray(m, np.float64) for m in (adapters["/vera"].a, adapters["/vera"].b))
    merged = lora.merge(params, adapters)["layers"]
    for name, (d_in, d_out) in {"up": (D, F), "down": (F, D)}.items():
        d, e = (np.asarray(v, np.float64) for v in (adapters[f"layers/{name}"].d, adapters[f"layers/{name}"].e))
        for i in range(L):
            change = a[:d_in] * d[i] @ b[:d_out].T * e[i]
            got = np.asarray(merged[name][i], np.float64) - np.asarray(params["layers"][name][i], np.float64)
            np.testing.assert_allclose(got, change, atol=1e-5)
            assert np.abs(change).max() > 1e-2
    other = {**adapters, "/vera": dataclasses.replace(adapters["/vera"], a=-adapters["/vera"].a)}
    assert np.abs(lora.merge(params, other)["layers"]["up"] - merged["up"]).max() > 1e-2
