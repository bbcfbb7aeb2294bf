"""What a student and its teacher both read: prompts of their own, and one answer, the data's or the student's.

Shapes: B rows, W places of the longest prompt, N tokens of an answer.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.data import chat, kinds, packing, sources
from lora_jax.models import generate
from lora_jax.models.config import DecoderConfig
from train import hosts
from train.config import Config
from train.examples import columns

Tree = Any


class Lesson(NamedTuple):
    """An example as both read it.

    Args:
      example: where it comes from.
      student: its tokens; what is learned of them are the same tokens as of the teacher's.
      teacher: its tokens, with what the teacher alone is told.
      asked: prompts of the two, up to where the assistant is to answer; all that there is until the student has.
    """

    example: kinds.Example | kinds.Asked
    student: packing.Tokens
    teacher: packing.Tokens
    asked: tuple[np.ndarray, np.ndarray]


class Data(NamedTuple):
    """What a run trains on and evaluates on.

    Args:
      lessons: to train on.
      heldout: to evaluate on.
      learned: the most tokens that are learned of a row.
      lengths: places in a row of the student, and of the teacher.
      digest: of all that is trained on, and its order.
    """

    lessons: list[Lesson]
    heldout: list[Lesson]
    learned: int
    lengths: tuple[int, int]
    digest: str


def prepare(config: Config, format: chat.Format, room: tuple[int, int]) -> Data:
    """Reads, splits and tokenizes examples for both, and says how many there are and what is left out.

    Args:
      config: of the whole run.
      format: how the models write chats.
      room: positions that the student has for a text, and the teacher.

    Returns:
      The data.

    Raises:
      FileNotFoundError, ValueError: naming the file, line or example, and what is wrong.
    """
    settings, extra = config.data, config.sampler.max_new if config.on_policy else 0
    kind, write = (kinds.Asked, prompt) if config.on_policy else (kinds.Example, lesson)
    found = sources.load(settings.source, columns(config), kind)
    if settings.heldout_source:
        held = sources.load(settings.heldout_source, columns(config), kind)[: settings.heldout]
        found = sources.without(found, held)
    else:
        found, held = sources.split(found, settings.heldout, config.seed)
    most = min(settings.length or room[0], room[0]), room[1]
    parts = [[write(format, example, config.teacher.system) for example in part] for part in (found, held)]

    def sizes(x: Lesson) -> tuple[int, int]:
        if config.on_policy:
            return len(x.asked[0]) - 1 + extra, len(x.asked[1]) - 1 + extra
        return x.student.inputs, x.teacher.inputs

    lessons, heldout = ([x for x in part if all(map(int.__le__, sizes(x), most))] for part in parts)
    long = [x for part in parts for x in part if not all(map(int.__le__, sizes(x), most))]
    what = f"{most[0]} tokens, or {most[1]} as the teacher reads them"
    if not lessons or not heldout:
        raise ValueError(f"{settings.source}: every example is longer than {what} (config.data.length)")
    if long:
        print(f"{len(long):,} examples are longer than {what}: left out, such as {long[0].example.name}")
    student, teacher = (max(sizes(x)[i] for x in [*lessons, *heldout]) for i in (0, 1))
    print(
        f"{settings.source}: {len(lessons):,} {found[0].format} to learn from, {len(heldout):,} held out (no question "
        f"of these is trained on), up to {student} tokens"
    )
    digest = hashlib.sha256(f"{config.seed} {config.batch_size} {student} {teacher} {extra}".encode())
    for x in lessons:
        digest.update(x.student.ids.tobytes() + x.teacher.ids.tobytes())
    learned = extra or max(int(x.student.learn[1:].sum()) for x in [*lessons, *heldout])
    return Data(lessons, heldout, learned, (student, teacher), digest.hexdigest()[:16])


def lesson(format: chat.Format, example: sources.Example, system: str) -> Lesson:
    """Writes an example for the student, and for the teacher, who is told `system` before it.

    Raises:
      ValueError: naming the example, if it is no chat with an answer, or its answers are not written alike for both.
    """
    if example.text is not None or not example.messages or example.messages[-1]["role"] != "assistant":
        raise ValueError(f"{example.name}: is no chat that ends with an answer; distillation takes these alone")
    told = example._replace(messages=_told(example.messages, system))
    read = [_cut(packing.tokens(format, x)) for x in (example, told)]
    answers = [x.ids[1:][x.learn[1:]] for x in read]
    if not np.array_equal(*answers):
        raise ValueError(f"{example.name}: with config.teacher.system the chat template writes its answers otherwise")
    asked = [chat.prompt(format, x.messages[:-1], x.tools) for x in (example, told)]
    return Lesson(example, *read, (asked[0], asked[1]))


def prompt(format: chat.Format, asked: kinds.Asked, system: str) -> Lesson:
    """Writes a prompt, whose answer the student is to give, for both; the teacher is told `system` before it."""
    told = _told(asked.messages, system)
    ours, theirs = (chat.prompt(format, messages, asked.tools) for messages in (asked.messages, told))
    student, teacher = (packing.Tokens(asked.name, ids, np.zeros(len(ids), bool)) for ids in (ours, theirs))
    return Lesson(asked, student, teacher, (ours, theirs))


def batch(lessons: Sequence[Lesson], data: Data, rows: int = 0) -> dict[str, Any]:
    """Rows for the student as `packing.batch` makes them, and under `teacher` those for the teacher.

    Args:
      lessons: at most B.
      data: says how long rows are.
      rows: B, if there may be fewer lessons; the other rows have nothing in them.
    """
    fill = [[]] * (rows - len(lessons))
    students = packing.batch([[x.student] for x in lessons] + fill, data.lengths[0])
    return students | {"teacher": packing.batch([[x.teacher] for x in lessons] + fill, data.lengths[1])}


class Sampler:
    """Puts what the student says itself in place of the data's answers.

    Args:
      apply: `decoder.forward_with_cache`, or a function that stands for it.
      shape: the student's.
      stop: tokens that end an answer.
      width: W.
      max_new: N.
      temperature: of the softmax that is drawn from.
    """

    def __init__(
        self, apply: Callable, shape: DecoderConfig, stop: Sequence[int], width: int, max_new: int, temperature: float
    ):
        self.apply, self.shape, self.stop = apply, shape, stop
        self.width, self.max_new, self.temperature = width, max_new, temperature

    def __call__(self, tree: Tree, lessons: Sequence[Lesson], key: jax.Array, rows: int) -> list[Lesson]:
        """The lessons, at most `rows`, with answers drawn from a student."""
        asked = [x.asked[0] for x in lessons]
        asked += [asked[0]] * (rows - len(asked))
        tokens = np.stack([np.pad(ids, (0, self.width - len(ids))) for ids in asked])
        lengths = np.array([len(ids) for ids in asked])
        drawn = generate.generate(
            tree, self.shape, tokens, lengths, self.max_new, self.stop, key, self.temperature, self.apply
        )
        said = zip(lessons, *map(np.asarray, hosts.whole(drawn)), strict=False)
        return [_answered(x, answer[:n]) for x, answer, n in said]


def _cut(tokens: packing.Tokens) -> packing.Tokens:
    """Without what follows the last answer."""
    return packing.fit([tokens], tokens.inputs)[0][0]


def _answered(x: Lesson, answer: np.ndarray) -> Lesson:
    def tokens(asked: np.ndarray) -> packing.Tokens:
        ids = np.concatenate([asked, answer]).astype(np.int32)
        return packing.Tokens(x.example.name, ids, np.arange(len(ids)) >= len(asked))

    return x._replace(student=tokens(x.asked[0]), teacher=tokens(x.asked[1]))


def _told(messages: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
