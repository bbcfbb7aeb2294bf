"""E2E NLG: BLEU and loss of LoRA beside full fine-tuning, with the same tokens in the same order.

    python -m benchmarks.e2e --config=configs/e2e.py                # LORA_JAX_DATA says where e2e_nlg is
    python -m benchmarks.e2e --config=configs/e2e.py --multiple=0.33 --multiple=1 --multiple=3

Trains each method at multiples of its own learning rate, and answers every table of the test set once, greedily, with
its best checkpoint. BLEU is sacrebleu's, of the corpus, against all references of a table. The base, untrained, is
a row of its own. Writes the result after each row, and goes on from what is there.
"""

import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import sacrebleu
from absl import flags
from ml_collections import ConfigDict

from lora_jax.data import chat, sources
from lora_jax.interop import hf
from lora_jax.models import decoder
from train import config as settings
from train import examples, heldout, launch, loop, methods, sft, trained

MULTIPLES = flags.DEFINE_multi_float("multiple", [1.0], "of each method's own learning rate")
RESULT = flags.DEFINE_string("result", "benchmarks/results/e2e.json", "what is written")
METHODS = ("lora", "full")


def main(_: list[str]) -> None:
    config, name = launch.settings(sft.CONFIG)
    compare(config, Path(config.run or f"runs/{name}"), MULTIPLES.value, Path(RESULT.value))


def compare(config: settings.Config, folder: Path, multiples: Sequence[float], path: Path) -> None:
    """Runs what is missing of the base, and of every method at every multiple of its learning rate."""
    model = hf.load(config.model, jnp.dtype(config.dtype or loop.base_dtype()))
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(folder))
    asked, references = tables(sources.load(config.data.heldout_source, examples.columns(config)))
    result = json.loads(path.read_text()) if path.exists() else about(config, asked, references)
    done = {(row["method"], row["multiple"]) for row in result["rows"]}

    def add(row: dict[str, Any], tree: Any) -> None:
        speak, sizes = methods.applied(decoder.forward_with_cache), (config.eval.max_new, config.eval.batch_size)
        said = [answer.said for answer in heldout.answers(speak, tree, model.config, format, asked, *sizes)]
        result["rows"].append(row | {"bleu": bleu(said, references), "example": said[0]})
        print(json.dumps(result["rows"][-1]), flush=True)
        loop.write(path, json.dumps(result, indent=1) + "\n")

    if ("base", 0.0) not in done:
        add({"method": "base", "multiple": 0.0}, model.params)
    for method, multiple in itertools.product(METHODS, multiples):
        if (method, multiple) in done:
            continue
        one, run = ConfigDict({**config.to_dict(), "method": method}), folder / f"{method}-{multiple:g}"
        one.optim.lr = multiple * methods.rate(one, model.config.dim)
        sft.train(one, run, f"{method}, {one.optim.lr:.2g}")
        metrics = loop.read(run / loop.METRICS)
        losses = [line["heldout_loss"] for line in metrics if "heldout_loss" in line]
        row = {"method": method, "multiple": multiple, "rate": one.optim.lr, "steps": config.steps}
        row |= {"tokens": round(sum(line.get("tokens", 0) for line in metrics)), "loss_before": losses[0]}
        row |= {"loss": losses[-1], "loss_best": min(losses)}
        add(row, trained.from_run(run, loop.resolved(run), model))


def tables(test: Sequence[sources.Example]) -> tuple[list[sources.Example], list[list[str]]]:
    """One example for every different question, and the answers of all that ask it."""
    answers: dict[str, list[str]] = {}
    for example in test:
        answers.setdefault(example.question, []).append(example.answer)
    first = {example.question: example for example in reversed(test)}
    return [first[question] for question in answers], list(answers.values())


def bleu(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, in percent, of one answer to each question against its references, however many."""
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    return sacrebleu.corpus_bleu([text.strip() for text in said], streams).score


def about(config: settings.Config, asked: Sequence[Any], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What is measured, and with what."""
    return {
        "what": f"{len(asked)} tables, {sum(map(len, references))} references; loss on {config.data.heldout} of these",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "sacrebleu")},
        "rows": [],
    }


if __name__ == "__main__":
    launch.run(main)
