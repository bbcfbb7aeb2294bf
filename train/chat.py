"""Talk to a model: `python -m train.chat`, or, with what was trained, `--adapter=runs/quickstart`.

Type a line; an empty one, or the end of the input, ends the chat. Of a run the best checkpoint answers.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from lora_jax import soft
from lora_jax.data import chat
from lora_jax.models import decoder
from train import launch, loop, methods, trained

MODEL = flags.DEFINE_string("model", "", 'a model; empty: the one the adapter was trained on, or "smollm2"')
ADAPTER = flags.DEFINE_string("adapter", "", "folder of a run, or of a PEFT adapter; empty: the base alone")
MAX_NEW = flags.DEFINE_integer("max_new", 256, "tokens in an answer", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "of the tokens drawn")
BUCKET, SLOTS = 64, 2048  # prompts are padded to multiples of the one; the other is the size of the cache


def main(_: list[str]) -> None:
    """Reads lines and answers them."""
    folder = Path(ADAPTER.value) if ADAPTER.value else None
    run = trained.settings(folder)
    run |= {"model": MODEL.value or run["model"]}
    dtype = jnp.dtype(run["dtype"] or loop.base_dtype())
    model = methods.load(ConfigDict(run), dtype)
    tree = trained.load(folder, model) if folder else model.params
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(folder or Path()))
    key, messages = jax.random.key(SEED.value), []
    while question := _line():
        messages.append({"role": "user", "content": question})
        key, now = jax.random.split(key)
        said = ""
        for text in answer(tree, model.config, dtype, format, chat.prompt(format, messages), now):
            print(text[len(said) :], end="", flush=True)
            said = text
        print(flush=True)
        # A model without a template continues a text; it holds no conversation.
        messages = [*messages, {"role": "assistant", "content": said}] if format.template else []


def answer(
    tree: Any, config: Any, dtype: Any, format: chat.Format, prompt: np.ndarray, key: jax.Array
) -> Iterator[str]:
    """Yields the answer to a prompt as it grows, token by token."""
    step = _step(config, TEMPERATURE.value)
    width = -(-len(prompt) // BUCKET) * BUCKET
    slots = min(soft.room(tree, config), SLOTS)
    if width + MAX_NEW.value > slots:
        raise ValueError(
            f"{len(prompt)} tokens of chat and {MAX_NEW.value} of an answer are more than {slots}: begin anew"
        )
    cache = decoder.init_cache(config, 1, slots, dtype)
    tokens_BT = np.pad(prompt, (0, width - len(prompt)))[None]
    positions_BT = np.where(np.arange(width) < len(prompt), np.arange(width), -1)[None]
    ids: list[int] = []
    while len(ids) < MAX_NEW.value:
        token_B, cache = step(tree, tokens_BT, positions_BT, cache, jax.random.fold_in(key, len(ids)))
        ids.append(int(token_B[0]))
        if ids[-1] in format.special.stop:
            break
        tokens_BT, positions_BT = token_B[:, None], np.full((1, 1), len(prompt) + len(ids) - 1)
        text = chat.answer(format, ids)
        if not text.endswith("\ufffd"):  # the bytes of a letter may be several tokens
            yield text
    yield chat.answer(format, ids)


@functools.cache
def _step(config: Any, temperature: float) -> Any:
    """One call of the model on the next tokens, and the token it chooses; the cache is written in place."""
    speak = methods.applied(decoder.forward_with_cache)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(tree, tokens_BT, positions_BT, cache, key):
        logits_BV, cache = speak(tree, tokens_BT, config, positions_BT, cache)
        if temperature:
            return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32), cache
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

    return step


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    launch.run(main)
