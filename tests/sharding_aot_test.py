"""The training step compiled for eight TPUs that are not there: what they exchange."""

import importlib.util

import pytest
from mesh_steps import DENSE, MOE, compiled

import lora_jax as lora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu"),
]


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_only_base_shards_are_gathered_and_only_adapters_summed(config):
    step = compiled(config, "fsdp=8", tpu=True)
    assert step.gathered() and step.gathered() <= step.base_shards()
    # It sums the scales of norms, filled up with zeros, in place of gathering them.
    norms = 3 * 2 * config.dim
    assert step.total("all-reduce") <= lora.count(step.adapters) + norms + 64
    assert step.total("all-reduce") >= lora.count(step.adapters) // config.layers
    assert set(step.found) <= {"all-gather", "all-reduce"}


def test_adapters_stay_where_they_are_beside_divided_heads():
    step = compiled(DENSE, "fsdp=4,tensor=2", tpu=True)
    assert step.gathered() <= step.base_shards() and not step.gathered() & step.adapter_sizes()
    asked = compiled(DENSE, "fsdp=4,tensor=2", follow=("stacked",), tpu=True)
    assert asked.gathered() & compiled(DENSE, "fsdp=4,tensor=2", tpu=True).adapter_sizes()


def test_data_parallel_adapters_are_all_that_is_summed():
    step = compiled(DENSE, "data=8", tpu=True)
    assert set(step.found) == {"all-reduce"}
    assert step.total("all-reduce") <= lora.count(step.adapters) + 64
