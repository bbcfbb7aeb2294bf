"""Prompts with answers that can be checked, and what a policy says to them.

Shapes: B answers, W places of the widest prompt, N tokens of an answer, T = W + N - 1 inputs of the learner.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from lora_jax.data import chat, kinds, sources
from lora_jax.models import generate
from lora_jax.models.config import DecoderConfig
from train import hosts
from train.config import Config

Tree = Any


class Prompt(NamedTuple):
    """What a policy is asked: as ids, as a text, and as the record that rewards are given."""

    name: str
    ids: np.ndarray
    question: str
    entry: Mapping[str, Any]


class Prompts(NamedTuple):
    """What a run asks.

    Args:
      training: to learn from.
      heldout: to evaluate on; none of their questions is in `training`.
      width: W, tokens of the longest.
      digest: of their content and order: a run goes on only with the same.
    """

    training: list[Prompt]
    heldout: list[Prompt]
    width: int
    digest: str


def prepare(config: Config, format: chat.Format, room: int) -> Prompts:
    """Reads the tasks, holds some out, writes them as prompts, and says how many there are and what is left out.

    Args:
      config: of the whole run.
      format: how the model writes chats.
      room: positions for a prompt and its answer.

    Returns:
      The prompts.

    Raises:
      FileNotFoundError, ValueError: naming the file, line or task, and what is wrong.
    """
    settings = config.data
    tasks = sources.load(settings.source, settings.columns, kinds.Task)
    if settings.heldout_source:
        held = sources.load(settings.heldout_source, settings.columns, kinds.Task)[: settings.heldout]
        tasks = sources.without(tasks, held)
    else:
        tasks, held = sources.split(tasks, settings.heldout, config.seed)
    room -= config.sampler.max_new
    longest = min(settings.length or room, room)
    parts = [[_prompt(format, task) for task in part] for part in (tasks, held)]
    training, heldout = ([p for p in part if len(p.ids) <= longest] for part in parts)
    long = [p for part in parts for p in part if len(p.ids) > longest]
    if not training or not heldout:
        raise ValueError(
            f"{settings.source}: no prompt is left with at most {longest} tokens (config.data.length, or what "
            f"config.sampler.max_new={config.sampler.max_new} leaves of the model's positions)"
        )
    width = max(len(p.ids) for p in training + heldout)
    print(
        f"{settings.source}: {len(training):,} prompts to learn from, {len(heldout):,} held out, up to {width} tokens"
        + (f"; {len(long):,} are longer than {longest} and left out, such as {long[0].name}" if long else "")
    )
    digest = hashlib.sha256(f"{config.seed} {config.sampler.prompts}".encode())
    for prompt in training:
        digest.update(prompt.ids.tobytes() + str(prompt.entry["answer"]).encode())
    return Prompts(training, heldout, width, digest.hexdigest()[:16])


def iterate(prompts: Sequence[Prompt], count: int, seed: int) -> Any:
    """Endless lists of `count` prompts, shuffled anew in every pass, as a Grain iterator that remembers its place."""
    dataset = grain.MapDataset.source(prompts).seed(seed).shuffle().repeat().batch(count, batch_fn=list)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


class Rollout(NamedTuple):
    """What a policy said.

    Args:
      answers_BN: token ids, zeros after the end.
      counts_B: tokens of each, its end token too.
      log_probs_BN: of the sampler.
      texts: what they say.
      ended_B: whether there is an end token, and not just no room.
    """

    answers_BN: np.ndarray
    counts_B: np.ndarray
    log_probs_BN: np.ndarray
    texts: list[str]
    ended_B: np.ndarray


class Sampler:
    """Draws answers, a fixed number of rows at a time, in one compiled program.

    Args:
      apply: `decoder.forward_with_cache`, or a function that stands for it.
      shape: the decoder's.
      format: how the model writes chats.
      width: W.
      max_new: N.
      temperature: of the softmax that is drawn from.
      rows: answers drawn at once.
    """

    def __init__(
        self,
        apply: Callable,
        shape: DecoderConfig,
        format: chat.Format,
        width: int,
        max_new: int,
        temperature: float,
        rows: int,
    ):
        self.apply, self.shape, self.format = apply, shape, format
        self.width, self.max_new, self.temperature, self.rows = width, max_new, temperature, rows

    def __call__(self, tree: Tree, prompts: Sequence[Prompt], key: jax.Array) -> Rollout:
        """One answer to each prompt; the key of each is its own, whatever else is drawn with it."""
        ids = [prompt.ids for prompt in prompts]
        ids += [ids[0]] * (-len(ids) % self.rows)
        keys, lengths = jax.random.split(key, len(ids)), np.array([len(x) for x in ids])
        tokens = padded(ids, self.width)
        parts = []
        for start in range(0, len(ids), self.rows):
            at = slice(start, start + self.rows)
            sizes = (self.max_new, self.format.special.stop, keys[at], self.temperature, self.apply)
            parts.append(hosts.whole(generate.sample(tree, self.shape, tokens[at], lengths[at], *sizes)))
        answers, counts, log_probs = (np.concatenate(x)[: len(prompts)] for x in zip(*parts, strict=True))
        last = answers[np.arange(len(prompts)), counts - 1]
        texts = [chat.answer(self.format, row[:n]) for row, n in zip(answers, counts, strict=True)]
        return Rollout(answers, counts, log_probs, texts, np.isin(last, self.format.special.stop))


def learner_batch(prompts: Sequence[Prompt], rollout: Rollout, width: int) -> dict[str, np.ndarray]:
    """Prompts and answers as the learner reads them.

    Args:
      prompts: B of them, each with its answer in the rollout.
      rollout: what was said.
      width: W.

    Returns:
      `tokens` [B, T], `begins` [B], `answers` [B, N] as for `policy.log_probs`, and `sampled` [B, N].
    """
    pairs = zip(prompts, rollout.answers_BN, rollout.counts_B, strict=True)
    rows = [np.concatenate([prompt.ids, answer[: n - 1]]) for prompt, answer, n in pairs]
    return {
        "tokens": padded(rows, width + rollout.answers_BN.shape[1] - 1),
        "begins": np.array([len(prompt.ids) - 1 for prompt in prompts], np.int32),
        "answers": rollout.answers_BN,
        "sampled": rollout.log_probs_BN,
    }


def padded(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Rows of ids as one array, zeros behind them."""
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)


def _prompt(format: chat.Format, task: kinds.Task) -> Prompt:
    try:
        ids = chat.prompt(format, task.messages)
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from None
    return Prompt(task.name, ids, task.messages[-1]["content"], {**task.values, "answer": task.answer})
