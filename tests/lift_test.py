"""`lift` through control flow, under transformations, and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import adapter, assert_lifts

import lora_jax as lora
from lora_jax import Axes

pytestmark = pytest.mark.usefixtures("strict")
DENSE = Axes((), (0,), (1,))
LAYERS = Axes((0,), (1,), (2,))


@pytest.fixture
def one(key):
    """A square weight, its adapter and data."""
    params = {"w": jax.random.normal(key, (6, 6)) / 2}
    return params, {"w": adapter(key, (6, 6), DENSE)}, jax.random.normal(key, (5, 6))


@pytest.fixture
def layers(key):
    """Three stacked square weights, their adapter and data."""
    params = {"w": jax.random.normal(key, (3, 6, 6)) / 2}
    return params, {"w": adapter(key, (3, 6, 6), LAYERS)}, jax.random.normal(key, (5, 6))


def scanned(body, **options):
    return lambda p, x: jax.lax.scan(body, x, p["w"], **options)[0]


def test_inner_jit(one):
    assert_lifts(lambda p, x: jax.jit(lambda x, w: jnp.tanh(x @ w.T))(x, p["w"]), *one)


def test_scan_over_layers(layers):
    assert_lifts(scanned(lambda x, w: (jnp.tanh(x @ w), None)), *layers)
    assert_lifts(scanned(lambda x, w: (jnp.tanh(x @ w), None), reverse=True, unroll=2), *layers)


def test_scan_with_the_weight_as_constant(one):
    assert_lifts(lambda p, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), x), x, None, length=3), *one)


def test_scan_that_carries_the_weight_unchanged(one):
    def f(p, x):
        (x, w), _ = jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["w"]), None, length=3)
        return x @ w

    assert_lifts(f, *one)


def test_scan_that_changes_the_weight_it_carries(one):
    def f(p, x):
        (x, w), _ = jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), -c[1]), None), (x, p["w"]), None, length=3)
        return x @ w

    assert_lifts(f, *one)


def test_scan_that_returns_its_layers(layers):
    def f(p, x):
        x, (same, transposed) = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), (w, w.T)), x, p["w"])
        return jax.lax.scan(lambda x, w: (x @ w[0] @ w[1], None), x, (same, transposed))[0]

    assert_lifts(f, *layers)


def test_layers_stacked_by_the_model(key):
    params = {f"w{i}": jax.random.normal(jax.random.fold_in(key, i), (6, 6)) / 2 for i in range(3)}
    adapters = {path: adapter(key, (6, 6), DENSE) for path in params}

    def f(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["w0"], p["w1"], p["w2"]]))[0]

    assert_lifts(f, params, adapters, jnp.ones((5, 6)))
    sites = lora.trace(f, params, jnp.ones((5, 6)))
    assert {site.kind for site in sites.values()} == {"dense"}
    assert not any(site.head for site in sites.values())


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
def test_remat_in_scan(layers, policy):
    assert_lifts(scanned(jax.checkpoint(lambda x, w: (jnp.sin(jnp.sin(x @ w)), None), policy=policy)), *layers)


def test_remat_keeps_its_policy(one):
    """With everything saveable the backward pass recomputes no product; with nothing it does."""
    params, adapters, x = one

    def products(policy):
        f = jax.checkpoint(lambda p, x: jnp.sin(jnp.sin(x @ p["w"])), policy=policy)

        def loss(adapters):
            return jnp.sum(lora.lift(f)(lora.attach(params, adapters), x))

        return str(jax.make_jaxpr(jax.grad(loss))(adapters)).count("dot_general")

    everything, nothing = (
        products(getattr(jax.checkpoint_policies, name)) for name in ("everything_saveable", "nothing_saveable")
    )
    assert nothing == everything + 3


def test_cond_and_switch(one):
    for case in (True, False):
        assert_lifts(
            lambda p, x, case=case: jax.lax.cond(
                (x[0, 0] < 10) == case, lambda w: x @ w, lambda w: jnp.tanh(x @ w.T), p["w"]
            ),
            *one,
        )


def test_cond_that_returns_a_weight(one):
    assert_lifts(lambda p, x: x @ jax.lax.cond(x[0, 0] < 10, lambda w: 2 * w, lambda w: -w, p["w"]), *one)


def test_while_loop(one):
    params, adapters, x = one

    def f(p, x):
        def body(carry):
            i, x, w = carry
            return i + 1, jnp.tanh(x @ w), w

        return jax.lax.while_loop(lambda c: (c[0] < 3) & (jnp.sum(c[1] @ p["w"]) < 1e9), body, (0, x, p["w"]))[1]

    lifted = lora.lift(f)(lora.attach(params, adapters), x)
    np.testing.assert_allclose(lifted, f(lora.merge(params, adapters), x), rtol=1e-5, atol=1e-6)
    assert np.abs(lifted - f(params, x)).max() > 1e-2


def test_custom_jvp_keeps_the_custom_rule(one):
    params, adapters, x = one

    @jax.custom_jvp
    def product(x, w):
        return x @ w

    @product.defjvp
    def _(primals, tangents):  # three times the true derivative, to tell the two apart
        (x, w), (dx, dw) = primals, tangents
        return x @ w, 3 * (dx @ w + x @ dw)

    assert_lifts(lambda p, x: product(jnp.tanh(x @ p["w"]), p["w"]), *one)

    def gradient(f):
        return jax.grad(lambda a: jnp.sum(lora.lift(f)(lora.attach(params, a), x)))(adapters)["w"].a

    custom, plain = gradient(lambda p, x: product(x, p["w"])), gradient(lambda p, x: x @ p["w"])
    np.testing.assert_allclose(custom, 3 * plain, rtol=1e-5)


def test_custom_vjp_over_data(one):
    @jax.custom_vjp
    def halved(x):
        return x

    halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))
    assert_lifts(lambda p, x: halved(x @ p["w"]) @ p["w"], *one)


def test_custom_vjp_over_a_weight_is_refused(one):
    params, adapters, x = one

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    def f(p, x):
        return product(x, p["w"])

    with pytest.raises(lora.LiftError, match=r"'w' \[6, 6\] reaches `custom_vjp_call` at .*lift_test.py:\d+"):
        lora.lift(f)(lora.attach(params, adapters), x)
    assert lora.trace(f, params, x)["w"].kind == "other"
    y = lora.lift(f, materialise=["w"])(lora.attach(params, adapters), x)
    np.testing.assert_allclose(y, f(lora.merge(params, adapters), x), rtol=1e-5, atol=1e-6)


def test_vmap_inside(key):
    params = {"w": jax.random.normal(key, (4, 6, 3))}
    adapters = {"w": adapter(key, (4, 6, 3), LAYERS)}
    assert_lifts(lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x), params, adapters, jnp.ones((4, 5, 6)))


def test_scan_and_vmap_of_the_lifted_function(one):
    params, adapters, x = one
    lifted = lora.lift(lambda p, x: jnp.tanh(x @ p["w"]))
    tree = lora.attach(params, adapters)
    step = lifted(tree, x)
    np.testing.assert_allclose(jax.vmap(lambda row: lifted(tree, row))(x), step, rtol=1e-5, atol=1e-6)
    twice = jax.lax.scan(lambda x, _: (lifted(tree, x), None), x, None, length=2)[0]
    np.testing.assert_allclose(twice, lifted(tree, step), rtol=1e-5, atol=1e-6)


def test_vmap_over_adapters_shares_the_base(key):
    """K adapters in one step: each result is that adapter's own, and x·W is computed once, not K times."""
    params = {"w": jax.random.normal(key, (32, 64))}
    bank = [{"w": adapter(jax.random.fold_in(key, i), (32, 64), DENSE)} for i in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *bank)
    x = jax.random.normal(key, (8, 32))

    def run(adapters, params, x):
        return lora.lift(lambda p, x: x @ p["w"])(lora.attach(params, adapters), x)

    together = jax.jit(jax.vmap(run, (0, None, None)))
    ys = together(stacked, params, x)
    for y, adapters in zip(ys, bank, strict=True):
        np.testing.assert_allclose(y, run(adapters, params, x), rtol=1e-4, atol=1e-5)
    assert np.abs(ys[0] - ys[1]).max() > 1e-2
    flops = together.lower(stacked, params, x).compile().cost_analysis()["flops"]
    base, factors = 2 * 8 * 32 * 64, 4 * 2 * 8 * (32 + 64) * 2
    assert base + factors <= flops <= 1.2 * (base + factors) < 4 * base


