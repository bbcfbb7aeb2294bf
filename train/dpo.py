"""Preference learning: `python -m train.dpo --config=configs/dpo.py --config.loss=simpo`.

Trains on pairs of a better and a worse answer, or on answers that were judged good or bad, with the losses of
`train/preferences.py`: DPO, IPO, KTO, ORPO, SimPO. The reference is the base with the adapters off: there is no second
model. Only full fine-tuning, and LoftQ, whose base is no longer the model, keep the model they began with, and a run
that goes on with an adapter (`config.adapter`) that adapter; with `--config.reference=precomputed` not even these, for
what the reference says is computed once, before the first step.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_flags

from lora_jax.data import chat
from train import (
    adapter,
    dpo_settings,
    hosts,
    launch,
    likelihood,
    loop,
    methods,
    objective,
    pairs,
    placing,
    preferences,
)
from train import config as settings
from train.preferences import Pairs
from train.run import Evaluation, run
from train.start import begin
from train.update import make_update

BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
RATE = 0.1  # of the method's learning rate in supervised fine-tuning
REFERENCE = "reference.json"

Tree = Any


def main(_: list[str]) -> None:
    """Reads the command line and trains."""
    config, name = launch.settings(CONFIG)
    train(config, Path(config.run or f"runs/{name}"), name)


@placing.on_mesh
def train(config: settings.Config, folder: Path, name: str) -> None:
    """Trains, evaluates before, during and after, and reports.

    Args:
      config: from `train/dpo_settings.py`.
      folder: of the run; if it has checkpoints, the run goes on.
      name: of the experiment, for the report.

    Raises:
      ValueError, OSError, ArithmeticError: with one line that says what to change.
    """
    dpo_settings.check(config)
    model = methods.attending(config, methods.load(config, jnp.dtype(config.dtype or loop.base_dtype())))
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(folder))
    unpaired = config.loss in preferences.UNPAIRED
    data = pairs.prepare(config, format, methods.room(config, model.config), unpaired)
    options = {"shape": model.config, "learned": data.learned, "remat": config.remat, "chunk": config.loss_chunk}
    log_probs = methods.applied(functools.partial(likelihood.log_probs, **options))

    # What is trained, and with the base, `tree(trainable, base)`, what the model runs with.
    nll = functools.partial(objective.negative_log_likelihood, **options)
    begun = begin(config, model, nll, pairs.batch(data.items[:1], data.length))
    base, trainable, gather, tree = begun.base, begun.trainable, begun.gather, methods.runner(config, model)
    print(begun.about)
    identity = begun.identity(model, data.digest, f" by {config.loss}")

    # The reference: the model as training begins. With new adapters that is the base without them.
    before = tree(gather(jax.tree.map(jnp.copy, trainable)), base) if config.adapter else model.params
    # What the reference makes of held-out answers is computed once; of the others, only if that is asked for.
    if config.loss not in preferences.FREE:
        known = Known(jax.jit(log_probs), before, data.length, config.batch_size)
        data = data._replace(heldout=known.of(data.heldout))
        if config.reference == "precomputed":
            folder.mkdir(parents=True, exist_ok=True)
            data = data._replace(items=known.stored(data, folder / REFERENCE, identity))
    needed = config.loss not in preferences.FREE and config.reference == "base"
    original = before if needed and base is not before else None

    def both(trainable: Tree, bases: tuple[Tree, Tree], key: jax.Array | None = None) -> tuple[Tree, Tree]:
        base, original = bases
        return tree(trainable, base, key), base if original is None else original

    rate = settings.schedule(config, config.optim.lr or RATE * methods.rate(config, model.config.dim))
    tx = methods.optimizer(config, trainable, rate)
    judge, optimizer = judged(config, log_probs), tx.init(trainable)
    step = make_update(summed(judge), both, tx, config.accumulate, placing.kept(trainable, optimizer), gather)
    measure = jax.jit(judge)
    write = pairs.crossed if unpaired else pairs.batch

    def update(trainable: Tree, optimizer: Tree, batch: Any, key: jax.Array) -> Any:
        return step(trainable, optimizer, (base, original), batch, key)

    def evaluate(trainable: Tree) -> Evaluation:
        now = both(gather(trainable), (base, original))
        found = []
        for n, block in pairs.blocks(data.heldout, data.length, config.batch_size, write):
            parts = map(np.asarray, hosts.whole(measure(now, block)))
            found.append(Judged(*(x[: len(x) * n // config.batch_size] for x in parts)))
        said = Judged(*map(np.concatenate, zip(*found, strict=True)))
        good = np.array([good for item in data.heldout for good in item.good])
        return {
            "heldout_loss": float(said.loss.mean()),
            "preference_accuracy": ordered(said.likelihood, good, unpaired),
            "reward_accuracy": ordered(said.reward, good, unpaired),
            "reward_margin": float(said.reward[good].mean() - said.reward[~good].mean()),
        }, []

    # Everything is checked; from here on the run writes.
    run(
        config,
        folder,
        name,
        about=begun.about,
        identity=identity,
        trainable=trainable,
        optimizer=optimizer,
        update=update,
        batches=pairs.batches(data, config.batch_size, config.seed, write),
        evaluate=evaluate,
        rate=rate,
        export=adapter.writer(config, model, base),
    )


class Judged(NamedTuple):
    """What a loss makes of a batch.

    Args:
      loss: of every pair, or judged answer.
      reward: of every answer: what the loss takes it to be worth.
      likelihood: of every answer: its log-probability, or for some losses the mean over its tokens.
      divergence: KTO's z, the same for every answer; 0 for the other losses.
    """

    loss: Any
    reward: Any
    likelihood: Any
    divergence: Any


def judged(config: settings.Config, log_probs: Callable) -> Callable[[tuple[Tree, Tree], Any], Judged]:
    """Makes a function of the model in training, the reference and a batch.

    Args:
      config: of the run.
      log_probs: `likelihood.log_probs` of a tree and a batch.
    """
    beta, name = config.beta or BETA[config.loss], config.loss

    def judge(trees: tuple[Tree, Tree], batch: Any) -> Judged:
        policy, reference = trees
        own, tokens = log_probs(policy, batch)
        theirs, divergence = jnp.zeros_like(own), jnp.zeros_like(own)
        if name not in preferences.FREE:
            theirs = batch["reference"] if "reference" in batch else log_probs(reference, batch)[0]
        if name in preferences.MEANS:
            own, theirs = own / tokens, theirs / tokens
        reward = beta * (own - theirs)
        if name == "kto":
            crossed = (log_probs(tree, batch["crossed"])[0] for tree in trees)
            z = jax.lax.stop_gradient(preferences.divergence(*crossed))
            weights = config.desirable, config.undesirable
            loss = preferences.kto(own, theirs, batch["good"], z, beta, *weights)
            return Judged(loss, reward, own, divergence + z)
        ours, reference_ = (Pairs(x[::2], x[1::2]) for x in (own, theirs))
        loss = {
            "dpo": lambda: preferences.dpo(ours, reference_, beta, config.smoothing),
            "ipo": lambda: preferences.ipo(ours, reference_, beta),
            "orpo": lambda: preferences.orpo(ours, beta),
            "simpo": lambda: preferences.simpo(ours, beta, config.margin),
        }[name]()
        return Judged(loss, reward, own, divergence)

    return judge


def summed(judge: Callable) -> Callable[..., tuple[jax.Array, int, dict[str, jax.Array]]]:
    """What `make_update` takes: the loss's sum, over how many, and sums of margins and of answers in order."""

    def loss(trees: tuple[Tree, Tree], batch: Any) -> tuple[jax.Array, int, dict[str, jax.Array]]:
        found = judge(trees, batch)
        if len(found.loss) < len(found.reward):
            margin = found.reward[::2] - found.reward[1::2]
            more = {"chosen_reward": found.reward[::2].sum(), "rejected_reward": found.reward[1::2].sum()}
        else:
            margin = (found.reward - found.divergence) * jnp.where(batch["good"] > 0, 1, -1)
            more = {"divergence": found.divergence.sum()}
        sums = {"margin": margin.sum(), "accuracy": (margin > 0).sum() + 0.5 * (margin == 0).sum()}
        return found.loss.sum(), len(found.loss), sums | more

    return loss


