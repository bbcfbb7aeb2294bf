"""What was trained beside its base: `python -m train.evaluate --adapter=runs/gsm8k --source=test.jsonl --task=gsm8k`.

Each `--adapter` is the folder of a run, whose best checkpoint counts, or of an adapter in PEFT's files; all answer the
same questions as the base, and the differences to it are paired. Prints a table with 95% confidence intervals, and
writes everything to `--out`.

Tasks: "loss" is that of the answers; "choice" takes the likeliest of several answers, as it is and for its length in
bytes; and every reward scores what the model answers when it takes the likeliest token: "exact", "gsm8k",
"reasoning_gym", or a "module:function" of your own.
"""

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from lora_jax.data import chat
from lora_jax.interop import hf
from lora_jax.trace import table
from train import intervals, launch, loop, measures, methods, trained

BASE = "base"


def main(_: list[str]) -> None:
    """Reads the command line, evaluates and prints."""
    if not SOURCE.value:
        raise ValueError("no --source: give a file or folder of examples, or reasoning_gym:TASK")
    for pair in COLUMNS.value:
        if "=" not in pair:
            raise ValueError(
                f"--columns={pair}: write the column and the source's name for it, such as prompt=question"
            )
    columns = dict(pair.split("=", 1) for pair in COLUMNS.value)
    asked = measures.Settings(SOURCE.value, columns, N.value, MAX_NEW.value, BATCH_SIZE.value)
    folders = [Path(folder) for folder in ADAPTERS.value]
    found = evaluate(base(MODEL.value, folders), folders, TASK.value, asked)
    print(shown(found))
    if OUT.value:
        loop.write(Path(OUT.value), json.dumps(found, indent=1) + "\n")


def base(model: str, folders: Sequence[Path]) -> hf.Checkpoint:
    """Loads what all adapters were trained over.

    Args:
      model: its name; if empty, the runs' own, or the one that the first adapter names.
      folders: of the adapters.

    Raises:
      FileNotFoundError, ValueError: a folder is no run, or two runs were trained over different bases.
    """
    runs = {folder: trained.settings(folder) for folder in folders if not trained.is_peft(folder)}
    first = next(iter(runs), None)
    wanted = trained.settings(first or next(iter(folders), None))
    for folder, run in runs.items():
        for name in ("model", "dtype", "quantize"):
            if run[name] != wanted[name]:
                raise ValueError(
                    f"{folder}: trained with {name}={run[name]!r}, {first} with {wanted[name]!r}; compare what was "
                    "trained over one base"
                )
    config = ConfigDict(wanted | {"model": model or wanted["model"]})
    return methods.load(config, jnp.dtype(config.dtype or loop.base_dtype()))


def evaluate(model: hf.Checkpoint, folders: Sequence[Path], task: str, settings: measures.Settings) -> dict[str, Any]:
    """Measures the base and what was trained over it, one after the other.

    Args:
      model: the base.
      folders: of runs and PEFT adapters.
      task: as `measures.make`.
      settings: which examples, and how.

    Returns:
      JSON: `task`, `source`, `examples` by name, and `results`: for the base and each folder its `name`, `metrics`
      (`value`, `low`, `high`, and but for the base their `difference`), the examples' `scores`, and what was `said`.

    Raises:
      FileNotFoundError, ValueError: with one line that says what to change.
    """
    format = chat.Format(model.tokenizer, model.chat_template, model.special, datetime.datetime.now())
    measure = measures.make(task, settings, model, format)
    results: list[dict[str, Any]] = []
    first: measures.Scores | None = None
    for name, tree in _candidates(model, folders):
        scores = measure.take(tree)
        first = first or scores
        metrics = {}
        for metric, (values, weights) in scores.numbers.items():
            metrics[metric] = intervals.mean(values, weights)._asdict()
            if scores is not first:
                apart = intervals.difference(values, first.numbers[metric][0], weights)
                metrics[metric]["difference"] = apart._asdict()
        each = {metric: (values / weights).tolist() for metric, (values, weights) in scores.numbers.items()}
        results.append({"name": name, "metrics": metrics, "scores": each, "said": list(scores.said)})
        print(
            f"{name}: " + ", ".join(f"{metric} {found['value']:.4f}" for metric, found in metrics.items()), flush=True
        )
    return {"task": task, "source": settings.source, "examples": measure.names, "results": results}


def shown(found: dict[str, Any]) -> str:
    """The results as a table, a row for each metric of each candidate."""
    rows = [("", "metric", "value", "95%", "against base", "95%")]
    for result in found["results"]:
        for metric, x in result["metrics"].items():
            apart = x.get("difference")
            gap = (f"{apart['value']:+.4f}", f"{apart['low']:+.4f} to {apart['high']:+.4f}") if apart else ("", "")
            rows.append((result["name"], metric, f"{x['value']:.4f}", f"{x['low']:.4f} to {x['high']:.4f}", *gap))
    return f"\n{len(found['examples']):,} examples of {found['source']}\n{table(rows)}"


def _candidates(model: hf.Checkpoint, folders: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    yield BASE, model.params
    for folder in folders:
        yield str(folder), trained.load(folder, model)


if __name__ == "__main__":
    MODEL = flags.DEFINE_string("model", "", 'a model; empty: that of the first run or adapter, or "smollm2"')
    ADAPTERS = flags.DEFINE_multi_string(
        "adapter", [], "folder of a run or of a PEFT adapter; may be given several times"
    )
    SOURCE = flags.DEFINE_string("source", "", "examples: a file or folder, tfds:NAME, hf:NAME, reasoning_gym:TASK")
    TASK = flags.DEFINE_string(
        "task", "loss", '"loss", "choice", "exact", "gsm8k", "reasoning_gym", or "module:function"'
    )
    COLUMNS = flags.DEFINE_list(
        "columns", [], "the source's own names for columns, such as prompt=question,answer=solution"
    )
    N = flags.DEFINE_integer("n", 0, "examples, the first ones; 0: all", lower_bound=0)
    MAX_NEW = flags.DEFINE_integer("max_new", 256, "tokens in an answer", lower_bound=1)
    BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "examples at once", lower_bound=1)
    OUT = flags.DEFINE_string("out", "", "a JSON file for all numbers and answers; empty: none")
    launch.run(main)
