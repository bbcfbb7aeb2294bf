"""Losses of preference learning, as functions of the log-probabilities of whole answers.

An answer's log-probability is Σ_t log p(y_t | x, y_<t), or, for the losses in `MEANS`, the mean over its tokens. The
reference is the model before training. Rewards are what a loss takes an answer to be worth, and margins their
difference within a pair.

Shapes: B pairs, or judged answers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MEANS = ("ipo", "orpo", "simpo")  # take means over tokens, the others sums
FREE = ("orpo", "simpo")  # need no reference
UNPAIRED = ("kto",)
LOSSES = ("dpo", "ipo", "kto", "orpo", "simpo")
CERTAIN = -1e-6  # the largest log-probability whose odds are told from infinity in float32


class Pairs(NamedTuple):
    """Log-probabilities of the better and the worse answers, [B] each."""

    chosen_B: jax.Array
    rejected_B: jax.Array


def dpo(policy: Pairs, reference: Pairs, beta: float, smoothing: float = 0.0) -> jax.Array:
    """-(1 - ε) log σ(h) - ε log σ(-h) with h = β (log π(y⁺)/π₀(y⁺) - log π(y⁻)/π₀(y⁻)).

    Args:
      policy: of the model in training.
      reference: of the model before.
      beta: β, how strongly the policy is held to the reference.
      smoothing: ε, the share of pairs whose label is taken to be wrong.

    Returns:
      The losses, [B].

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; ε as in Mitchell's note on conservative DPO.
    """
    h_B = beta * ((policy.chosen_B - reference.chosen_B) - (policy.rejected_B - reference.rejected_B))
    return -(1 - smoothing) * jax.nn.log_sigmoid(h_B) - smoothing * jax.nn.log_sigmoid(-h_B)


def ipo(policy: Pairs, reference: Pairs, beta: float) -> jax.Array:
    """(h - 1/2β)² with h = log π(y⁺)/π₀(y⁺) - log π(y⁻)/π₀(y⁻), of means over tokens.

    Args:
      policy: means, of the model in training.
      reference: means, of the model before.
      beta: β, the paper's τ.

    Returns:
      The losses, [B].

    Source: Azar et al. 2023, arXiv 2310.12036, equation 17. That means over tokens are meant is what its authors told
    TRL's; of sums, 1/2β would be reached sooner by longer answers.
    """
    h_B = (policy.chosen_B - reference.chosen_B) - (policy.rejected_B - reference.rejected_B)
    return jnp.square(h_B - 1 / (2 * beta))


def kto(
    policy_B: jax.Array,
    reference_B: jax.Array,
    good_B: jax.Array,
    divergence: jax.Array,
    beta: float,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> jax.Array:
    """λ⁺ (1 - σ(β (r - z))) of a good answer, λ⁻ (1 - σ(β (z - r))) of a bad one, with r = log π(y)/π₀(y).

    Args:
      policy_B: of the model in training.
      reference_B: of the model before.
      good_B: 1 where an answer is good, 0 where it is bad.
      divergence: z, an estimate of the policy's divergence from the reference; it is not differentiated.
      beta: β, how fast a gain loses its charm.
      desirable: λ⁺, what good answers weigh.
      undesirable: λ⁻, what bad ones do.

    Returns:
      The losses, [B].

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8.
    """
    gain_B = beta * (policy_B - reference_B - jax.lax.stop_gradient(divergence))
    good_B = good_B > 0
    weight_B = jnp.where(good_B, desirable, undesirable)
    return weight_B * (1 - jax.nn.sigmoid(jnp.where(good_B, gain_B, -gain_B)))


def divergence(policy_B: jax.Array, reference_B: jax.Array) -> jax.Array:
    """KTO's z: max(0, mean log π(y')/π₀(y')) over answers y' to other questions than those they are put behind."""
    return jnp.maximum(jnp.mean(policy_B - reference_B), 0.0)


def orpo(policy: Pairs, beta: float) -> jax.Array:
    """-log p(y⁺) - β log σ(log odds(y⁺) - log odds(y⁻)) with odds = p/(1 - p), of means over tokens.

    Args:
      policy: means, of the model in training.
      beta: β, what the odds weigh beside the likelihood of the better answer: the paper's λ.

    Returns:
      The losses, [B].

    Source: Hong et al. 2024, arXiv 2403.07691, equations 4 to 7.
    """
    return -policy.chosen_B - beta * jax.nn.log_sigmoid(_log_odds(policy.chosen_B) - _log_odds(policy.rejected_B))


def simpo(policy: Pairs, beta: float, margin: float) -> jax.Array:
    """-log σ(β log p(y⁺) - β log p(y⁻) - γ), of means over tokens.

    Args:
      policy: means, of the model in training.
      beta: β, what a nat per token is worth.
      margin: γ, by how much the better answer's reward is to be larger.

    Returns:
      The losses, [B].

    Source: Meng et al. 2024, arXiv 2405.14734, equation 6.
    """
    return -jax.nn.log_sigmoid(beta * (policy.chosen_B - policy.rejected_B) - margin)


def _log_odds(log_p_B: jax.Array) -> jax.Array:
    log_p_B = jnp.minimum(log_p_B, CERTAIN)
    return log_p_B - jnp.log(-jnp.expm1(log_p_B))
