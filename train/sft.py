"""Supervised fine-tuning: `python -m train.sft --config=configs/quickstart.py --config.optim.lr=1e-3`.

Trains low-rank adapters on what the assistant says in chats, or whatever else `--config.method` names: other adapters,
a prompt, a prefix, every parameter ("full").
The same command, run again, goes on from the last checkpoint, and ends with the same adapters bit for bit.
`train/config.py` has the settings.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_flags

from lora_jax.data import chat, packing
from lora_jax.models import decoder
from train import adapter, examples, heldout, hosts, launch, loop, methods, objective, placing
from train import config as settings
from train.run import Evaluation, run
from train.start import begin
from train.update import make_update

CONFIG = config_flags.DEFINE_config_file("config", None, "a file such as configs/quickstart.py")
SAMPLES = 5  # answers kept for the report

Tree = Any


def main(_: list[str]) -> None:
    """Reads the command line and trains."""
    config, name = launch.settings(CONFIG)
    train(config, Path(config.run or f"runs/{name}"), name)


@placing.on_mesh
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
    model = methods.attending(config, methods.load(config, dtype))
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
    begun = begin(config, model, nll, packing.batch(data.rows[:1], data.length))
    base, trainable, gather, tree = begun.base, begun.trainable, begun.gather, methods.runner(config, model)
    print(begun.about)

    rate = settings.schedule(config, methods.rate(config, model.config.dim))
    tx = methods.optimizer(config, trainable, rate)
    optimizer, learnt = tx.init(trainable), functools.partial(nll, once=methods.once(config, trainable, model.config))
    step = make_update(methods.applied(learnt), tree, tx, config.accumulate, placing.kept(trainable, optimizer), gather)
    measure = jax.jit(methods.applied(nll))
    speak = methods.applied(decoder.forward_with_cache)

    def update(trainable: Tree, optimizer: Tree, batch: packing.Batch, key: jax.Array) -> Any:
        return step(trainable, optimizer, base, batch, key)

    def evaluate(trainable: Tree) -> Evaluation:
        now, rows, numbers, samples = tree(gather(trainable), base), config.batch_size // config.accumulate, {}, []
        for name, held in {"": data, **data.sets}.items():
            of = f"/{name}" if name else ""
            numbers[f"heldout_loss{of}"] = heldout.loss(measure, now, held.heldout_rows, data.length, rows)
            if held.asked:
                sizes = config.eval.max_new, config.eval.batch_size
                said = heldout.answers(speak, now, model.config, format, held.asked, *sizes)
                numbers[f"exact_match{of}"] = sum(answer.right for answer in said) / len(said)
                samples += [answer._asdict() for answer in said[:SAMPLES]]
        return numbers, samples

    # Everything is checked; from here on the run writes.
    run(
        config,
        folder,
        name,
        about=begun.about,
        identity=begun.identity(model, data.digest),
        trainable=trainable,
        optimizer=optimizer,
        update=update,
        batches=hosts.Joined(data.batches(config.batch_size, config.seed), config.batch_size),
        evaluate=evaluate,
        rate=rate,
        export=adapter.writer(config, model, base),
    )


if __name__ == "__main__":
    launch.run(main, settings.sft)
