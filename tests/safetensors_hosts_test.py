"""Two processes of four devices each read a model that is divided over all eight."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

import lora_jax as lora
from lora_jax.interop import hf

TESTS = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_each_host_reads_its_part_and_no_more(tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 320, "num_attention_heads": 4}
    folder = tiny.write(tmp_path / "model", **shape)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    hosts = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "two_hosts_loading.py"), str(folder), address, str(host)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    said = [host.communicate(timeout=240)[0].splitlines()[-1].split() for host in hosts]
    params = hf.load(folder).params
    sums = [float(x.sum()) for x in jax.tree.leaves(params)]
    for words in said:
        read, held = int(words[1]), int(words[3])
        # Vectors too are divided along D: nothing of this model is on both hosts.
        assert read == held == lora.nbytes(params) / 2
        np.testing.assert_allclose(list(map(float, words[5:])), sums, rtol=1e-4, atol=1e-3)
