"""From a config's data section to rows of tokens: what is trained on, and what is held out."""

import collections
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.data import chat, checks, packing, sources, stream
from train import hosts
from train.config import Config


class Heldout(NamedTuple):
    """Something more to evaluate on; the fields are `Data`'s."""

    heldout_rows: list[packing.Row]
    asked: list[sources.Example]


class Data(NamedTuple):
    """What a run trains on and evaluates on.

    Args:
      batches: `batches(batch_size, seed)` gives endless batches to train on, for all hosts together, as a Grain
        iterator with this one's part of the rows.
      rows: what these are made of; some of it, if it is streamed.
      learned: the most targets with a weight in a row of any batch.
      tokens: examples to train on, some of them if they are streamed.
      heldout_rows: to evaluate on.
      asked: the held-out examples whose questions are to be answered.
      length: places in a row.
      digest: of the rows' content, order and size in a batch: a run goes on only with the same.
      sets: what else to evaluate on, by name.
    """

    batches: Callable[[int, int], Any]
    rows: list[packing.Row]
    learned: int
    tokens: list[packing.Tokens]
    heldout_rows: list[packing.Row]
    asked: list[sources.Example]
    length: int
    digest: str
    sets: Mapping[str, Heldout]


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
    if settings.length > context:
        raise ValueError(
            f"config.data.length={settings.length} is more than the {context} positions that the model knows"
        )
    return (_streamed if settings.stream else _in_memory)(config, format, context)


def columns(config: Config) -> Mapping[str, str]:
    """The source's own names of columns."""
    return {"prompt": config.data.prompt, "completion": config.data.completion, **config.data.columns}


def _in_memory(config: Config, format: chat.Format, context: int) -> Data:
    settings = config.data
    weights = {settings.source: 1.0, **dict(settings.mixture)}
    parts = {source: sources.load(source, columns(config)) for source in weights}
    for source, examples in parts.items():
        recognised = collections.Counter(example.format for example in examples)
        print(f"{source}: {', '.join(f'{count:,} {name}' for name, count in recognised.items())}")
    if settings.heldout_source:
        held = sources.load(settings.heldout_source, columns(config))[: settings.heldout]
    else:
        held = sources.split([e for part in parts.values() for e in part], settings.heldout, config.seed)[1]
    more = _more(config)
    apart = held + [example for part in more.values() for example in part]
    parts = {source: sources.without(part, apart) for source, part in parts.items()}
    tokens = {source: packing.tokenize(format, part) for source, part in parts.items()}
    longest = max(map(packing.longest, tokens.values()))
    length = settings.length or min(longest, context)
    fitted = {source: fit(part, tokens[source], length, settings.truncate) for source, part in parts.items()}
    held_kept, held_long = fit(held, packing.tokenize(format, held), length, settings.truncate)
    kept = [example for part, _ in fitted.values() for example in part]
    long = [example for _, part in fitted.values() for example in part] + held_long
    print(
        f"{len(kept):,} examples to train on, {len(held_kept):,} held out "
        f"(no question of these is trained on), up to {length} tokens"
    )
    if long:
        print(
            f"{len(long):,} examples are longer than {length} tokens and left out, such as "
            f"{long[0].name} (config.data.length and config.data.truncate decide)"
        )
    for source, (part, _) in fitted.items():
        if not part or not held_kept:
            raise ValueError(f"{source}: every example is longer than config.data.length={length} tokens")
        checks.refuse(format, part, parts[source][0].text is not None)
        for line in checks.remarks(format, parts[source], tokens[source] if settings.truncate else part, length):
            print(f"{source}: {line}")
    rows = [(packing.rows(part, length, settings.pack), weights[source]) for source, (part, _) in fitted.items()]
    all_rows = [row for part, _ in rows for row in part]
    print(f"{packing.padding(all_rows, length):.1%} of the places are padding")
    mixture = f" {list(weights.items())}" if settings.mixture else ""
    digest = hashlib.sha256(f"{config.seed} {config.batch_size} {length} {settings.pack}{mixture}".encode())
    for example in kept:
        digest.update(example.ids.tobytes() + example.learn.tobytes())
    heldout_rows = packing.rows(held_kept, length, settings.pack)
    sets = _sets(config, format, more, length, context)
    evaluated = [row for part in sets.values() for row in part.heldout_rows]
    return Data(
        lambda batch_size, seed: packing.mix(rows, length, batch_size, seed, part=hosts.part(batch_size)),
        all_rows,
        packing.most_learned(all_rows + heldout_rows + evaluated),
        kept,
        heldout_rows,
        _asked(config, format, held, held_kept, context),
        length,
        digest.hexdigest()[:16],
        sets,
    )


