"""Preference losses against the papers' formulas in float64, and masked tokens against none at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sft_test

from lora_jax.interop import hf
from lora_jax.models import decoder
from train import likelihood, preferences
from train.preferences import Pairs

pytestmark = pytest.mark.usefixtures("quick_module")

B = 64


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds(log_p):
    return np.exp(log_p) / (1 - np.exp(log_p))


# As they stand in the papers, in terms of p(y⁺), p(y⁻) and the reference's, with logarithms x, of sums or of means.
FORMULAS = {
    "dpo": lambda c, r, rc, rr: -np.log(sigmoid(0.3 * (c - rc) - 0.3 * (r - rr))),
    "conservative": lambda c, r, rc, rr: (
        -0.9 * np.log(sigmoid(0.3 * ((c - rc) - (r - rr)))) - 0.1 * np.log(1 - sigmoid(0.3 * ((c - rc) - (r - rr))))
    ),
    "ipo": lambda c, r, rc, rr: (np.log(np.exp(c) * np.exp(rr) / (np.exp(r) * np.exp(rc))) - 1 / (2 * 0.4)) ** 2,
    "orpo": lambda c, r, rc, rr: -c - 0.2 * np.log(sigmoid(np.log(odds(c) / odds(r)))),
    "simpo": lambda c, r, rc, rr: -np.log(sigmoid(2.0 * c - 2.0 * r - 0.5)),
}
OURS = {
    "dpo": lambda p, q: preferences.dpo(p, q, 0.3),
    "conservative": lambda p, q: preferences.dpo(p, q, 0.3, smoothing=0.1),
    "ipo": lambda p, q: preferences.ipo(p, q, 0.4),
    "orpo": lambda p, q: preferences.orpo(p, 0.2),
    "simpo": lambda p, q: preferences.simpo(p, 2.0, 0.5),
}


def slope(f, arguments, i, step=1e-5):
    """The derivative of an elementwise function with respect to argument i, by central differences in float64."""
    above, below = ([x + d * (n == i) for n, x in enumerate(arguments)] for d in (step, -step))
    return (f(*above) - f(*below)) / (2 * step)


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_and_gradients_are_the_papers(name, strict):
    rng = np.random.default_rng(0)
    low, high = (-3.0, -0.05) if name in preferences.MEANS else (-60.0, -20.0)
    values = [rng.uniform(low, high, B).astype(np.float32) for _ in range(4)]
    wide = [x.astype(np.float64) for x in values]

    def ours(chosen, rejected, reference_chosen, reference_rejected):
        return OURS[name](Pairs(chosen, rejected), Pairs(reference_chosen, reference_rejected))

    np.testing.assert_allclose(ours(*values), FORMULAS[name](*wide), rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda *x: ours(*x).sum(), argnums=(0, 1))(*map(jnp.asarray, values))
    for i, gradient in enumerate(gradients):
        np.testing.assert_allclose(gradient, slope(FORMULAS[name], wide, i), rtol=1e-5, atol=1e-5)
        assert np.abs(gradient).max() > 1e-2
    # Partner: the sides are not the same.
    other = ours(values[1], values[0], *values[2:])
    assert not np.allclose(other, FORMULAS[name](*wide), rtol=1e-2)


def test_kto_is_the_papers(strict):
    rng = np.random.default_rng(0)
    policy, reference = rng.uniform(-60, -20, (2, B)).astype(np.float32)
    good = (np.arange(B) % 3 == 0).astype(np.float32)
    mixed = rng.uniform(-1, 2, (2, B)).astype(np.float32)

    def z(p, q):
        return max(0.0, np.mean(p - q))

    def value(p):  # λ_y - v(x, y)
        r, z0 = p - reference.astype(np.float64), z(*mixed.astype(np.float64))
        v = np.where(good > 0, 1.5 * sigmoid(0.1 * (r - z0)), 0.7 * sigmoid(0.1 * (z0 - r)))
        return np.where(good > 0, 1.5, 0.7) - v

    def ours(p):
        return preferences.kto(p, reference, good, preferences.divergence(*mixed), 0.1, 1.5, 0.7)

    wide = policy.astype(np.float64)
    np.testing.assert_allclose(ours(jnp.asarray(policy)), value(wide), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda p: ours(p).sum())(jnp.asarray(policy))
    np.testing.assert_allclose(gradient, slope(value, [wide], 0), rtol=1e-5, atol=1e-5)
    assert preferences.divergence(*mixed[::-1]) == 0 < preferences.divergence(*mixed)
    # The estimate is not differentiated.
    moved = jax.grad(lambda p: preferences.kto(p, reference, good, preferences.divergence(p, reference), 0.1).sum())
    still = preferences.divergence(policy, reference)
    kept = jax.grad(lambda p: preferences.kto(p, reference, good, still, 0.1).sum())
    np.testing.assert_array_equal(moved(jnp.asarray(policy)), kept(jnp.asarray(policy)))


def test_certainty_is_finite():
    sides = Pairs(jnp.zeros(2), jnp.array([0.0, -1.0]))
    loss, gradient = jax.value_and_grad(lambda s: preferences.orpo(s, 0.1).sum())(sides)
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in gradient)


def summed(m, batch, learned, **options):
    return likelihood.log_probs(m.params, batch, shape=m.config, learned=learned, **options)


@pytest.mark.slow
def test_log_probs_of_rows(model):
    m = hf.load(model)
    batch = sft_test.batch_of([5, 12, 20, 7], [2, 9, 1, 4])
    every = jax.nn.log_softmax(decoder.forward(m.params, batch["tokens"], m.config))
    picked = np.take_along_axis(np.asarray(every), batch["targets"][..., None], axis=-1)[..., 0]
    for options in ({}, {"chunk": 8}, {"remat": "full"}):
        total_B, tokens_B = summed(m, batch, 9, **options)
        np.testing.assert_allclose(total_B, (picked * batch["weights"]).sum(1), rtol=1e-5)
        np.testing.assert_array_equal(tokens_B, [2, 9, 1, 4])
    assert not np.allclose(summed(m, batch, 4)[0], total_B, rtol=1e-2)


def test_masked_tokens_contribute_exactly_nothing(model):
    """Padding and targets without weight may be anything: not a bit of losses and gradients changes."""
    m = hf.load(model)
    batch = sft_test.batch_of([5, 12, 20, 7], [2, 9, 1, 4])

    @jax.jit
    @jax.value_and_grad
    def loss(params, batch):
        total_B, tokens_B = likelihood.log_probs(params, batch, shape=m.config, learned=9)
        sides = Pairs(*(total_B / tokens_B).reshape(-1, 2).T)
        return (
            preferences.simpo(sides, 2.0, 0.5) + preferences.dpo(Pairs(*total_B.reshape(-1, 2).T), sides, 0.1)
        ).sum()

    rng = np.random.default_rng(1)

    def anything(x, where):
        return np.where(where, rng.integers(0, m.config.vocab, x.shape, np.int32), x)

    free = batch["weights"] == 0
    changed = batch | {
        "tokens": anything(batch["tokens"], batch["segments"] == 0),
        "targets": anything(batch["targets"], free),
    }
    jax.tree.map(np.testing.assert_array_equal, loss(m.params, batch), loss(m.params, changed))
    learned = batch | {"targets": anything(batch["targets"], ~free)}
    assert loss(m.params, learned)[0] != loss(m.params, batch)[0]