def test_tracing_is_not_paid_again_under_jit(one):
    params, adapters, x = one
    traced = []

    def f(p, x):
        traced.append(None)
        return x @ p["w"]

    step = jax.jit(lambda adapters, x: lora.lift(f)(lora.attach(params, adapters), x))
    for _ in range(3):
        step(adapters, x)
    assert len(traced) == 1


def test_an_operation_without_a_rule_is_an_error_with_its_source(one):
    params, adapters, x = one

    def f(p, x):
        return x @ jnp.sin(p["w"])

    message = r"the adapted weight 'w' \[6, 6\] reaches `sin` at .*lift_test.py:\d+.*materialise=\['w'\]"
    with pytest.raises(lora.LiftError, match=message):
        lora.lift(f)(lora.attach(params, adapters), x)
    y = lora.lift(f, materialise=["^w$"])(lora.attach(params, adapters), x)
    np.testing.assert_allclose(y, f(lora.merge(params, adapters), x), rtol=1e-4, atol=1e-5)


def test_a_returned_weight_is_refused(one):
    params, adapters, x = one
    with pytest.raises(lora.LiftError, match="reaches `return`"):
        lora.lift(lambda p, x: (x, p["w"]))(lora.attach(params, adapters), x)


def test_a_carry_that_loses_its_factors_is_refused(one):
    params, adapters, x = one

    def f(p, x):
        return jax.lax.scan(lambda w, _: (w @ w, None), p["w"], None, length=2)[0] @ x.T

    with pytest.raises(lora.LiftError, match="`dot_general`"):
        lora.lift(f)(lora.attach(params, adapters), x)
    y = lora.lift(f, materialise=["w"])(lora.attach(params, adapters), x)
    np.testing.assert_allclose(y, f(lora.merge(params, adapters), x), rtol=1e-4, atol=1e-5)


