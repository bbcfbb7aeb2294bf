"""From a config's data section to rows of tokens: what is trained on, and what is held out."""

import collections
import hashlib
from typing import NamedTuple

from lora_jax.data import chat, packing, sources
from train.config import Config


class Data(NamedTuple):
    """What a run trains on and evaluates on.

    Args:
      rows: to train on.
      heldout_rows: to evaluate on, one example in each.
      asked: the held-out examples whose questions are to be answered.
      length: places in a row.
      digest: of the rows' content, order and size in a batch: a run goes on only with the same.
    """

    rows: list[packing.Row]
    heldout_rows: list[packing.Row]
    asked: list[sources.Example]
    length: int
    digest: str


def prepare(config: Config, format: chat.Format, context: int) -> Data:
    """Reads, splits, tokenizes and lays out the examples, and says how many there are and what is left out.

    Args:
      config: of the whole run.
      format: how the model writes chats.
      context: positions that the model knows.

    Returns:
      The data.

    Raises:
      FileNotFoundError, ValueError: naming the file, line or example, and what is wrong.
    """
    settings = config.data
    columns = {"prompt": settings.prompt, "completion": settings.completion, **settings.columns}
    examples = sources.load(settings.source, columns)
    recognised = collections.Counter(example.format for example in examples)
    if settings.heldout_source:
        held = sources.load(settings.heldout_source, columns)[: settings.heldout]
        training = sources.without(examples, held)
    else:
        training, held = sources.split(examples, settings.heldout, config.seed)
    tokens = packing.tokenize(format, training)
    longest = packing.longest(tokens)
    length = settings.length or min(longest, context)
    if length > context:
        raise ValueError(f"config.data.length={length} is more than the {context} positions that the model knows")
    kept, long = packing.fit(tokens, length, settings.truncate)
    held_kept, held_long = packing.fit(packing.tokenize(format, held), length, settings.truncate)
    print(
        f"{settings.source}: {', '.join(f'{count:,} {name}' for name, count in recognised.items())}; "
        f"{len(kept):,} examples to train on, {len(held_kept):,} held out "
        f"(no question of these is trained on), up to {length} tokens"
    )
    if long or held_long:
        print(
            f"{len(long) + len(held_long):,} examples are longer than {length} tokens and left out, such as "
            f"{(long + held_long)[0].name} (config.data.length and config.data.truncate decide)"
        )
    if not kept or not held_kept:
        raise ValueError(f"{settings.source}: every example is longer than config.data.length={length} tokens")
    names = {example.name for example in held_kept}
    asked = [e for e in held if e.name in names and e.messages[-1]["role"] == "assistant"][: config.eval.answers]
    widest = max((len(chat.prompt(format, example.messages[:-1])) for example in asked), default=0)
    if asked and widest + config.eval.max_new > context:
        raise ValueError(
            f"a question of {widest} tokens and config.eval.max_new={config.eval.max_new} are more than the "
            f"{context} positions that the model knows"
        )
    digest = hashlib.sha256(f"{config.seed} {config.batch_size} {length} {settings.pack}".encode())
    for example in kept:
        digest.update(example.ids.tobytes() + example.learn.tobytes())
    return Data(
        packing.rows(kept, length, settings.pack),
        packing.rows(held_kept, length),
        asked,
        length,
        digest.hexdigest()[:16],
    )
