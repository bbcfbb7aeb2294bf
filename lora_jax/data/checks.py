"""Mistakes in data that no error would ever tell of: a model trains on them, and comes out wrong."""

from collections.abc import Sequence

import numpy as np

from lora_jax.data import chat, packing, sources

ASKED = 64  # examples whose prompt is compared with what is trained on


def refuse(format: chat.Format, tokens: Sequence[packing.Tokens], texts: bool = False) -> None:
    """Stops what cannot be meant.

    Args:
      format: of the model.
      tokens: what is to be trained on.
      texts: whether these are texts, of which everything is learned.

    Raises:
      ValueError: if a text begins twice, if nothing ever ends what the assistant says, if prompts are learned, or if
        all that is learned is where to stop.
    """
    stop, bos = format.special.stop, format.special.bos
    for example in tokens:
        if bos is not None and len(example.ids) > 1 and example.ids[0] == example.ids[1] == bos:
            raise ValueError(
                f"{example.name}: begins with two beginning tokens ({format.tokenizer.id_to_token(bos)!r}); the "
                "template writes one, so take it out of the messages"
            )
    if texts or not tokens:
        return
    learned = [example.ids[1:][example.learn[1:]] for example in tokens]
    if all(example.learn[1:].all() for example in tokens):
        raise ValueError(
            f"{tokens[0].name}, as every other example, is learned from its first token to its last, the prompt too: "
            "nothing is asked in these chats, or the template's marks surround all of them; give texts as 'text'"
        )
    if not any(np.isin(ids, stop).any() for ids in learned):
        names = ", ".join(repr(format.tokenizer.id_to_token(i)) for i in stop) or "none is known"
        raise ValueError(
            f"{tokens[0].name}, as every other example, never shows where to stop: no token that ends a turn ({names}) "
            "is learned, so the model would talk on for ever; see what the template writes after an answer, and what "
            "eos_token_id the model's generation_config.json has"
        )
    if all(np.isin(ids, stop).all() for ids in learned):
        raise ValueError(f"{tokens[0].name}, as every other example, has an empty answer: only its end is learned")


def remarks(
    format: chat.Format, examples: Sequence[sources.Example], tokens: Sequence[packing.Tokens], length: int
) -> list[str]:
    """What may be meant, but is worth knowing.

    Args:
      format: of the model.
      examples: to train on.
      tokens: the same, as far as they are kept, before anything is cut off to fit.
      length: places in a row, T.

    Returns:
      A line for each kind of thing, with a number and an example.
    """
    stop = format.special.stop
    ends = [name for i in stop if (name := format.tokenizer.id_to_token(i))]
    chats = [example for example in examples if example.text is None]
    kinds = {
        "say an end of turn within a message, which is a real one to the model": [
            e.name for e in chats if any(end in (m.get("content") or "") for m in e.messages for end in ends)
        ],
        "learn from an answer with nothing in it": [
            e.name for e in tokens if chats and np.isin(e.ids[1:][e.learn[1:]], stop).all()
        ],
        f"are cut at {length} tokens, before the end of their answer": [
            e.name for e in tokens if chats and np.flatnonzero(e.learn)[-1] > length
        ],
        "are trained on with another beginning than they will be asked with (the template writes it otherwise when an "
        "answer follows)": [e.name for e in chats[:ASKED] if not _asked_alike(format, e)],
    }
    return [f"{len(names):,} examples {what}, such as {names[0]}" for what, names in kinds.items() if names]


def _asked_alike(format: chat.Format, example: sources.Example) -> bool:
    """Whether what comes before the last answer is what the model is given when it is to answer."""
    if example.messages[-1]["role"] != "assistant":
        return True
    ids, learn = chat.render(format, example.messages, example.tools)
    asked = chat.prompt(format, example.messages[:-1], example.tools)
    # The last tokens of a prompt may merge with what follows.
    begin = len(asked) - 1
    return bool(learn.any()) and np.array_equal(ids[:begin], asked[:begin])
