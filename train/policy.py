"""Losses of reinforcement learning on the log-probabilities of what was sampled.

Rewards are compared within a group, the answers to one prompt. A loss is Σ w·(-ρ̂ A + β KL) over the tokens of the
answers; what objectives differ in is the advantage A, whether the ratio ρ is clipped, and the weights w.

Shapes: B answers, N tokens of an answer, P prompts, G answers in a group, V vocabulary, D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig

Tree = Any
Batch = dict[str, jax.Array]


class Objective(NamedTuple):
    """What an objective is made of.

    Attributes:
      weigh: gives, for mask_BN, the weights of the tokens and of the answers, [B, N] and [B]; a loss is divided by the
        sum of the latter.
      deviation: divide the advantage by the standard deviation of the group's rewards.
      clipped: take min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) for ρ A.
    """

    weigh: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    deviation: bool = False
    clipped: bool = True


def per_answer(mask_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums over an answer, averaged over the answers: 1/B."""
    return mask_BN.astype(np.float32), mask_BN.any(axis=1).astype(np.float32)


def per_token(mask_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over all tokens: 1/Σ|o|."""
    return mask_BN.astype(np.float32), mask_BN.sum(axis=1, dtype=np.float32)


def per_own_length(mask_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over an answer, averaged over the answers: 1/(B |o|)."""
    weights_BN, answers_B = per_answer(mask_BN)
    return weights_BN / np.maximum(mask_BN.sum(axis=1, keepdims=True, dtype=np.float32), 1), answers_B


def per_longest(mask_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums over an answer divided by the most tokens it may have, averaged over the answers: 1/(B N)."""
    weights_BN, answers_B = per_answer(mask_BN)
    return weights_BN / np.float32(mask_BN.shape[1]), answers_B


OBJECTIVES = {
    # Σ_t p_learner/p_sampler · A on what was just sampled. Source: "LoRA Without Regret", 2025.
    "policy_gradient": Objective(per_answer, clipped=False),
    # Schulman et al. 2017, arXiv 1707.06347, with the group's mean in place of a learned value.
    "ppo": Objective(per_token),
    # Shao et al. 2024, arXiv 2402.03300.
    "grpo": Objective(per_own_length, deviation=True),
    # Liu et al. 2025, arXiv 2503.20783.
    "dr_grpo": Objective(per_longest),
}


def advantages(rewards_PG: np.ndarray, deviation: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """r - mean(r) within each group, and which groups tell anything.

    Args:
      rewards_PG: NaN where there is none: such an answer is not learned from, nor in its group's mean.
      deviation: divide by the standard deviation, of the sample as the variance with G - 1.

    Returns:
      advantages_PG, float32, 0 where nothing is to be learned; and equal_P, True for groups whose rewards are all
      equal, or in which fewer than two answers have one.
    """
    known_PG = ~np.isnan(rewards_PG)
    count_P = known_PG.sum(axis=1)
    zeroed_PG = np.where(known_PG, rewards_PG, 0.0).astype(np.float64)
    lowest_P = np.where(known_PG, rewards_PG, np.inf).min(axis=1)
    equal_P = np.where(known_PG, rewards_PG, -np.inf).max(axis=1) <= lowest_P
    mean_P = zeroed_PG.sum(axis=1) / np.maximum(count_P, 1)
    centred_PG = np.where(known_PG & ~equal_P[:, None], zeroed_PG - mean_P[:, None], 0.0)
    if deviation:
        variance_P = (centred_PG**2).sum(axis=1) / np.maximum(count_P - 1, 1)
        centred_PG /= np.sqrt(np.where(equal_P, 1.0, variance_P))[:, None]
    return centred_PG.astype(np.float32), equal_P


def loss(
    objective: Objective, log_probs_BN: jax.Array, batch: Batch, clip: float = 0.2, kl: float = 0.0
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Σ w·(-ρ̂ A + β k3), with ρ = p_learner/p_sampler and k3 = p_base/p_learner - log(p_base/p_learner) - 1.

    Args:
      objective: one of `OBJECTIVES`.
      log_probs_BN: of the learner; differentiated.
      batch: `sampled`, the sampler's log-probabilities [B, N]; `advantages` [B]; `weights` [B, N], 0 where a token
        does not count, and `shares` [B], from `Objective.weigh`; and, where kl is not 0, `base`, the
        log-probabilities [B, N] of what it is to stay close to.
      clip: ε.
      kl: β.

    Returns:
      The sum, what it is to be divided by, and more numbers over the tokens that count: the sums `counted` (1 each),
      `ratio`, `clipped`, `kl`, and the largest ρ and |log ρ|, `ratio_max` and `gap_max`.

    Source: k3, an unbiased estimate of KL(learner, base) that is never negative: Schulman 2020,
      http://joschu.net/blog/kl-approx.html.
    """
    weights_BN = batch["weights"]
    counts_BN = weights_BN > 0
    # What does not count must not reach an exponential: 0 · inf is not 0.
    log_ratio_BN = jnp.where(counts_BN, log_probs_BN - batch["sampled"], 0.0)
    ratio_BN = jnp.exp(log_ratio_BN)
    advantages_BN = jnp.broadcast_to(batch["advantages"][:, None], ratio_BN.shape)
    gain_BN, limited_BN = ratio_BN * advantages_BN, jnp.clip(ratio_BN, 1 - clip, 1 + clip) * advantages_BN
    terms_BN = -jnp.minimum(gain_BN, limited_BN) if objective.clipped else -gain_BN
    numbers = {
        "counted": counts_BN.sum(),
        "ratio": jnp.sum(ratio_BN * counts_BN),
        "ratio_max": jnp.max(ratio_BN, where=counts_BN, initial=0.0),
        "gap_max": jnp.max(jnp.abs(log_ratio_BN)),
        "clipped": jnp.sum(counts_BN & (limited_BN < gain_BN)) if objective.clipped else jnp.int32(0),
        "kl": jnp.float32(0),
    }
    if kl:
        behind_BN = jnp.where(counts_BN, batch["base"] - log_probs_BN, 0.0)
        k3_BN = jnp.expm1(behind_BN) - behind_BN
        terms_BN = terms_BN + kl * k3_BN
        numbers["kl"] = k3_BN.sum()
    return jnp.sum(weights_BN * terms_BN), jnp.sum(batch["shares"]), numbers


def log_probs(
    params: Tree,
    batch: Batch,
    *,
    shape: DecoderConfig,
    temperature: float = 1.0,
    remat: str = "none",
    chunk: int = 0,
    prefix: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(logits / temperature) at the tokens of the answers, and the entropy there.

    Args:
      params: of the decoder.
      batch: `tokens` [B, T], each row a prompt and its answer but for the last token; `begins` [B], the place whose
        prediction is the answer's first token; `answers` [B, N].
      shape: the decoder's.
      temperature: that of the sampler.
      remat: as `decoder.hidden`.
      chunk: tokens whose logits are held at once; 0 holds all.
      prefix: as `decoder.hidden`.

    Returns:
      log_probs_BN and entropy_BN in nats, float32; what is behind the end of an answer means nothing.
    """
    hidden_BTD = decoder.hidden(params, batch["tokens"], shape, remat=remat, prefix=prefix)
    B, N = batch["answers"].shape
    places_BN = jnp.minimum(batch["begins"][:, None] + jnp.arange(N), hidden_BTD.shape[1] - 1)
    hidden_BND = jnp.take_along_axis(hidden_BTD, places_BN[..., None], axis=1)

    def predicted(hidden_MD, answers_M):
        logits_MV = decoder.head(params, hidden_MD, shape) / temperature
        all_MV = jax.nn.log_softmax(logits_MV)
        # Not a gather: its gradient, a scatter, would need the logits' size once more.
        said_MV = jnp.arange(logits_MV.shape[-1]) == answers_M[:, None]
        entropy_M = -jnp.sum(jnp.exp(all_MV) * all_MV, axis=-1)
        return jnp.sum(jnp.where(said_MV, all_MV, 0.0), axis=-1), entropy_M

    rows = hidden_BND.reshape(B * N, -1), batch["answers"].reshape(B * N)
    if chunk:
        pad = [jnp.pad(x, [(0, -(B * N) % chunk)] + [(0, 0)] * (x.ndim - 1)) for x in rows]
        parts = [x.reshape(-1, chunk, *x.shape[1:]) for x in pad]
        step = jax.checkpoint(predicted, prevent_cse=False)
        _, found = jax.lax.scan(lambda carry, xs: (carry, step(*xs)), None, parts)
        found = [x.reshape(-1)[: B * N] for x in found]
    else:
        found = predicted(*rows)
    return tuple(x.reshape(B, N) for x in found)
