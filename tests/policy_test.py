"""The losses of reinforcement learning against their formulas in float64, written out answer by answer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models import decoder, generate
from lora_jax.models.config import DecoderConfig
from train import policy

G, P, N = 4, 3, 7
B = P * G
pytestmark = pytest.mark.usefixtures("quick_module")


def rewards(seed=0):
    """Two groups that tell something, one of them with a reward that failed, and one that does not."""
    r = np.random.default_rng(seed).normal(size=(P, G))
    r[1] = 0.5
    r[2, 1] = np.nan
    return r


def answers(name, seed=0, spread=0.4):
    """Log-probabilities of learner, sampler and base; lengths from 1 to N, with nonsense behind the end."""
    rng = np.random.default_rng(seed)
    learner = -rng.exponential(1.0, (B, N))
    sampled, base = (learner + spread * rng.normal(size=(B, N)) for _ in range(2))
    lengths = rng.integers(1, N + 1, B)
    mask = np.arange(N) < lengths[:, None]
    advantage, equal = policy.advantages(rewards(), policy.OBJECTIVES[name].deviation)
    counted = mask & ~np.isnan(rewards()).reshape(B, 1) & ~np.repeat(equal, G)[:, None]
    batch = {
        "sampled": np.where(mask, sampled, np.nan),
        "base": np.where(mask, base, np.inf),
        "advantages": advantage.reshape(B),
    }
    batch["weights"], batch["shares"] = policy.OBJECTIVES[name].weigh(counted)
    return np.where(mask, learner, -np.inf), {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}, counted


def written_out(name, learner, batch, counted, clip, kl):
    """The loss as the papers have it, and its gradient, in Python's floats."""
    total, gradient = 0.0, np.zeros((B, N))
    r = rewards()
    kept = [b for b in range(B) if counted[b].any()]
    for b in kept:
        group = [x for x in r[b // G] if not math.isnan(x)]
        mean = sum(group) / len(group)
        advantage = r[b // G, b % G] - mean
        if name == "grpo":
            advantage /= math.sqrt(sum((x - mean) ** 2 for x in group) / (len(group) - 1))
        length = int(counted[b].sum())
        share = {
            "policy_gradient": 1 / len(kept),
            "ppo": 1 / int(counted.sum()),
            "grpo": 1 / (len(kept) * length),
            "dr_grpo": 1 / (len(kept) * N),
        }[name]
        for t in range(length):
            p = float(learner[b, t])
            ratio = math.exp(p - float(batch["sampled"][b, t]))
            gain, slope = ratio * advantage, ratio * advantage
            if name != "policy_gradient":
                limited = min(max(ratio, 1 - clip), 1 + clip) * advantage
                if limited < gain:
                    gain, slope = limited, 0.0
            behind = float(batch["base"][b, t]) - p
            total += share * (-gain + kl * (math.exp(behind) - behind - 1))
            gradient[b, t] = share * (-slope + kl * (1 - math.exp(behind)))
    return total, gradient


def mean(name, learner, batch, **options):
    """The loss as `make_update` has it: divided, and what more there is."""
    total, count, numbers = policy.loss(policy.OBJECTIVES[name], learner, batch, **options)
    return total / count, numbers


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("name", policy.OBJECTIVES)
def test_loss_and_gradient_are_the_formulas(name, kl):
    learner, batch, counted = answers(name)
    f = functools.partial(mean, name, clip=0.2, kl=kl)
    (value, numbers), gradient = jax.value_and_grad(f, has_aux=True)(jnp.asarray(learner, jnp.float32), batch)
    expected, slope = written_out(name, learner, batch, counted, 0.2, kl)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(gradient)[~counted] == 0)  # exactly
    assert np.any(np.asarray(gradient)[counted] != 0)
    ratios = np.exp(learner - np.asarray(batch["sampled"], np.float64))[counted]
    np.testing.assert_allclose(numbers["ratio"] / numbers["counted"], ratios.mean(), rtol=1e-5)
    np.testing.assert_allclose(numbers["ratio_max"], ratios.max(), rtol=1e-5)
    np.testing.assert_allclose(numbers["gap_max"], np.abs(np.log(ratios)).max(), rtol=1e-4)
    assert (numbers["kl"] > 0) == (kl > 0)
    assert (numbers["clipped"] > 0) == (name != "policy_gradient")
    # Partners: another clip, another KL, and another objective are another loss.
    if name != "policy_gradient":
        assert abs(f(jnp.asarray(learner, jnp.float32), batch, clip=0.05)[0] - value) > 1e-4
    assert abs(f(jnp.asarray(learner, jnp.float32), batch, kl=kl + 0.1)[0] - value) > 1e-4
    assert all(abs(written_out(o, learner, batch, counted, 0.2, kl)[0] - expected) > 1e-4 for o in _others(name))


def _others(name):
    return [other for other in policy.OBJECTIVES if other != name]


def test_advantages_of_a_group():
    r = np.array([[0.0, 1, 1, 0], [0.3] * 4, [np.nan, 1, 0, 0.5], [np.nan] * 4, [np.nan, np.nan, np.nan, 1]])
    centred, equal = policy.advantages(r)
    np.testing.assert_allclose(centred[0], [-0.5, 0.5, 0.5, -0.5])
    np.testing.assert_allclose(centred[2], [0, 0.5, -0.5, 0], atol=1e-7)
    assert list(equal) == [False, True, False, True, True]
    assert not np.any(centred[equal])
    scaled, _ = policy.advantages(r, deviation=True)
    np.testing.assert_allclose(scaled[0], centred[0] / np.std(r[0], ddof=1), rtol=1e-6)
    np.testing.assert_allclose(scaled[2], centred[2] / 0.5, rtol=1e-6)
    # Adding a constant to a group's rewards changes nothing; scaling them changes nothing once divided by it.
    np.testing.assert_allclose(policy.advantages(r + 7)[0], centred, atol=1e-6)
    np.testing.assert_allclose(policy.advantages(3 * r, deviation=True)[0], scaled, rtol=1e-6)
    assert not np.allclose(policy.advantages(3 * r)[0], centred)


@pytest.mark.parametrize("name", policy.OBJECTIVES)
def test_parts_of_a_batch_add_up(name):
    learner, batch, _ = answers(name)
    f = functools.partial(policy.loss, policy.OBJECTIVES[name], kl=0.1)
    whole = f(jnp.asarray(learner, jnp.float32), batch)[:2]
    parts = [
        f(jnp.asarray(learner[rows], jnp.float32), {k: v[rows] for k, v in batch.items()})[:2]
        for rows in (slice(0, 5), slice(5, B))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


def test_nothing_to_learn_gives_nothing():
    for objective in policy.OBJECTIVES.values():
        assert not any(x.any() for x in objective.weigh(np.zeros((2, 3), bool)))


@pytest.fixture(scope="module")
def model():
    config = DecoderConfig("llama", 64, 32, 48, 2, 4, 2, 8, context=64)
    params = jax.tree.map(lambda x: 1.5 * x, decoder.init(jax.random.key(3), config))
    sites = lora.trace(decoder.forward, params, np.zeros((1, 8), np.int32), config)
    adapters = lora.init(jax.random.key(0), params, sites, lora.Spec(rank=4))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)
    return config, lora.attach(params, adapters)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [0, 5])
def test_learner_and_sampler_agree(model, temperature, chunk):
    """The ratio is 1 before the first update: what was drawn, and with which probability, is what the learner finds."""
    config, tree = model
    lengths = np.array([3, 9, 6])
    prompts = np.random.default_rng(0).integers(3, 64, (3, 9))
    speak = lora.lift(decoder.forward_with_cache)
    said = generate.sample(
        tree, config, prompts, lengths, N, tuple(range(5, 25)), jax.random.key(2), temperature, speak
    )
    counts, tokens = np.asarray(said.counts_B), np.zeros((3, 9 + N - 1), np.int32)
    assert min(counts) < N
    for b in range(3):
        text = [*prompts[b, : lengths[b]], *np.asarray(said.tokens_BN)[b, : counts[b]]][:-1]
        tokens[b, : len(text)] = text
    batch = {"tokens": tokens, "begins": lengths - 1, "answers": np.asarray(said.tokens_BN)}
    f = lora.lift(functools.partial(policy.log_probs, shape=config, chunk=chunk))
    found, entropy = f(tree, batch, temperature=temperature)
    mask = np.arange(N) < counts[:, None]
    assert np.ptp(np.asarray(said.log_probs_BN)[mask]) > 0.5
    np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(said.log_probs_BN)[mask], rtol=1e-4, atol=1e-5)
    # The base without its adapters, and another temperature, find other probabilities.
    for other in (f(tree.params, batch, temperature=temperature), f(tree, batch, temperature=2.0)):
        assert np.abs(np.asarray(other[0]) - np.asarray(found))[mask].max() > 0.05
    logits = np.asarray(lora.lift(decoder.forward)(tree, tokens[:1], config), np.float64)[0, 2] / temperature
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(entropy[0, 0], -(p * np.log(p)).sum(), rtol=1e-4)