def ordered(values: np.ndarray, good: np.ndarray, unpaired: bool) -> float:
    """How often a good answer has more than a bad one: of its pair, or of all; as much counts half."""
    better, worse = values[good], values[~good]
    if unpaired:
        better, worse = better[:, None], worse[None, :]
    return float(np.mean((better > worse) + 0.5 * (better == worse)))


class Known:
    """What the reference makes of answers, computed once.

    Args:
      log_probs: `likelihood.log_probs` of a tree and a batch, compiled.
      params: what the reference runs with.
      length: places in a row.
      size: items in a batch.
    """

    def __init__(self, log_probs: Callable, params: Tree, length: int, size: int):
        self.log_probs, self.params, self.length, self.size = log_probs, params, length, size

    def of(self, items: list[pairs.Item]) -> list[pairs.Item]:
        """The items with it."""
        found = []
        for n, block in pairs.blocks(items, self.length, self.size):
            rows = np.asarray(hosts.whole(self.log_probs(self.params, block)[0])).reshape(self.size, -1)[:n]
            found += [tuple(map(float, row)) for row in rows]
        return [item._replace(reference=row) for item, row in zip(items, found, strict=True)]

    def stored(self, data: pairs.Data, path: Path, identity: dict[str, Any]) -> list[pairs.Item]:
        """The items to train on with it, from a file where that was written for the same run."""
        try:
            saved = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            saved = {}
        if saved.get("of") != identity:
            items = self.of(data.items)
            loop.write(path, json.dumps({"of": identity, "log_probs": [item.reference for item in items]}) + "\n")
            return items
        return [x._replace(reference=tuple(row)) for x, row in zip(data.items, saved["log_probs"], strict=True)]


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "a file such as configs/dpo.py")
    launch.run(main, dpo_settings.dpo)
