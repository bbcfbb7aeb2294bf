"""Supervised fine-tuning: `python -m train.sft --config=configs/quickstart.py --config.optim.lr=1e-3`.

Trains low-rank adapters on what the assistant says in chats, or whatever else `--config.method` names: other adapters,
a prompt, a prefix, every parameter ("full").
The same command, run again, goes on from the last checkpoint, and ends with the same adapters bit for bit.
`train/config.py` has the settings.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_flags

import lora_jax as lora
from lora_jax import checkpoint
from lora_jax.data import chat, packing
from lora_jax.models import decoder
from train import config as settings
from train import examples, heldout, launch, loop, methods, objective, report

CONFIG = config_flags.DEFINE_config_file("config", None, "a file such as configs/quickstart.py")
SAMPLES = 5  # answers kept for the report

Tree = Any


def main(_: list[str]) -> None:
    """Reads the command line and trains."""
    config, name = launch.settings(CONFIG)
    train(config, Path(config.run or f"runs/{name}"), name)


def train(config: settings.Config, folder: Path, name: str) -> None:
    """Trains, evaluates before, during and after, and reports.

    Args:
      config: from `train/config.py`.
      folder: of the run; if it has checkpoints, the run goes on.
      name: of the experiment, for the report.

    Raises:
      ValueError, OSError, ArithmeticError: with one line that says what to change.
    """
    settings.check(config)
    dtype = jnp.dtype(config.dtype or loop.base_dtype())
    model = methods.load(config, dtype)
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(folder))
    data = examples.prepare(config, format, methods.room(config, model.config))
    nll = functools.partial(
        objective.negative_log_likelihood,
        shape=model.config,
        learned=data.learned,
        remat=config.remat,
        chunk=config.loss_chunk,
        packed=config.data.pack,
    )

    # What is trained, and with the base, `tree(trainable, base)`, what the model runs with.
    batch, trained = packing.batch(data.rows[:1], data.length), config.method
    base, trainable = methods.start(jax.random.key(config.seed), config, model, nll, batch)
    tree = methods.runner(config, model)
    if config.method == "full":
        print(f"{config.model}: training all of its {lora.count(trainable):,} parameters")
    elif config.method in methods.SOFT:
        print(f"{config.model}: {config.method} tuning, {lora.count(trainable):,} parameters")
    else:
        trained = f"{config.method} {methods.spec(config)!r}"
        print(f"{config.model}:\n{lora.report(nll, base, batch, spec=methods.spec(config))}")
    identity = {
        "base": checkpoint.fingerprint(model.params if base is None else base),
        "data": data.digest,
        "trained": trained,
    }

    rate = settings.schedule(config, methods.rate(config, model.config.dim))
    clip = optax.clip_by_global_norm(config.optim.clip) if config.optim.clip else optax.identity()
    tx = optax.chain(clip, methods.optimizer(config, trainable, rate))
    update = make_update(methods.applied(nll), tree, tx, config.accumulate)
    measure = jax.jit(methods.applied(nll))
    speak = methods.applied(decoder.forward_with_cache)

    # Everything is checked; from here on the run writes.
    batches = data.batches(config.batch_size, config.seed)
    checkpoints = checkpoint.Checkpoints(
        folder / "checkpoints",
        identity,
        config.checkpoint.keep,
        about={"config": config.to_dict(), "lora-jax": lora.__version__},
    )
    # Tied to their device, as restored arrays are: both ways of starting run one compiled program.
    trainable, optimizer = jax.tree.map(lambda x: jax.device_put(x, x.sharding), (trainable, tx.init(trainable)))
    step, key = 0, jax.random.key(config.seed)
    saved = checkpoints.restore(checkpoint.State(step, trainable, optimizer, {}))
    if saved:
        step, trainable, optimizer, progress = saved
        batches.set_state(progress["data"])
        key = jax.random.wrap_key_data(jnp.array(progress["key"], jnp.uint32))
        print(f"going on from step {step} of {folder}")
    loop.begin(folder, config.to_dict())
    record = loop.Record(folder, step if saved else -1)

    def evaluate() -> None:
        now, rows = tree(trainable, base), config.batch_size // config.accumulate
        numbers = {"heldout_loss": heldout.loss(measure, now, data.heldout_rows, data.length, rows)}
        if data.asked:
            sizes = config.eval.max_new, config.eval.batch_size
            said = heldout.answers(speak, now, model.config, format, data.asked, *sizes)
            numbers["exact_match"] = sum(answer.right for answer in said) / len(said)
            for answer in said[:SAMPLES]:
                record.sample(step, **answer._asdict())
        record.metrics(step, **numbers)
        print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()), flush=True)

    if not saved:
        evaluate()
    with loop.Progress(config.steps, step) as progress:
        batch = next(batches)
        while step < config.steps:
            trainable, optimizer, out = update(trainable, optimizer, base, batch, jax.random.fold_in(key, step))
            step += 1
            tokens = int((batch["segments"] > 0).sum())
            place = {"data": batches.get_state(), "key": jax.random.key_data(key).tolist()}
            batch = next(batches)  # while the device computes
            numbers = {name: float(value) for name, value in out.items()}
            if not all(map(math.isfinite, numbers.values())):
                raise FloatingPointError(
                    f"step {step}: loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}: stopped; "
                    f"the last good checkpoint is kept in {checkpoints.folder}; lower config.optim.lr"
                )
            speed = progress.update(step, numbers["loss"], tokens)
            record.metrics(step, **numbers, learning_rate=float(rate(step - 1)), tokens_per_second=speed)
            last = step == config.steps
            if last or (config.eval.every and step % config.eval.every == 0):
                evaluate()
            if last or step % config.checkpoint.every == 0:
                checkpoints.save(checkpoint.State(step, trainable, optimizer, place))
            progress.skip()
    record.close()
    report.close(folder, name)


def make_update(
    nll: Callable, tree: Callable, tx: optax.GradientTransformation, accumulate: int
) -> Callable[..., tuple[Tree, Tree, dict[str, jax.Array]]]:
    """Compiles a training step.

    The gradient is of the mean over all learned tokens of the batch, in however many parts it is computed.

    Args:
      nll: `nll(tree, batch)` gives a sum of losses, and the number of tokens in it.
      tree: `tree(trainable, base, key)` gives what `nll` takes.
      tx: the optimizer.
      accumulate: parts of a batch.

    Returns:
      `update(trainable, optimizer, base, batch, key)`, which gives the first two anew, and the loss and the norm
      of the gradient. It takes the memory of the first two; the base stays.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(trainable, optimizer, base, batch, key):
        tokens = batch["weights"].sum()

        def mean(trainable, part, key):
            return nll(tree(trainable, base, key), part)[0] / tokens

        def add(total, part_and_key):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(mean)(trainable, *part_and_key)), None

        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
        (loss, gradient), _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulate)))
        updates, optimizer = tx.update(gradient, optimizer, trainable)
        numbers = {"loss": loss, "gradient_norm": optax.global_norm(gradient)}
        return optax.apply_updates(trainable, updates), optimizer, numbers

    return update


if __name__ == "__main__":
    launch.run(main)
