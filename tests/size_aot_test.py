"""What training at size saves, compiled for a TPU v5e and an H100: residuals on the host, and no scores in memory."""

import functools
import re

import aot_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.models import attention, kernels
from lora_jax.models.config import DecoderConfig

pytestmark = pytest.mark.slow
SMALL = DecoderConfig("llama", 128, 256, 512, 8, 4, 2, 64, context=512)
ROWS = 128  # of 64 tokens: more than a TPU's fast memory can keep
HOST = r"S\(5\)"  # XLA's name of the host's memory in the shape of an array


@functools.cache
def step(target, remat):
    """The lifted step, compiled: its text, and bytes of temporaries on the device and on the host."""
    where = jax.sharding.SingleDeviceSharding(aot_test.device(target))
    shapes = steps.shapes(SMALL, jnp.bfloat16, batch=ROWS, length=64)
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes)
    options = {"xla_gpu_autotune_level": 0} if target == "h100" else None
    program = jax.jit(steps.Steps(SMALL, remat).lifted).lower(*arguments).compile(options)
    memory = program.memory_analysis()
    return program.as_text(), memory.temp_size_in_bytes, memory.host_temp_size_in_bytes


@aot_test.TARGETS
def test_what_dots_keeps_is_on_the_host(target):
    (_, dots, none), (text, device, host) = step(target, "dots"), step(target, "offload")
    # Of every layer and token, in 2 bytes: its input, q, k, v, the attention, o, gate and up.
    kept = 2 * SMALL.layers * ROWS * 64 * (256 + 256 + 2 * 128 + 256 + 256 + 2 * 512)
    assert none == 0 and kept <= host < 1.1 * kept, (dots, device, host, kept)
    assert device < dots - 0.8 * kept, (dots, device, host, kept)
    assert re.search(HOST, text) and not re.search(HOST, step(target, "dots")[0])


def gradient(f):
    return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x).astype(jnp.float32)), argnums=(0, 1, 2)))


def given(place, B=1, T=4096, H=4, K=2, h=128):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place(shape))

    return array(B, T, H, h), array(B, T, K, h), array(B, T, K, h), array(B, T, dtype=jnp.int32)


def kernels_of(program):
    return len(re.findall("tpu_custom_call", program.as_text()))


def test_splash_keeps_no_scores():
    where = jax.sharding.SingleDeviceSharding(aot_test.device("tpu"))
    splash, chunked = (gradient(f).lower(*given(lambda _: where)).compile() for f in (kernels.splash, attention.causal))
    assert kernels_of(splash) == 3 and kernels_of(chunked) == 0  # forward, and backward to q and to k and v
    bytes_ = [program.memory_analysis().temp_size_in_bytes for program in (splash, chunked)]
    assert bytes_[0] < 4096 * 4096 < 2 * bytes_[1] and bytes_[0] < bytes_[1] / 4, bytes_


def test_splash_on_a_mesh_exchanges_nothing():
    aot_test.device("tpu")
    devices = np.array(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
    mesh = Mesh(devices.reshape(2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(shape):
        return NamedSharding(mesh, PartitionSpec("fsdp", None, *["tensor"] * (len(shape) > 2)))

    with jax.set_mesh(mesh):
        program = gradient(kernels.splash).lower(*given(place, B=2, T=512)).compile()
    assert kernels_of(program) == 3
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())
