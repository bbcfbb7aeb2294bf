"""A LoRA step on this machine: the peak that a plan says, and that of the process; `plan_compiled_test.py` runs it.

The measured one is the process's largest resident memory while the step runs (the kernel's VmHWM, reset before), less
what was resident after compiling and before any array was made. Prints JSON.
"""

import ctypes
import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.config import DecoderConfig
from train import config as settings
from train import forecast, plan, programs, topology

SHAPE = DecoderConfig("llama", 8192, 1024, 2816, 8, 16, 8, 64, 1024)
STATUS, RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def resident(name):
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def main(remat):
    where = topology.get("here")
    config = settings.sft()
    with config.unlocked():
        config.update({"batch_size": 4, "remat": remat, "mesh": "data=1"})
    mesh = plan.mesh_of(config, where)
    program = programs.training(config, SHAPE, mesh, jnp.float32, 512, 512)
    found = forecast.make(program, mesh, where)
    step = program.lowered.compile()
    key = jax.random.key(0)
    trim()  # of what compiling has left
    before = resident("VmRSS")
    # Copied, not computed: nothing more is compiled.
    parts = [jax.tree.map(filled, program.parts[name]) for name in ("adapters", "optimizer", "base", "batch")]
    jax.block_until_ready(parts)
    trim()  # of what was copied
    RESET.write_text("5")
    jax.block_until_ready(step(*parts, key))
    print(json.dumps({"predicted": found.peak, "measured": resident("VmHWM") - before}))


def trim():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def filled(x):
    return jax.device_put(np.ones(x.shape, x.dtype), x.sharding)


if __name__ == "__main__":
    main(sys.argv[1])
