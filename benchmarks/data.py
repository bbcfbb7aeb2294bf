"""How fast text becomes batches: `python benchmarks/data.py`, with LORA_JAX_DATA where GSM8K is.

Reads GSM8K's training file, renders it with SmolLM2's chat template, tokenises, packs it best-fit into rows of 512 and
writes the batches; then the same as a stream, two passes; and the tokenizer alone, which is the most of it. The time is
that of the processor, all threads together, so that it says what one core does even where other programs run; medians
of five, and the load beside them.
"""

import collections
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from lora_jax.data import chat, packing, sources, stream
from lora_jax.interop import gguf, hf

RESULT = Path(__file__).parent / "results" / "data.json"
LENGTH, BATCH = 512, 16
COLUMNS = {"prompt": "question", "completion": "answer"}


def main() -> None:
    load = os.getloadavg()[0]
    path = Path(os.environ.get("LORA_JAX_DATA", "../shared/data")) / "gsm8k" / "train.jsonl"
    file = gguf.File(hf.packaged())
    meta = file.metadata
    end = meta["tokenizer.ggml.eos_token_id"]
    special = hf.Special(meta["tokenizer.ggml.bos_token_id"], end, None, end, (end,))
    now = datetime.datetime(2024, 7, 26)
    format = chat.Format(gguf.tokenizer(file), meta["tokenizer.chat_template"], special, now)
    examples = sources.load(str(path), COLUMNS)
    megabytes = sum(len(m["content"].encode()) for e in examples for m in e.messages) / 1e6
    texts = [format.tokenizer.decode(chat.render(format, e.messages)[0], skip_special_tokens=False) for e in examples]
    seconds = collections.defaultdict(list)

    def timed(name, work, *arguments):
        start = time.process_time()
        result = work(*arguments)
        seconds[name].append(time.process_time() - start)
        return result

    def take(batches, count):
        for _ in range(count):
            next(batches)

    for _ in range(5):
        timed("tokenizer alone", lambda: [format.tokenizer.encode(text, add_special_tokens=False) for text in texts])
        tokens = timed("render and tokenise", packing.tokenize, format, timed("read", sources.load, str(path), COLUMNS))
        rows = timed("pack", packing.rows, timed("fit", packing.fit, tokens, LENGTH)[0], LENGTH, True)
        timed("batches", take, packing.iterate(rows, LENGTH, BATCH, seed=0), len(rows) // BATCH)
        records = sources.Examples(sources.records(str(path)), COLUMNS)
        streamed = stream.Stream(records, np.arange(len(records)), format, LENGTH, truncate=False)
        batches = stream.iterate(streamed, BATCH, seed=0, pack=True)
        timed("two passes of a stream", take, batches, 2 * len(rows) // BATCH)
    seconds = {name: statistics.median(values) for name, values in seconds.items()}
    count = sum(len(example.ids) for example in tokens)
    alone, passes = seconds["tokenizer alone"], seconds["two passes of a stream"]
    rates = {
        "tokenizer alone": 1 / alone,
        "in memory": 1 / (sum(seconds.values()) - alone - passes),
        "stream": 2 / passes,
    }
    result = {
        "what": f"GSM8K train, {megabytes:.2f} MB of text, {len(tokens)} chats, {count:,} tokens",
        "processor_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "megabytes_per_second_and_core": {name: round(megabytes * value, 2) for name, value in rates.items()},
        "padding": round(packing.padding(rows, LENGTH), 4),
        "load_before": load,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
