"""A trainer without a model: three numbers that follow targets, with faults where a test wants them."""

import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import config as settings
from train import run
from train.update import make_update


def configured(**changes):
    config = settings.sft()
    config.optim.lr, config.eval.answers = 0.1, 0
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        setattr(config[group] if group else config, key, value)
    return config


def target(i):
    """What the i-th batch pulls towards."""
    return jnp.asarray(np.random.default_rng(i).normal(size=3) + 1, jnp.float32)


class Batches:
    """Counts; the place is the number of the next batch."""

    def __init__(self, added, without, seconds):
        self.next, self.added, self.without, self.seconds = 0, added, without, seconds

    def __next__(self):
        time.sleep(self.seconds)
        while self.next in self.without:
            self.next += 1
        i, self.next = self.next, self.next + 1
        # A loss of (w - target)² + added · sum(w): what is added shows in the loss and in the gradient.
        return {"target": target(i)[None], "added": np.full((1, 1), self.added.get(i, 0.0), np.float32), "seen": [i]}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, state):
        self.next = state["next"]


def train(
    config,
    folder,
    evaluations=None,
    fail_at=None,
    added=None,
    without=(),
    seconds=0.0,
    signal_at=(0, 0),
    stuck=False,
    export=None,
):
    """Trains; `evaluations[step]` is the held-out loss, the update of `fail_at` raises, `stuck` has no gradient.

    `signal_at` is a step and the signal that is sent within it; in step 0 the first evaluation of the run is.
    """
    tx = optax.adam(config.optim.lr)

    def loss(tree, batch):
        w = jax.lax.stop_gradient(tree["w"]) if stuck else tree["w"]
        value = jnp.mean((w - batch["target"]) ** 2) + batch["added"].sum() * (1 + 0 * w.sum())
        return value, jnp.float32(1), {"seen": batch["seen"].sum().astype(jnp.float32)}

    step = make_update(loss, lambda tree, base, key: tree, tx)
    count = [0]

    def update(w, state, batch, key):
        seen = batch["seen"][0]
        if seen + 1 == fail_at:
            raise ZeroDivisionError
        if seen + 1 == signal_at[0]:
            os.kill(os.getpid(), signal_at[1])
        batch = {name: np.asarray(value) for name, value in batch.items()}
        w, state, numbers = step(w, state, None, batch, key)
        return w, state, numbers | {"tokens": 3, "drawn": jax.random.uniform(key)}

    def evaluate(w):
        count[0] += 1
        if not done and count[0] == 1 and signal_at[0] == 0:
            os.kill(os.getpid(), signal_at[1])
        now = evaluations[count[0] - 1 + done] if evaluations else float(jnp.sum((w["w"] - 1) ** 2))
        return {"heldout_loss": now}, []

    metrics = Path(folder) / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    done = sum("heldout_loss" in json.loads(line) for line in lines)
    w = {"w": jnp.zeros(3)}
    trained = run.run(
        config,
        Path(folder),
        "tiny",
        about="three numbers",
        identity={"base": "none"},
        trainable=w,
        optimizer=tx.init(w),
        update=update,
        batches=Batches(added or {}, set(without), seconds),
        evaluate=evaluate,
        rate=lambda step: config.optim.lr,
        export=export,
    )
    return trained["w"]


def main(folder, *signal_at):
    """Six steps in a process of its own, which sends itself a signal in one of them; prints the numbers."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    config = configured(steps=6, checkpoint__every=2)
    print(json.dumps(np.asarray(train(config, folder, signal_at=signal_at or (0, 0))).tolist()))
