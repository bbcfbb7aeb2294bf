"""Models written for nobody in particular: found, adapted, run factored and merged without a change to them."""

import re

import equinox as eqx
import gallery_flax
import gallery_others
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cost import flops

pytestmark = pytest.mark.usefixtures("quick")
GALLERY = [*gallery_flax.MODELS, *gallery_others.MODELS]
RANK = 2


def factor_products(sites, rows):
    """2·rows·R·(in + out) for every use of a weight; rows of a factor are looked up, not multiplied."""
    total = 0
    for path, site in sites.items():
        _, inp, out = site.dimensions()
        n = next(n for pattern, n in rows.items() if re.search(pattern, path))
        down, up = n if isinstance(n, tuple) else (n, n)
        for use in site.uses:
            total += 2 * RANK * (up * out + (0 if use.kind == "embedding" else down * inp))
    return total


# One of each library stands for all but in the slow tests.
QUICK = (gallery_flax.nnx_by_hand, gallery_flax.linen_audio_network, gallery_others.equinox_convolutions)


@pytest.mark.parametrize("make", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in GALLERY])
def test_a_model_it_has_never_seen(make):
    f, params, x, rows = make()
    sites = lora.trace(f, params, x)
    targets = {path: site for path, site in sites.items() if site.adaptable}
    assert targets
    spec = lora.Spec(target="|".join(f"^{re.escape(path)}$" for path in targets), rank=RANK)
    adapters = lora.init(jax.random.key(1), params, sites, spec)
    assert set(adapters) == set(targets)

    jitted = lora.trace(eqx.filter_jit(f), params, x)
    assert {path: [(use.kind, use.axes) for use in site.uses] for path, site in jitted.items()} == {
        path: [(use.kind, use.axes) for use in site.uses] for path, site in sites.items()
    }

    def lifted(adapters):
        return lora.lift(f)(lora.attach(params, adapters), x)

    def merged(adapters):
        return f(lora.merge(params, adapters), x)

    def gradient(model):
        return jax.grad(lambda adapters: jnp.sum(jnp.sin(model(adapters))))

    # At the start it is the base, to the bit where each operation runs by itself.
    base = f(params, x)
    np.testing.assert_array_equal(lifted(adapters), base)

    # Trained, it is the merged model, and so are its gradients.
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(targets)))
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), adapters)

    @jax.jit
    def both(adapters):
        return [(model(adapters), gradient(model)(adapters)) for model in (lifted, merged)]

    (got, have), (want, exact) = both(trained)
    size = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, atol=1e-4 * size, rtol=1e-4)
    assert float(jnp.abs(want - base).max()) > 1e-2 * size
    for path in targets:
        for ours, true in zip(jax.tree.leaves(have[path]), jax.tree.leaves(exact[path]), strict=True):
            assert np.any(true), path
            np.testing.assert_allclose(ours, true, atol=1e-3 * float(jnp.abs(true).max()), rtol=1e-3, err_msg=path)

    # It costs the products of the base and of the factors; a step is cheaper than one through merged weights.
    alone = flops(f, params, x)
    assert flops(lifted, adapters) == alone + factor_products(targets, rows)
    assert flops(merged, adapters) != flops(lifted, adapters)
    assert flops(gradient(lifted), adapters) < flops(gradient(merged), adapters)
