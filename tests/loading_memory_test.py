"""Loading takes the memory of the model in its dtype and of one tensor of the file."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from lora_jax.interop import safetensors as reader
from lora_jax.models import keys

MB = 2**20
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
# Prints the bytes of the parameters, and by how much the most that was resident exceeds what was before.
LOAD = """
import re, sys
import jax, jax.numpy as jnp, safetensors.numpy
from lora_jax.interop import safetensors as reader

class AllFirst(dict):
    def __init__(self, folder):
        super().__init__(safetensors.numpy.load_file(folder / reader.WEIGHTS))
    tensor = dict.__getitem__

def kilobytes(field):
    return int(re.search(field + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

folder, dtype, how = sys.argv[1:]
if how == "all first":
    reader.Files = AllFirst
jax.device_put(jnp.ones(3)).block_until_ready()
before = kilobytes("VmRSS")
_, params = reader.load(folder, jnp.dtype(dtype))
jax.block_until_ready(params)
print(sum(x.nbytes for x in jax.tree.leaves(params)), 1024 * (kilobytes("VmHWM") - before))
"""


def loaded(folder, dtype, how):
    run = subprocess.run([sys.executable, "-c", LOAD, folder, dtype, how], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return map(int, run.stdout.split())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_the_model_and_one_tensor(tmp_path):
    folder = tiny.write(tmp_path / "model", **SIZES)
    config = reader.decoder_config(folder)
    largest = 4 * max(int(np.prod(keys.file_shape(key, config))) for key in keys.table(config))
    assert largest == 32 * MB and (folder / reader.WEIGHTS).stat().st_size > 350 * MB
    for dtype in ("float32", "bfloat16"):
        model, peak = loaded(folder, dtype, "one by one")
        # The tensor is there twice, in the mapped file and out of it; the rest is of Python and JAX.
        room = 2 * largest + reader.MAPPED + 24 * MB
        assert model <= peak < model + room
        _, other = loaded(folder, dtype, "all first")
        assert other > model + 300 * MB > model + room
        print(f"{dtype}: model {model / MB:.0f} MB, peak {peak / MB:.0f} MB, all first {other / MB:.0f} MB")
