"""Look before you train: `python -m train.preview --config=configs/quickstart.py`, with the config of any trainer.

Prepares the data as training will, with the same refusals, and shows rows of it in colour: green is learned, dim is
not, and a bar stands where one example of a row ends and the next begins. Of pairs both answers are shown, and of
prompts whose answers are judged, what they are judged by. Then it counts, and draws how long the examples are. It takes
no step and writes nothing but that picture.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
import rich.text
from absl import flags

from lora_jax.data import chat, packing
from lora_jax.interop import hf
from train import config as settings
from train import (
    distill_settings,
    dpo_settings,
    examples,
    launch,
    methods,
    pairs,
    preferences,
    rl_settings,
    rollout,
    sft,
    teaching,
)

ROWS = flags.DEFINE_integer("rows", 3, "rows to show", lower_bound=0)
PICTURE = "lengths.png"
LEARNED, GIVEN, END = "bold green", "dim", "bold red"


class Shown(NamedTuple):
    """What there is to see of a trainer's data.

    Attributes:
      rows: some, each with a title.
      tokens: how many each example has.
      learned: how many of these are learned.
      length: places in a row.
      numbers: what else there is to count, in words.
    """

    rows: list[tuple[str, rich.text.Text]]
    tokens: np.ndarray
    learned: np.ndarray
    length: int
    numbers: dict[str, str]


def main(_: list[str]) -> None:
    """Reads the command line and shows."""
    config, name = launch.settings(sft.CONFIG)  # the very flag that training takes
    preview(config, Path(config.run or f"runs/{name}"), ROWS.value, rich.console.Console())


def preview(config: settings.Config, folder: Path, rows: int, console: rich.console.Console) -> None:
    """Shows what a run would train on.

    Args:
      config: of `train/sft.py`, `dpo.py`, `rl.py` or `distill.py`, told apart by the settings they have.
      folder: of the run, where the picture is written.
      rows: to show.
      console: where to.

    Raises:
      ValueError, OSError: what the trainer would raise before its first step.
    """
    kinds = {
        "reward" in config: (rl_settings.check, _prompts),
        "teacher" in config: (distill_settings.check, _lessons),
        "chosen" in config.data: (dpo_settings.check, _pairs),
    }
    check, read = kinds.get(True, (settings.check, _chats))
    check(config)
    model = hf.load(config.model, weights=False)
    format = chat.Format(model.tokenizer, model.chat_template, model.special, datetime.datetime.now())
    shown = read(config, format, methods.room(config, model.config), rows)
    for title, text in shown.rows:
        console.rule(title)
        console.print(text, soft_wrap=True)
    console.rule()
    console.print(table(shown))
    path = folder / PICTURE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        histogram(shown.tokens, shown.learned, shown.length, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); config.run says where") from None
    console.print(f"lengths: {path}")


def _chats(config: settings.Config, format: chat.Format, room: int, rows: int) -> Shown:
    data = examples.prepare(config, format, room)
    batches = data.batches(config.batch_size, config.seed)
    batch = next(batches)
    filled = np.mean([(next(batches)["segments"] > 0).mean() for _ in range(8)])
    stops = sum(bool(np.isin(e.ids[e.learn], format.special.stop).any()) for e in data.tokens)
    return Shown(
        [
            (f"row {b + 1} of the first batch", coloured(format, {name: values[b] for name, values in batch.items()}))
            for b in range(min(rows, config.batch_size))
        ],
        *_lengths(data.tokens),
        data.length,
        {
            "held out": f"{len(data.heldout_rows):,}",
            "with an end of turn that is learned": f"{stops:,}",
            "padding in a batch": f"{1 - filled:.1%}",
        },
    )


def _pairs(config: settings.Config, format: chat.Format, room: int, rows: int) -> Shown:
    data = pairs.prepare(config, format, room, config.loss in preferences.UNPAIRED)
    batch = next(pairs.batches(data, config.batch_size, config.seed))
    titles = {2: ("worse", "better"), 1: ("judged bad", "judged good")}[len(data.items[0].rows)]
    every = [row for item in data.items for row in item.rows]
    return Shown(
        [
            (
                f"row {b + 1} of the first batch: {titles[int(batch['good'][b])]}",
                coloured(format, {name: batch[name][b] for name in packing.batch([every[:1]], data.length)}),
            )
            for b in range(min(rows * len(data.items[0].rows), len(batch["good"])))
        ],
        *_lengths(every),
        data.length,
        {
            "pairs" if len(data.items[0].rows) == 2 else "judged": f"{len(data.items):,}",
            "held out": f"{len(data.heldout):,}",
            "judged good": f"{sum(good for item in data.items for good in item.good):,}",
        },
    )


def _lessons(config: settings.Config, format: chat.Format, room: int, rows: int) -> Shown:
    data = teaching.prepare(config, format, (room, room))
    taught = [(lesson.student, lesson.teacher) for lesson in data.lessons[:rows]]
    return Shown(
        [
            (f"lesson {i + 1}, as the {who} reads it", coloured(format, _row(tokens)))
            for i, both in enumerate(taught)
            for who, tokens in zip(("student", "teacher"), both, strict=True)
        ],
        *_lengths([lesson.student for lesson in data.lessons]),
        data.lengths[0],
        {"held out": f"{len(data.heldout):,}"},
    )


def _prompts(config: settings.Config, format: chat.Format, room: int, rows: int) -> Shown:
    prompts = rollout.prepare(config, format, room)

    def text(prompt: rollout.Prompt) -> rich.text.Text:
        asked = rich.text.Text(format.tokenizer.decode(prompt.ids.tolist(), skip_special_tokens=False), GIVEN)
        return asked.append(" ┃ ", END).append(str(prompt.entry["answer"]), LEARNED)

    tokens = np.array([len(prompt.ids) for prompt in prompts.training])
    return Shown(
        [(f"prompt {i + 1}, and what is right", text(prompt)) for i, prompt in enumerate(prompts.training[:rows])],
        tokens,
        np.zeros_like(tokens),
        prompts.width,
        {
            "held out": f"{len(prompts.heldout):,}",
            "answers in a step": f"{config.sampler.prompts * config.sampler.samples:,}",
        },
    )


def _row(tokens: packing.Tokens) -> packing.Batch:
    """The arrays [T] of one example that has a row to itself."""
    return {name: values[0] for name, values in packing.batch([[tokens]], tokens.inputs).items()}


def _lengths(tokens: Sequence[packing.Tokens]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([len(e.ids) for e in tokens]), np.array([e.learn[1:].sum() for e in tokens])


def coloured(format: chat.Format, row: packing.Batch) -> rich.text.Text:
    """A row of a batch as text, every token in the colour of what happens to it.

    Args:
      format: of the model.
      row: arrays [T].

    Returns:
      Text with styles `LEARNED`, `GIVEN` and, between examples, `END`.
    """
    text = rich.text.Text()
    for segment in range(1, int(row["segments"].max(initial=0)) + 1):
        at = row["segments"] == segment
        if segment > 1:
            text.append(" ┃ ", END)
        ids = np.concatenate([row["tokens"][at][:1], row["targets"][at]])
        learned = np.concatenate([[False], row["weights"][at] > 0])
        begin = 0
        for end in range(1, len(ids) + 1):  # runs of one kind, for the bytes of a letter may be several tokens
            if end == len(ids) or learned[end] != learned[begin]:
                said = format.tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
                text.append(said, LEARNED if learned[begin] else GIVEN)
                begin = end
    places = int((row["segments"] == 0).sum())
    text.append(f" ┃ {places} places of padding" if places else " ┃", END)
    return text


def table(shown: Shown) -> rich.table.Table:
    """What there is, in numbers."""
    tokens, learned = shown.tokens, shown.learned
    numbers = {
        "examples": f"{len(tokens):,}",
        "tokens": f"{tokens.sum():,} ({tokens.min()} to {tokens.max()}, half of them up to {int(np.median(tokens))})",
        "learned": f"{learned.sum():,}, {learned.sum() / tokens.sum():.1%} of all",
        "places in a row": f"{shown.length:,}",
        **shown.numbers,
    }
    drawn = rich.table.Table(show_header=False, box=None)
    for name, number in numbers.items():
        drawn.add_row(name, number)
    return drawn


def histogram(tokens: Sequence[int] | np.ndarray, learned: Sequence[int] | np.ndarray, length: int, path: Path) -> None:
    """Draws how many examples have how many tokens, and how many of these are learned."""
    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    bins = np.linspace(0, max(*tokens, length), 41).tolist()
    axes.hist(tokens, bins, label="tokens", color="0.7")
    axes.hist(learned, bins, label="learned", color="tab:green", alpha=0.6)
    axes.axvline(length, color="tab:red", linewidth=1, label="a row")
    axes.set(xlabel="tokens in an example", ylabel="examples")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    launch.run(main, settings.sft)
