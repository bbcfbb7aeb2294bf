"""Reinforcement learning: `python -m train.rl --config=configs/rl.py`.

Each step draws answers to a few prompts from the policy as it is, has them judged, and makes one or several updates
with what they were worth, compared within the answers to one prompt. Sampler and learner are one process over one copy
of the base. The same command, run again, goes on from the last checkpoint. `train/rl_settings.py` has the settings.
"""

import collections
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, config_flags

from lora_jax.data import chat
from lora_jax.models import decoder
from train import adapter, hosts, judge, launch, loop, methods, placing, policy, rl_settings, rollout
from train import config as settings
from train.run import Evaluation, run
from train.start import begin
from train.update import make_update

SAMPLES = 5  # answers kept for the report

Tree = Any
Config = settings.Config


def main(_: list[str]) -> None:
    """Reads the command line and trains."""
    config, name = launch.settings(CONFIG)
    train(config, Path(config.run or f"runs/{name}"), name)


@placing.on_mesh
def train(config: Config, folder: Path, name: str) -> None:
    """Trains, evaluates before, during and after, and reports.

    Args:
      config: from `train/rl_settings.py`.
      folder: of the run; if it has checkpoints, the run goes on.
      name: of the experiment, for the report.

    Raises:
      ValueError, OSError, ArithmeticError: with one line that says what to change.
    """
    rl_settings.check(config)
    model = methods.attending(config, methods.load(config, jnp.dtype(config.dtype or loop.base_dtype())))
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(folder))
    prompts = rollout.prepare(config, format, methods.room(config, model.config))

    asked = rollout.padded([prompt.ids for prompt in prompts.training[: config.sampler.prompts]], prompts.width)
    forward = functools.partial(decoder.hidden, config=model.config)
    begun = begin(config, model, forward, asked)
    base, trainable, gather, tree = begun.base, begun.trainable, begun.gather, methods.runner(config, model)
    about = f"{config.policy.objective} for {begun.about}"
    print(about)
    before = base
    if config.policy.kl and config.adapter:
        before = tree(gather(jax.tree.map(jnp.copy, trainable)), base)
    elif config.policy.kl and base is None:
        before = jax.tree.map(jnp.copy, model.params)  # what is trained takes the memory of the other

    # The optimizer counts updates, of which a step makes several.
    several = rl_settings.updates(config)
    counted = ConfigDict({**config.to_dict(), "steps": several * config.steps})
    rate = settings.schedule(counted, methods.rate(config, model.config.dim))
    tx = methods.optimizer(counted, trainable, rate)
    rows = config.sampler.rows or config.sampler.prompts * config.sampler.samples
    speak = methods.applied(decoder.forward_with_cache)
    sampler = rollout.Sampler(
        speak, model.config, format, prompts.width, config.sampler.max_new, config.sampler.temperature, rows
    )
    log_probs = methods.applied(
        functools.partial(
            policy.log_probs,
            shape=model.config,
            temperature=config.sampler.temperature,
            remat=config.remat,
            chunk=config.loss_chunk,
        )
    )
    reward = config.reward
    with judge.Judges(reward.functions, reward.limit, reward.workers) as judges:
        optimizer = tx.init(trainable)
        places = placing.kept(trainable, optimizer)
        update = make_step(config, prompts.width, tree, base, before, log_probs, tx, sampler, judges, places, gather)

        def evaluate(trainable: Tree) -> Evaluation:
            said = sampler(tree(gather(trainable), base), prompts.heldout, jax.random.key(config.seed))
            scores = judged(judges, said.texts, [prompt.entry for prompt in prompts.heldout])
            values = [score.value for score in scores if not score.failure]
            numbers = {"heldout_reward": float(np.mean(values)), "heldout_length": float(said.counts_B.mean())}
            return numbers, [
                {"question": prompt.question, "expected": prompt.entry["answer"], "said": text}
                for prompt, text in list(zip(prompts.heldout, said.texts, strict=True))[:SAMPLES]
            ]

        run(
            config,
            folder,
            name,
            about=about,
            identity=begun.identity(model, prompts.digest),
            trainable=trainable,
            optimizer=optimizer,
            update=update,
            batches=rollout.iterate(prompts.training, config.sampler.prompts, config.seed),
            evaluate=evaluate,
            rate=lambda step: rate(several * step),
            export=adapter.writer(config, model, base),
        )


