"""The loop of every trainer: restore, then step by step update, record, evaluate and save, and at the end report.

A trainer brings what is trained, its data and three functions. Whatever a step needs is in its arguments, and the
place in the data is saved with what is trained: a run that was killed at any moment goes on without losing or repeating
an example, and ends with the same numbers.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax import checkpoint
from train import hosts, loop, profiling, report, trackers, watch
from train.config import Config

RESUMABLE = 75  # exit status of a run that was asked to stop and saved itself: EX_TEMPFAIL, "try again"
GOES_ON = ", and saved; the same command goes on from here"

Tree = Any
Evaluation = tuple[dict[str, float], list[dict[str, str]]]


class Batches(Protocol):
    """Endless batches that remember their place; Grain's iterators do."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def get_state(self) -> Any:
        """The place, as JSON."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes on from a place."""
        ...


def run(
    config: Config,
    folder: Path,
    name: str,
    *,
    about: str,
    identity: dict[str, Any],
    trainable: Tree,
    optimizer: Tree,
    update: Callable[[Tree, Tree, Any, jax.Array], tuple[Tree, Tree, dict[str, Any]]],
    batches: Batches,
    evaluate: Callable[[Tree], Evaluation],
    rate: Callable[[int], Any],
    export: Callable[[Path, int, Tree], None] | None = None,
) -> Tree:
    """Trains to the end, from wherever the run in `folder` stands.

    Args:
      config: has `seed`, `steps`, `eval`, `checkpoint`, `guard` as `train/config.py`.
      folder: of the run; if it has checkpoints, the run goes on.
      name: of the experiment, for the report.
      about: what is trained, in words, for the report.
      identity: what must be the same whenever the run goes on; `base` is the base's fingerprint.
      trainable: what is trained, before it is.
      optimizer: its state.
      update: `update(trainable, optimizer, batch, key)` gives the first two anew, and numbers: `loss`, `tokens` (how
        many the step went through), and whatever else is to be recorded. It may take the memory of the first two.
      batches: what `update` is given.
      evaluate: numbers of what was trained on what it was not, and samples of what it says, each a dict of texts:
        `question`, `expected` and `said` are shown side by side.
      rate: the learning rate after a number of updates.
      export: `export(folder, step, trainable)` writes the best of what was trained for other programs, at the end.

    Returns:
      What was trained, as the last step left it.

    Raises:
      ValueError, OSError, ArithmeticError: with one line that says what to change.
      SystemExit: with the status `RESUMABLE`, after a SIGTERM at any time; once the last step is made, it ends as ever.
    """
    with watch.asked_to_stop() as asked:
        hosts.agree(identity, "the run's ")
        hosts.share(folder)
        resolved = config.to_dict()
        beside = {"config": resolved, "lora-jax": lora.__version__}
        checkpoints = checkpoint.Checkpoints(folder / "checkpoints", identity, config.checkpoint.keep, about=beside)
        # Tied to their device, as restored arrays are: both ways of starting run one compiled program.
        trainable, optimizer = jax.tree.map(lambda x: jax.device_put(x, x.sharding), (trainable, optimizer))
        step, key = 0, jax.random.key(config.seed)
        guard = watch.Guard(config.guard.spike, config.guard.then == "skip")
        best = watch.Best(config.eval.best, config.eval.higher, config.eval.patience)
        saved = checkpoints.restore(checkpoint.State(step, trainable, optimizer, {}))
        if saved:
            step, trainable, optimizer, place = saved
            batches.set_state(place["data"])
            guard.restore(place["guard"])
            best.restore(place["best"])
            key = jax.random.wrap_key_data(jnp.array(place["key"], jnp.uint32))
            print(f"going on from step {step} of {folder}")
        loop.begin(folder, resolved, about)
        recorded = step if saved else -1
        record = loop.Record(folder, recorded, trackers.start(resolved, folder, recorded) if hosts.first() else ())

        def measure() -> dict[str, float]:
            numbers, samples = evaluate(trainable)
            for sample in samples:
                record.sample(step, **sample)
            record.metrics(step, **numbers)
            print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()), flush=True)
            return numbers

        def stop(what: str) -> NoReturn:
            record.close()
            print(f"step {step}: asked to stop{what}", flush=True)
            sys.exit(RESUMABLE)

        if not saved:
            best.see(step, measure())
        if asked.here() and step < config.steps:
            stop(GOES_ON if saved else "; the same command begins anew")
        profile = profiling.Profile(config.profile, folder)
        with checkpoints, loop.Progress(config.steps, step) as progress, profile:
            batch = progress.fetch(batches)
            while step < config.steps and not best.enough():
                profile.begin(step + 1)
                before = jax.tree.map(jnp.copy, (trainable, optimizer)) if guard.skip else None
                trainable, optimizer, out = update(trainable, optimizer, batch, jax.random.fold_in(key, step))
                step += 1
                data = batches.get_state()
                batch = progress.fetch(batches)  # while the device computes
                numbers = {name: float(value) for name, value in out.items()}
                profile.end(step)
                if step == 1:
                    watch.check_first(numbers)
                if wrong := guard.judge(numbers):
                    if before is None or not guard.undo():
                        raise FloatingPointError(
                            f"step {step}: {wrong}: stopped; the last good checkpoint is kept in {checkpoints.folder}; "
                            "lower config.optim.lr"
                        )
                    trainable, optimizer = before
                    print(f"step {step}: {wrong}: skipped, the {guard.skipped}. so far", flush=True)
                    numbers = {"skipped": guard.skipped, "tokens": numbers["tokens"]}
                numbers |= progress.update(step, numbers)
                record.metrics(step, **numbers, learning_rate=float(rate(step - 1 - guard.skipped)))
                score = None
                if step == config.steps or (config.eval.every and step % config.eval.every == 0):
                    score = best.see(step, measure())
                asked_now = asked.here()
                last = step == config.steps or best.enough() or asked_now
                if last or best.step == step or step % config.checkpoint.every == 0:
                    place = {"data": data, "key": jax.random.key_data(key).tolist()}
                    place |= {"guard": guard.state(), "best": best.state()}
                    checkpoints.save(checkpoint.State(step, trainable, optimizer, place), score)
                if asked_now and step < config.steps:
                    checkpoints.wait()
                    stop(GOES_ON)
                progress.skip()
        record.close()
        if export:  # the best, as chat, evaluate and export take it
            last = checkpoint.State(step, trainable, optimizer, {})
            exported = None if best.step == step else checkpoints.best(last)
            export(folder, *(exported or last)[:2])
        if hosts.first():
            report.close(folder, name)
        return trainable
