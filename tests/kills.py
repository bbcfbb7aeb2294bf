"""Trains a toy in a process, kills it at random and starts it again, many times: `kills_test.py` runs this file.

    python kills.py FOLDER KILLS SEED

All that takes time to import is imported here once. The processes that train are forked from this one, which never
starts JAX, so that it has no thread whose locks they would inherit.
"""

import collections
import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import checkpoint
from lora_jax.data import packing
from train import config as settings
from train import loop
from train.run import run
from train.update import make_update

STEPS, EVERY, EXAMPLES, RANK = 200, 4, 40, 4
SAVE, STEP = "save", "step"


def train(folder):
    """Low-rank factors that follow examples in Grain's order, with dropout: whatever is lost or repeated shows."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    config = settings.sft()
    config.steps, config.checkpoint.every, config.eval.every = STEPS, EVERY, 2 * EVERY + 1
    rows = [[packing.Tokens(str(i), np.full(9, i), np.ones(9, bool))] for i in range(EXAMPLES)]
    key, tx = jax.random.key(0), optax.adam(1e-2)
    factors = {"a": jax.random.normal(key, (16, RANK)), "b": jnp.zeros((RANK, 16))}

    def loss(tree, batch):
        out = jax.nn.one_hot(batch["tokens"][:, 0] % 16, 16) @ tree["a"] @ tree["b"]
        seen = batch["tokens"][:, 0].astype(jnp.float32) @ jnp.array([1.0, 100.0])
        return jnp.mean((out - jnp.sin(batch["tokens"][:, :1])) ** 2), jnp.float32(1), {"seen": seen}

    def dropped(factors, base, key):
        return factors | {"b": factors["b"] * jax.random.bernoulli(key, 0.9, (RANK, 1))}

    step = make_update(loss, dropped, tx)

    def update(factors, state, batch, key):
        time.sleep(0.03)  # as a step takes its time
        return step(factors, state, None, batch, key)

    run(
        config,
        Path(folder),
        "kills",
        about="a toy",
        identity={"base": "none"},
        trainable=factors,
        optimizer=tx.init(factors),
        update=update,
        batches=packing.mix([(rows, 1.0)], 8, 2, seed=0),
        evaluate=lambda tree: ({"heldout_loss": float(jnp.mean((tree["a"] @ tree["b"] - 1) ** 2))}, []),
        rate=lambda step: 1e-2,
    )


def started(folder):
    """A process that trains, forked."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(f"{folder}.log", "a") as log, contextlib.redirect_stdout(log):
            train(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def ended(pid):
    """Whether a process came to its end, which must be a good one."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and status:
        raise SystemExit(f"a process that trained ended with {status}")
    return bool(done)


def saving(folder, since):
    """Whether a checkpoint is being written: it has no manifest yet, and was not left so before this time."""

    def unfinished(path):
        with contextlib.suppress(FileNotFoundError):  # it was renamed, or removed
            return path.stat().st_mtime_ns > since and not (path / checkpoint.MANIFEST).exists()

    return any(map(unfinished, (folder / "checkpoints").glob("*")))


def killed(folder, chance, wanted):
    """Starts training and kills it at some moment after it has gone on; returns what it was doing, None if it ended.

    Args:
      folder: of the run.
      chance: random numbers.
      wanted: `SAVE` waits for a checkpoint being written, and kills at whatever moment of it.
    """
    path, more = folder / loop.METRICS, chance.randrange(20)
    before = path.stat().st_mtime_ns if path.exists() else 0
    since = time.time_ns()
    pid = started(folder)

    def until(condition):
        while not condition():
            if ended(pid):
                return False
            time.sleep(0.001)
        return True

    def lines():
        return path.read_bytes().count(b"\n")

    if not until(lambda: path.exists() and path.stat().st_mtime_ns > before):
        return None
    count = lines()
    if not until(lambda: lines() >= count + more) or not until(lambda: saving(folder, since) == (wanted == SAVE)):
        return None
    time.sleep(chance.uniform(0, 0.05) if wanted == SAVE else 0)
    doing = SAVE if saving(folder, since) else STEP
    if ended(pid):
        return None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return doing


def main(folder, kills, seed):
    """One run that nothing disturbs, and others, until that many processes were killed and the last run has ended."""
    folder, chance, doing, runs = Path(folder), random.Random(int(seed)), collections.Counter(), []
    threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
    os.waitpid(started(folder / "undisturbed"), 0)
    while doing.total() < int(kills):
        runs.append(f"run{len(runs)}")
        while found := killed(folder / runs[-1], chance, chance.choice([SAVE, STEP])):
            doing[found] += 1
    print(json.dumps({"threads": threads, "doing": doing, "runs": runs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
