"""What a quantised base costs in loss: SmolLM2-135M, each format, with and without LoftQ.

The mean loss of a learned token, in nats, on held-out examples in the model's chat format, as `train/sft.py` evaluates
them but with several in a row: the first 32 solutions of GSM8K's test set, and 64 held-out sums of
`configs/quickstart.py`. All linear weights are quantised, in float32; the tied embedding is not. LoftQ is of rank 16 on
the same weights, its alternations 1 and 5; 0 is the quantised base alone.

    python -m benchmarks.quantised      # LORA_JAX_DATA says where gsm8k/test.jsonl is

Writes benchmarks/results/quantised.json after each row, and goes on from what is there.
"""

import functools
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from configs import quickstart
from lora_jax.data import chat, packing, sources
from lora_jax.interop import hf
from lora_jax.loftq import loftq
from lora_jax.models import decoder
from lora_jax.quant import FORMATS
from lora_jax.quantize import quantize
from train import heldout, loop, objective

RESULT = Path(__file__).parent / "results" / "quantised.json"
GSM8K, SUMS = 32, 64
LENGTH, BATCH = 512, 4
SPEC = lora.Spec(rank=16, alpha=32)
ROWS = [("float32", 0), *((format, steps) for steps in (0, 1, 5) for format in FORMATS)]


def main() -> None:
    model = hf.load("smollm2", jnp.float32)
    rows = {
        task: packing.rows(tokens, LENGTH, pack=True) for task, tokens in examples(model, loop.started(Path())).items()
    }
    nll = functools.partial(
        objective.negative_log_likelihood,
        shape=model.config,
        learned=packing.most_learned([row for some in rows.values() for row in some]),
        packed=True,
    )
    measure = jax.jit(lora.lift(nll))
    sites = lora.trace(decoder.forward, model.params, np.zeros((1, 8), np.int32), model.config)

    result = json.loads(RESULT.read_text()) if RESULT.exists() else about(rows)
    done = {(row["format"], row["loftq"]) for row in result["rows"]}
    for format, steps in ROWS:
        if (format, steps) in done:
            continue
        params, adapters = model.params, {}
        if steps:
            params, adapters = loftq(jax.random.key(0), params, sites, SPEC, {"all-linear": format}, steps)
        elif format != "float32":
            params = quantize(params, sites, {"all-linear": format})
        tree = lora.attach(params, adapters)
        losses = {f"loss_{task}": heldout.loss(measure, tree, some, LENGTH, BATCH) for task, some in rows.items()}
        sizes = {"bytes": lora.nbytes(params), "adapter_bytes": lora.nbytes(adapters)}
        result["rows"].append({"format": format, "loftq": steps, **losses, **sizes})
        print(result["rows"][-1], flush=True)
        loop.write(RESULT, json.dumps(result, indent=1) + "\n")


def examples(model: hf.Checkpoint, now) -> dict[str, list[packing.Tokens]]:
    """The held-out examples of both tasks, as tokens."""
    config = quickstart.get_config()
    path = Path(os.environ.get("LORA_JAX_DATA", "../shared/data")) / "gsm8k" / "test.jsonl"
    solutions = sources.load(str(path), {"prompt": "question", "completion": "answer"})[:GSM8K]
    sums = sources.split(sources.load(config.data.source, {}), config.data.heldout, config.seed)[1][:SUMS]
    format = chat.Format(model.tokenizer, model.chat_template, model.special, now)
    return {"gsm8k": packing.tokenize(format, solutions), "sums": packing.tokenize(format, sums)}


def about(rows: dict[str, list[packing.Row]]) -> dict:
    """What is measured, and with what."""
    learned = {task: int(packing.batch(some, LENGTH)["weights"].sum()) for task, some in rows.items()}
    return {
        "what": f"nats per learned token: {learned['gsm8k']} of {GSM8K} solutions, {learned['sums']} of {SUMS} sums",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "rows": [],
    }


if __name__ == "__main__":
    main()
