"""Distillation: `python -m train.distill --config=configs/distill.py --config.on_policy=True`.

A student learns what a teacher would say at every token: a larger model, an adapter over the student's own base, or
that base itself with a system prompt that the student is to do without. Off-policy both read the data's answers, and
the student is drawn to all that the teacher holds likely: KL(teacher ‖ student). On-policy both read what the student
says itself, and it gives up what the teacher holds unlikely: KL(student ‖ teacher).

Sources: Hinton et al. 2015, arXiv 1503.02531; Agarwal et al. 2024, arXiv 2306.13649 (on-policy).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_flags

from lora_jax import checkpoint
from lora_jax.data import chat, packing
from lora_jax.interop import hf
from lora_jax.models import decoder, partition
from lora_jax.models.config import DecoderConfig
from train import adapter, distill_settings, launch, likelihood, loop, methods, objective, placing, teaching, trained
from train import config as settings
from train.run import Evaluation, run
from train.start import begin
from train.update import make_update

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
      config: from `train/distill_settings.py`.
      folder: of the run; if it has checkpoints, the run goes on.
      name: of the experiment, for the report.

    Raises:
      ValueError, OSError, ArithmeticError: with one line that says what to change.
    """
    distill_settings.check(config)
    dtype = jnp.dtype(config.dtype or loop.base_dtype())
    model = methods.attending(config, methods.load(config, dtype))
    teacher, taught = load_teacher(config, model, dtype)
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(folder))
    data = teaching.prepare(config, format, (methods.room(config, model.config), teacher.context))
    options = {"shape": model.config, "learned": data.learned, "remat": config.remat}

    # What is trained, and with the base, `tree(trainable, base)`, what the model runs with.
    nll = functools.partial(objective.negative_log_likelihood, **options)
    begun = begin(config, model, nll, packing.batch([[data.lessons[0].student]], data.lengths[0]))
    base, trainable, gather, tree = begun.base, begun.trainable, begun.gather, methods.runner(config, model)
    print(begun.about)
    identity = begun.identity(model, data.digest, f", {'on' if config.on_policy else 'off'}-policy")
    identity |= {"teacher": checkpoint.fingerprint(taught)}

    def both(trainable: Tree, bases: tuple[Tree, Tree], key: jax.Array | None = None) -> tuple[Tree, Tree]:
        return tree(trainable, bases[0], key), bases[1]

    rate = settings.schedule(config, methods.rate(config, model.config.dim))
    tx = methods.optimizer(config, trainable, rate)
    student, master = (Reader(shape, data.learned, config.remat) for shape in (model.config, teacher))
    loss = make_loss(student, master, config.on_policy, config.loss_chunk)
    optimizer, measure = tx.init(trainable), jax.jit(loss)
    step = make_update(loss, both, tx, config.accumulate, placing.kept(trainable, optimizer), gather)
    sample = teaching.Sampler(
        methods.applied(decoder.forward_with_cache),
        model.config,
        model.special.stop,
        data.lengths[0] - config.sampler.max_new + 1,
        config.sampler.max_new,
        config.sampler.temperature,
    )

    def update(trainable: Tree, optimizer: Tree, lessons: list[teaching.Lesson], key: jax.Array) -> Any:
        if config.on_policy:
            draw, key = jax.random.split(key)
            lessons = sample(tree(gather(trainable), base, None), lessons, draw, config.batch_size)
        return step(trainable, optimizer, (base, taught), teaching.batch(lessons, data), key)

    def evaluate(trainable: Tree) -> Evaluation:
        now, key, size = both(gather(trainable), (base, taught)), jax.random.key(config.seed), config.batch_size
        total, tokens, samples = 0.0, 0.0, []
        for start in range(0, len(data.heldout), size):
            lessons = data.heldout[start : start + size]
            if config.on_policy:
                lessons = sample(now[0], lessons, jax.random.fold_in(key, start), size)
                samples += [_sample(format, lesson) for lesson in lessons]
            value, count, _ = measure(now, teaching.batch(lessons, data, size))
            total, tokens = total + float(value), tokens + float(count)
        return {"heldout_loss": total / tokens}, samples[:SAMPLES]

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
        batches=packing.mix(
            [(data.lessons, 1.0)], 0, config.batch_size, config.seed, write=lambda found, _: list(found)
        ),
        evaluate=evaluate,
        rate=rate,
        export=adapter.writer(config, model, base),
    )


