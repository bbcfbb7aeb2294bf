"""Look before you train: `python -m train.preview --config=configs/quickstart.py`.

Prepares the data as `train/sft.py` will, with the same refusals, and shows rows of it in colour: green is learned, dim
is not, and a bar stands where one example of a row ends and the next begins. Then it counts, and draws how long the
examples are. It takes no step and writes nothing but that picture.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path

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
from train import examples, launch, methods, sft

ROWS = flags.DEFINE_integer("rows", 3, "rows to show", lower_bound=0)
PICTURE = "lengths.png"
LEARNED, GIVEN, END = "bold green", "dim", "bold red"


def main(_: list[str]) -> None:
    """Reads the command line and shows."""
    config, name = launch.settings(sft.CONFIG)  # the very flag that training takes
    preview(config, Path(config.run or f"runs/{name}"), ROWS.value, rich.console.Console())


def preview(config: settings.Config, folder: Path, rows: int, console: rich.console.Console) -> None:
    """Shows what a run would train on.

    Args:
      config: from `train/config.py`.
      folder: of the run, where the picture is written.
      rows: to show.
      console: where to.

    Raises:
      ValueError, OSError: what `train/sft.py` would raise before its first step.
    """
    settings.check(config)
    model = hf.load(config.model, weights=False)
    format = chat.Format(model.tokenizer, model.chat_template, model.special, datetime.datetime.now())
    data = examples.prepare(config, format, methods.room(config, model.config))
    batch = next(data.batches(config.batch_size, config.seed))
    for b in range(min(rows, config.batch_size)):
        console.rule(f"row {b + 1} of the first batch")
        console.print(coloured(format, {name: values[b] for name, values in batch.items()}), soft_wrap=True)
    console.rule()
    console.print(table(format, data, config.batch_size))
    path = folder / PICTURE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        histogram([len(e.ids) for e in data.tokens], [int(e.learn.sum()) for e in data.tokens], data.length, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); config.run says where") from None
    console.print(f"lengths: {path}")


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


def table(format: chat.Format, data: examples.Data, batch_size: int) -> rich.table.Table:
    """What there is, in numbers."""
    tokens = np.array([len(example.ids) for example in data.tokens])
    learned = np.array([example.learn[1:].sum() for example in data.tokens])
    stops = sum(bool(np.isin(e.ids[e.learn], format.special.stop).any()) for e in data.tokens)
    batches = data.batches(batch_size, 0)
    filled = np.mean([(next(batches)["segments"] > 0).mean() for _ in range(8)])
    numbers = {
        "examples": f"{len(tokens):,}",
        "held out": f"{len(data.heldout_rows):,}",
        "tokens": f"{tokens.sum():,} ({tokens.min()} to {tokens.max()}, half of them up to {int(np.median(tokens))})",
        "learned": f"{learned.sum():,}, {learned.sum() / tokens.sum():.1%} of all",
        "with an end of turn that is learned": f"{stops:,}",
        "places in a row": f"{data.length:,}",
        "padding in a batch": f"{1 - filled:.1%}",
    }
    shown = rich.table.Table(show_header=False, box=None)
    for name, number in numbers.items():
        shown.add_row(name, number)
    return shown


def histogram(tokens: Sequence[int], learned: Sequence[int], length: int, path: Path) -> None:
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