def test_arguments_that_are_not_arrays_pass_through(one):
    params, adapters, x = one

    def f(p, x, *, activation, negate):
        return (activation(x @ p["w"]) * (-1 if negate else 1), "label")

    y, label = lora.lift(f)(lora.attach(params, adapters), x, activation=jnp.tanh, negate=True)
    assert label == "label"
    np.testing.assert_allclose(y, -jnp.tanh(x @ lora.merge(params, adapters)["w"]), rtol=1e-5, atol=1e-6)


def test_plain_parameters_run_the_function_itself(one):
    params, _, x = one
    np.testing.assert_array_equal(lora.lift(lambda p, x: x @ p["w"])(params, x), x @ params["w"])


def test_attach_checks_paths_and_shapes(one):
    params, adapters, _ = one
    with pytest.raises(ValueError, match=r"no parameter 'v' for this adapter; nearest: 'w'"):
        lora.attach(params, {"v": adapters["w"]})
    with pytest.raises(ValueError, match=r"'w' does not fit its weight \[6, 7\].*b is \[6, 2\], should be \[7, 2\]"):
        lora.attach({"w": jnp.ones((6, 7))}, adapters)


def test_dropout(key):
    """Off without a key; with one, its mean is the result without; every layer draws its own mask."""
    params = {"w": jnp.zeros((2, 32, 32))}
    same = jnp.broadcast_to(jnp.eye(32), (2, 32, 32))
    adapters = {"w": lora.LoRA(same, same, 1.0, LAYERS, dropout=0.5)}
    x = jnp.ones((4, 32))

    def f(p, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), None, p["w"])[1]

    off = lora.lift(f)(lora.attach(params, adapters), x)
    np.testing.assert_array_equal(off, jnp.ones((2, 4, 32)))
    run = jax.jit(lambda seed: lora.lift(f)(lora.attach(params, adapters, jax.random.key(seed)), x))
    on = [run(i) for i in range(16)]
    assert set(np.unique(on[0])) == {0.0, 2.0}
    assert np.any(on[0][0] != on[0][1]) and np.any(on[0] != on[1])
    assert abs(np.mean(on) - 1) < 5 / np.sqrt(np.size(on))  # five standard deviations
