"""How fast text becomes batches: `python benchmarks/data.py`, with LORA_JAX_DATA where GSM8K is.

Reads GSM8K's training file, renders it with SmolLM2's chat template, tokenises, packs it best-fit into rows of 512 and
writes the batches; then the same as a stream. The time is that of the processor, all threads together, so that it says
what one core does even where other programs run; the load is reported beside it.
"""

import datetime
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from lora_jax.data import chat, packing, sources, stream
from lora_jax.interop import gguf, hf

RESULT = Path(__file__).parent / "results" / "data.json"
LENGTH, BATCH = 512, 16
COLUMNS = {"prompt": "question", "completion": "answer"}


def main() -> None:
    path = Path(os.environ.get("LORA_JAX_DATA", "../shared/data")) / "gsm8k" / "train.jsonl"
    file = gguf.File(hf.packaged())
    meta = file.metadata
    end = meta["tokenizer.ggml.eos_token_id"]
    special = hf.Special(meta["tokenizer.ggml.bos_token_id"], end, None, end, (end,))
    now = datetime.datetime(2024, 7, 26)
    format = chat.Format(gguf.tokenizer(file), meta["tokenizer.chat_template"], special, now)
    examples = sources.load(str(path), COLUMNS)
    megabytes = sum(len(m["content"].encode()) for e in examples for m in e.messages) / 1e6
    packing.tokenize(format, examples[:100])  # the template is compiled, the tokenizer warm

    seconds = {}

    def timed(name, work):
        start = time.process_time()
        result = work()
        seconds[name] = time.process_time() - start
        return result

    timed("read", lambda: sources.load(str(path), COLUMNS))
    tokens = timed("render and tokenise", lambda: packing.tokenize(format, examples))
    ids, kept = [example.ids for example in tokens], packing.fit(tokens, LENGTH)[0]
    rows = timed("pack", lambda: packing.rows(kept, LENGTH, pack=True))
    batches = packing.iterate(rows, LENGTH, BATCH, seed=0)
    timed("batches", lambda: [next(batches) for _ in range(len(rows) // BATCH)])
    records = sources.Examples(sources.records(str(path)), COLUMNS)
    streamed = stream.iterate(
        stream.Stream(records, np.arange(len(records)), format, LENGTH, truncate=False), BATCH, seed=0, pack=True
    )
    timed("the same as a stream", lambda: [next(streamed) for _ in range(len(rows) // BATCH)])
    whole = sum(value for name, value in seconds.items() if name != "the same as a stream")
    result = {
        "what": f"GSM8K train, {megabytes:.2f} MB of text, {len(examples)} chats, {sum(map(len, ids))} tokens",
        "processor_seconds": {name: round(value, 3) for name, value in seconds.items()},
        "megabytes_per_second_and_core": round(megabytes / whole, 2),
        "as_a_stream": round(megabytes / seconds["the same as a stream"], 2),
        "padding": round(packing.padding(rows, LENGTH), 4),
        "load_before": os.getloadavg()[0],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
