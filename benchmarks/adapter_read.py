"""How long an adapter of an 8B model takes from its files to its base, alone and in a bank.

The adapter is PEFT's of rank 16 on all linear weights of a Llama of 32 layers, 42 million numbers in bfloat16, 84 MB,
with random values, in the disk's cache. The base is shapes alone: what is measured is reading, checking, bringing into
the axes used here, and attaching. The bank is read with `peft.load_many`, some adapters at a time, for in float32 they
are twice as large; a server keeps those that it needs. Seconds of the clock, and of the processor, which other work on
the machine does not change.

    python benchmarks/adapter_read.py [adapters in the bank]

Writes benchmarks/results/adapter_read.json.
"""

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

import lora_jax as lora
from lora_jax.interop import peft, peft_layout
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig

RESULT = Path(__file__).parent / "results" / "adapter_read.json"
SHAPE = DecoderConfig("llama", 128_256, 4096, 14_336, 32, 32, 8, 128, 8192)
RANK, TURNS, AT_ONCE = 16, 7, 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    bank = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    load_before = os.getloadavg()[0]
    params = jax.eval_shape(functools.partial(decoder.init, config=SHAPE, dtype=jnp.bfloat16), jax.random.key(0))
    with tempfile.TemporaryDirectory() as root:
        first = write(Path(root) / "0", np.random.default_rng(0))
        one = [timed(lambda: lora.attach(params, peft.load(first, SHAPE, params))) for _ in range(TURNS)]
        folders = [first, *(copied(first, Path(root) / str(i)) for i in range(1, bank))]
        waves = [folders[i : i + AT_ONCE] for i in range(0, bank, AT_ONCE)]
        together = [timed(lambda: peft.load_many(wave, SHAPE, params)) for wave in waves]  # noqa: B023
        size = (first / "adapter_model.safetensors").stat().st_size
    result = {
        "adapter_mb": size / 1e6,
        "read_and_attached": about(one),
        "bank": {"adapters": bank, "at_once": AT_ONCE, **about(together), "seconds": sum(x for x, _ in together)},
        "cpus": os.cpu_count(),
        "load_before": load_before,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "numpy", "safetensors")},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def write(folder: Path, rng: np.random.Generator) -> Path:
    """A PEFT adapter with random values."""
    folder.mkdir()
    tensors = {}
    for name, module in peft_layout.modules(SHAPE).items():
        if name.rsplit(".", 1)[-1] in TARGETS:
            for part in peft_layout.LORA:
                x = rng.normal(size=peft_layout.shape(part, module.key, SHAPE, RANK)).astype(ml_dtypes.bfloat16)
                tensors[f"{peft_layout.PREFIX}{name}.{part.suffix}"] = x
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def copied(first: Path, folder: Path) -> Path:
    """Another folder with the same files, by hard links: a bank of 8.4 GB that the disk need not hold."""
    folder.mkdir()
    for file in first.iterdir():
        os.link(file, folder / file.name)
    return folder


def timed(what: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(what()) if isinstance(leaf, jax.Array)])
    return time.perf_counter() - clock, time.process_time() - processor


def about(times: list[tuple[float, float]]) -> dict[str, float]:
    """Medians."""
    return dict(zip(("clock", "processor"), map(statistics.median, zip(*times, strict=True)), strict=True))


if __name__ == "__main__":
    main()
