"""The LoRA step compiled for hardware that is not there: a TPU v5e and an H100, bfloat16 base, full remat."""

import functools
import importlib.util

import hlo
import jax
import jax.numpy as jnp
import pytest
import steps
from jax.experimental import topologies
from steps import SMOLLM2, Steps

from train.topology import H100

pytestmark = pytest.mark.slow

NEEDED = {
    "tpu": {"libtpu": "libtpu"},
    "h100": {"jax_cuda12_plugin": "jax-cuda12-plugin", "jax_plugins.xla_cuda12": "jax-cuda12-pjrt"},
}
TARGETS = pytest.mark.parametrize("target", NEEDED)


@functools.cache
def device(target):
    for module, package in NEEDED[target].items():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the package {package}")
    if target == "tpu":
        return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
    ).devices[0]


@functools.cache
def compiled(target, step):
    where = jax.sharding.SingleDeviceSharding(device(target))
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), steps.shapes(SMOLLM2, jnp.bfloat16)
    )
    # Without a GPU there is nothing to time kernels on.
    options = {"xla_gpu_autotune_level": 0} if target == "h100" else None
    program = jax.jit(getattr(Steps(SMOLLM2, "full"), step)).lower(*arguments).compile(options)
    return hlo.parse(program.as_text()), program.memory_analysis().temp_size_in_bytes


@TARGETS
def test_nothing_of_a_weights_size_is_computed(target):
    sizes = steps.sizes(steps.shapes(SMOLLM2)[1])
    made = {step: compiled(target, step)[0].computed(sizes, 4 * 256) for step in ("lifted", "full", "merged")}
    assert made["lifted"] == []
    for step in ("full", "merged"):  # gradients of the weights, and the stacks that they are written into
        opcodes = {instruction.opcode for instruction in made[step]}
        assert opcodes & {"dot", "convolution"} and "dynamic-update-slice" in opcodes
    stack = (SMOLLM2.layers, SMOLLM2.dim, SMOLLM2.hidden)
    assert any(i.opcode in ("add", "multiply") and stack in i.shapes for i in made["merged"])  # W + γ a b


@TARGETS
def test_temporaries(target):
    lifted, by_hand, merged = (compiled(target, step)[1] for step in ("lifted", "by_hand", "merged"))
    assert lifted == pytest.approx(by_hand, rel=0.02)
    assert merged > 1.5 * lifted