def _streamed(config: Config, format: chat.Format, context: int) -> Data:
    settings = config.data
    length = settings.length
    if not length:
        raise ValueError("config.data.stream needs config.data.length: what is not read yet has no longest example")
    weights = {settings.source: 1.0, **dict(settings.mixture)}
    parts = [sources.Examples(sources.records(source), columns(config)) for source in weights]
    more = _more(config)
    apart = [example for part in more.values() for example in part]
    if settings.heldout_source:
        held = sources.load(settings.heldout_source, columns(config))[: settings.heldout]
        found = stream.index(parts, 0, config.seed, held + apart)
    else:
        found = stream.index(parts, settings.heldout, config.seed, apart)
        held = [part[int(i)] for part, index in zip(parts, found, strict=True) for i in index.heldout]
    held_kept, _ = fit(held, packing.tokenize(format, held), length, settings.truncate)
    streams, looked = [], []
    for source, part, index in zip(weights, parts, found, strict=True):
        streams.append((stream.Stream(part, index.training, format, length, settings.truncate), weights[source]))
        first = [part[int(i)] for i in index.training[: stream.LOOK]]
        tokens, long = fit(first, packing.tokenize(format, first), length, settings.truncate)
        if not tokens or not held_kept:
            raise ValueError(f"{source}: every example is longer than config.data.length={length} tokens")
        checks.refuse(format, tokens, index.texts)
        print(f"{source}: {len(index.training):,} {first[0].format} to train on, read as they are needed")
        if long:
            print(
                f"{len(long):,} of the first {len(first):,} examples are longer than {length} tokens; such are left "
                "out (config.data.length and config.data.truncate decide)"
            )
        looked += tokens
    print(f"{len(held_kept):,} held out (no question of these is trained on), up to {length} tokens")
    mixture = f" {list(weights.items())}" if settings.mixture else ""
    order = f"{config.seed} {config.batch_size} {length} {settings.pack}{mixture}"
    content = " ".join(index.digest for index in found)
    return Data(
        lambda batch_size, seed: stream.mix(streams, batch_size, seed, settings.pack, hosts.part(batch_size)),
        packing.rows(looked, length),
        length,
        looked,
        packing.rows(held_kept, length, settings.pack),
        _asked(config, format, held, held_kept, context),
        length,
        hashlib.sha256(f"{order} {content}".encode()).hexdigest()[:16],
        _sets(config, format, more, length, context),
    )


def _more(config: Config) -> dict[str, list[sources.Example]]:
    """The examples of every further source to evaluate on."""
    return {name: sources.load(source, columns(config))[: config.data.heldout] for name, source in config.eval.sets}


def _sets(
    config: Config, format: chat.Format, more: Mapping[str, list[sources.Example]], length: int, context: int
) -> dict[str, Heldout]:
    sets = {}
    for name, examples in more.items():
        kept, long = fit(examples, packing.tokenize(format, examples), length, config.data.truncate)
        if not kept:
            raise ValueError(f"config.eval.sets: every example of {name!r} is longer than {length} tokens")
        print(f"{name}: {len(kept):,} examples to evaluate on" + (f", {len(long):,} are too long" if long else ""))
        sets[name] = Heldout(
            packing.rows(kept, length, config.data.pack), _asked(config, format, examples, kept, context)
        )
    return sets


def fit(
    examples: Sequence[sources.Example], tokens: list[packing.Tokens], length: int, truncate: bool
) -> tuple[list[packing.Tokens], list[packing.Tokens]]:
    """`packing.fit` for chats; texts are cut into pieces, so that none is too long."""
    if examples and examples[0].text is not None:
        return list(packing.pieces(tokens, length)), []
    return packing.fit(tokens, length, truncate)


def _asked(
    config: Config,
    format: chat.Format,
    held: list[sources.Example],
    kept: list[packing.Tokens],
    context: int,
) -> list[sources.Example]:
    """The held-out examples with an answer, as many as are to be answered."""
    names = {example.name for example in kept}
    answered = (e for e in held if e.name in names and e.messages and e.messages[-1]["role"] == "assistant")
    asked = [example for example in answered if example.answer is not None][: config.eval.answers]
    widest = max((len(chat.prompt(format, e.messages[:-1], e.tools)) for e in asked), default=0)
    if asked and widest + config.eval.max_new > context:
        raise ValueError(
            f"a question of {widest} tokens and config.eval.max_new={config.eval.max_new} are more than the "
            f"{context} positions that the model knows"
        )
    return asked