def make_step(
    config: Config,
    width: int,
    tree: Callable,
    base: Tree,
    before: Tree,
    log_probs: Callable,
    tx: Any,
    sampler: rollout.Sampler,
    judges: judge.Judges,
    places: Any = None,
    gather: placing.Gather = lambda trainable: trainable,
) -> Callable[[Tree, Tree, Sequence[rollout.Prompt], jax.Array], tuple[Tree, Tree, dict[str, float]]]:
    """Makes `update(trainable, optimizer, prompts, key)`: draw, judge, learn.

    Args:
      config: of the run.
      width: tokens of the widest prompt.
      tree: `tree(trainable, base, key)` gives what the model runs with.
      base: its frozen part.
      before: the model as it was before training, to which `config.policy.kl` keeps the policy close.
      log_probs: `policy.log_probs`, as a function of the tree and a batch.
      tx: the optimizer.
      sampler: draws answers.
      judges: give rewards.
      places, gather: as for `make_update`.

    Returns:
      A function as `run` takes it. Given the same arguments, and rewards that are the same, it does the same.
    """
    objective = policy.OBJECTIVES[config.policy.objective]

    def loss(now: Tree, batch: policy.Batch) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        found_BN, entropy_BN = log_probs(now, batch)
        total, count, numbers = policy.loss(objective, found_BN, batch, config.policy.clip, config.policy.kl)
        return total, count, numbers | {"entropy": jnp.sum(entropy_BN, where=batch["weights"] > 0)}

    learn = make_update(loss, tree, tx, config.accumulate, places, gather)
    reference = jax.jit(lambda params, batch: log_probs(params, batch)[0])
    G, size = config.sampler.samples, config.batch_size

    def update(trainable: Tree, optimizer: Tree, prompts: Sequence[rollout.Prompt], key: jax.Array) -> Any:
        clock = [time.perf_counter()]
        drawing, shuffling = jax.random.split(key)
        asked = [prompt for prompt in prompts for _ in range(G)]
        said = sampler(tree(gather(trainable), base), asked, drawing)
        clock.append(time.perf_counter())
        scores = judged(judges, said.texts, [prompt.entry for prompt in asked])
        rewards_PG = np.array([score.value for score in scores]).reshape(-1, G)
        advantages_PG, equal_P = policy.advantages(rewards_PG, objective.deviation)
        clock.append(time.perf_counter())
        batch = rollout.learner_batch(asked, said, width) | {"advantages": advantages_PG.reshape(-1)}
        learned_B = ~np.isnan(rewards_PG).reshape(-1) & ~np.repeat(equal_P, G)
        mask_BN = learned_B[:, None] & (np.arange(said.answers_BN.shape[1]) < said.counts_B[:, None])
        if config.policy.kl:
            part = size // config.accumulate
            parts = [{name: x[i : i + part] for name, x in batch.items()} for i in range(0, len(asked), part)]
            batch["base"] = np.concatenate([hosts.whole(reference(before, rows)) for rows in parts])
        made = []
        for epoch in range(config.policy.epochs):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(shuffling, epoch), len(asked)))
            for start in range(0, len(order), size):
                at = order[start : start + size]
                weights, shares = objective.weigh(mask_BN[at])
                if not shares.any():  # nothing to learn: an update would only follow the optimizer's momentum
                    continue
                rows = {name: x[at] for name, x in batch.items()} | {"weights": weights, "shares": shares}
                trainable, optimizer, out = learn(trainable, optimizer, base, rows, shuffling)
                made.append({name: float(value) for name, value in out.items()})
        clock.append(time.perf_counter())
        for failure, count in collections.Counter(score.failure for score in scores if score.failure).items():
            print(f"{count} of {len(scores)} rewards failed, and their answers are left out: {failure}", flush=True)
        numbers = {
            "reward": float(np.nanmean(rewards_PG)),
            "length": float(said.counts_B.mean()),
            "ended": float(said.ended_B.mean()),
            "equal_groups": float(equal_P.mean()),
            "failed_rewards": sum(bool(score.failure) for score in scores),
            "tokens": int(said.counts_B.sum()) + sum(len(prompt.ids) for prompt in asked),
            **_learned(made),
        }
        for phase, since, until in zip(("sampling", "judging", "learning"), clock, clock[1:], strict=False):
            numbers[f"{phase}_seconds"] = until - since
        return trainable, optimizer, numbers

    return update


def judged(judges: judge.Judges, texts: Sequence[str], entries: Sequence[dict[str, Any]]) -> list[judge.Score]:
    """The rewards; of several hosts the first one judges: what takes too long on one need not on another."""
    return [judge.Score(*score) for score in hosts.told(lambda: judges(texts, entries))]


def _learned(made: list[dict[str, float]]) -> dict[str, float]:
    """The numbers of a step's updates as one: the mean over these of what is a mean over tokens; maxima."""
    if not made:
        return {"loss": 0.0, "gradient_norm": 0.0}
    numbers = {name: np.mean([out[name] for out in made]) for name in ("loss", "gradient_norm")}
    for name in ("ratio", "clipped", "kl", "entropy"):
        numbers[name] = np.mean([out[name] / out["counted"] for out in made])
    # Before the first update learner and sampler are one policy: what they differ by there is rounding.
    return numbers | {"ratio_max": max(out["ratio_max"] for out in made), "sampler_gap": made[0]["gap_max"]}


if __name__ == "__main__":  # only then: other scripts, which have a flag of this name, run this one
    CONFIG = config_flags.DEFINE_config_file("config", None, "a file such as configs/rl.py")
    launch.run(main, rl_settings.rl)
