"""The dense computation that every lifted one is compared with, and the comparison."""

import math

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import Axes, LoRA


def adapter(key, shape, axes: Axes, rank=2, scale=0.7, dropout=0.0) -> LoRA:
    """A LoRA adapter of a weight of this shape, both of whose factors are random."""
    stacked, inp, out = ([shape[axis] for axis in group] for group in axes)
    key_a, key_b = jax.random.split(key)
    a = jax.random.normal(key_a, (*stacked, *inp, rank)) / math.sqrt(math.prod(inp))
    b = jax.random.normal(key_b, (*stacked, *out, rank))
    return LoRA(a, b, scale, axes, dropout)


def dense_delta(lora_adapter: LoRA) -> np.ndarray:
    """γ a b as a float64 array, by index arithmetic that shares nothing with the library."""
    stacked, inp, out = lora_adapter.axes
    a, b = np.asarray(lora_adapter.a, np.float64), np.asarray(lora_adapter.b, np.float64)
    n = len(stacked)
    stack, rank = a.shape[:n], a.shape[-1]
    full = np.matmul(a.reshape(*stack, -1, rank), np.swapaxes(b.reshape(*stack, -1, rank), -1, -2))
    full = full.reshape(*stack, *a.shape[n:-1], *b.shape[n:-1])
    return lora_adapter.scale * np.transpose(full, np.argsort([*stacked, *inp, *out]))


def dense_params(params, adapters):
    """The parameters with every γ a b added, leaf by leaf, in float64 and rounded once."""

    def add(path, leaf):
        if path not in adapters:
            return leaf
        return jnp.asarray(np.asarray(leaf, np.float64) + dense_delta(adapters[path]), leaf.dtype)

    leaves = lora.tree.leaves_by_path(params)
    return lora.tree.replace(params, {path: add(path, leaf) for path, leaf in leaves.items()})


def assert_lifts(f, params, adapters, *args, tolerance=1e-4, eager=True):
    """The lifted f is f with dense weights: eager, jitted, and its gradient; it is not f with the base's weights."""

    def flat(y):
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(y)])

    def lifted(adapters):
        return flat(lora.lift(f)(lora.attach(params, adapters), *args))

    def densely(factors):
        merged = dict(lora.tree.leaves_by_path(params))
        for path, (a, b) in factors.items():
            merged[path] = merged[path] + _traceable_delta(adapters[path], a, b)
        return flat(f(lora.tree.replace(params, merged), *args))

    @jax.jit
    def both(adapters, factors):
        def pulled_back(function, at):
            y, pull = jax.vjp(function, at)
            return y, pull(jnp.cos(jnp.arange(y.size)))[0]

        return pulled_back(lifted, adapters), pulled_back(densely, factors), flat(f(params, *args))

    factors = {path: (x.a, x.b) for path, x in adapters.items()}
    (got, got_gradient), (want, want_gradient), base = both(adapters, factors)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, atol=tolerance * scale, rtol=tolerance)
    assert float(jnp.abs(base - want).max()) > 10 * tolerance * scale, "the adapter must change the result"
    for path, (a, b) in want_gradient.items():
        for have, wanted in ((got_gradient[path].a, a), (got_gradient[path].b, b)):
            size = float(jnp.abs(wanted).max())
            assert size > 0, f"no gradient reaches {path}"
            np.testing.assert_allclose(have, wanted, atol=tolerance * size, rtol=10 * tolerance)
    if eager:
        exact = flat(f(dense_params(params, adapters), *args))
        np.testing.assert_allclose(lifted(adapters), exact, atol=tolerance * scale, rtol=tolerance)


def _traceable_delta(lora_adapter: LoRA, a, b):
    stacked, inp, out = lora_adapter.axes
    n, rank = len(stacked), a.shape[-1]
    stack = a.shape[:n]
    full = jnp.matmul(a.reshape(*stack, -1, rank), jnp.swapaxes(b.reshape(*stack, -1, rank), -1, -2))
    full = full.reshape(*stack, *a.shape[n:-1], *b.shape[n:-1])
    return lora_adapter.scale * jnp.transpose(full, np.argsort([*stacked, *inp, *out]))