def load_teacher(config: settings.Config, model: hf.Checkpoint, dtype: jnp.dtype) -> tuple[DecoderConfig, Tree]:
    """The teacher's shape, and what it runs with; over the student's base if it has no model of its own.

    Raises:
      FileNotFoundError: there is no such model or adapter.
      ValueError: its tokens are not the student's.
    """
    own = config.teacher.model
    found = hf.load(own, dtype, places=placing.base(config)) if own else model
    if found.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise ValueError(
            f"config.teacher.model={own}: its tokenizer is not that of {config.model}, so that predictions cannot be "
            "compared token by token; take a teacher of the same family"
        )
    if config.teacher.adapter:
        return found.config, placing.whole(trained.load(Path(config.teacher.adapter), found))
    return found.config, found.params


class Reader:
    """How one of the two reads a batch: hidden states of what is to be learned, and their logits, part by part.

    Args:
      shape: the decoder's.
      learned: S, the most targets with a weight in a row.
      remat: as `decoder.hidden`.
    """

    def __init__(self, shape: DecoderConfig, learned: int, remat: str):
        hidden = functools.partial(likelihood.learned_hidden, shape=shape, learned=learned, remat=remat)
        self.hidden = methods.applied(hidden)
        self.logits = methods.applied(lambda params, x_BSD, prefix=None: decoder.head(params, x_BSD, shape))


def make_loss(student: Reader, teacher: Reader, reverse: bool, chunk: int) -> Callable[..., Any]:
    """Σ KL(teacher ‖ student) over all tokens that are learned, or, reversed, Σ KL(student ‖ teacher).

    Args:
      student: how the student reads.
      teacher: how the teacher does.
      reverse: which divergence.
      chunk: tokens whose logits are held at once, of each; 0: all.

    Returns:
      `loss(trees, batch)` of both trees and a batch as `teaching.batch` makes it, as `make_update` takes it.
    """

    def loss(trees: tuple[Tree, Tree], batch: Any) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        ours_BSD, _, weights_BS = student.hidden(trees[0], batch)
        theirs_BSD, *_ = teacher.hidden(trees[1], batch["teacher"])

        def part(total, xs):
            ours_ND, theirs_ND, weights_N = xs
            logits = student.logits(trees[0], ours_ND), teacher.logits(trees[1], theirs_ND)
            # The embeddings of one family may be filled up to different sizes, with rows that no token has.
            words = min(x.shape[-1] for x in logits)
            own, known = (x[:, :words] for x in logits)
            return total + jnp.sum(weights_N * (divergence(own, known) if reverse else divergence(known, own))), None

        tokens = weights_BS.size
        size = min(chunk or tokens, tokens)
        parts = [partition.chunks(x, size) for x in (ours_BSD, theirs_BSD, weights_BS)]
        step = jax.checkpoint(part, prevent_cse=False) if size < tokens else part
        total, _ = jax.lax.scan(step, jnp.float32(0), parts)
        return total, jnp.sum(weights_BS), {}

    return loss


def divergence(p_NV: jax.Array, q_NV: jax.Array) -> jax.Array:
    """KL(p ‖ q) = Σ_v p (log p - log q) of logits, float32 [N]."""
    log_p_NV, log_q_NV = jax.nn.log_softmax(p_NV), jax.nn.log_softmax(q_NV)
    return jnp.sum(jnp.exp(log_p_NV) * (log_p_NV - log_q_NV), axis=-1)


def _sample(format: chat.Format, lesson: teaching.Lesson) -> dict[str, str]:
    said = chat.answer(format, lesson.student.ids[len(lesson.asked[0]) :])
    return {"question": lesson.example.messages[-1]["content"], "expected": lesson.example.answer, "said": said}


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "a file such as configs/distill.py")
    launch.run(main, distill_settings.distill)
