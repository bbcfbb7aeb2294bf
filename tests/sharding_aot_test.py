"""The training step compiled for eight TPUs that are not there: what they exchange."""

import importlib.util
import math

import pytest
from mesh_steps import DENSE, LEARNED, LENGTH, MOE, ROWS, compiled

import lora_jax as lora

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu"),
]


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_only_base_shards_are_gathered_and_only_adapters_summed(config):
    step = compiled(config, "fsdp=8", tpu=True)
    assert step.gathered() and step.gathered() <= step.base_shards() and not step.of_rows()
    assert lora.count(step.adapters) - 64 <= step.gathered_whole() <= lora.count(step.adapters)
    # It sums the scales of norms, filled up with zeros, in place of gathering them; small factors by passing parts on.
    norms, summed = 3 * 2 * config.dim, step.total("all-reduce") + step.total("collective-permute")
    assert lora.count(step.adapters) // config.layers // 2 <= summed <= lora.count(step.adapters) + norms + 64
    assert set(step.found) <= {"all-gather", "all-reduce", "collective-permute"}


@pytest.mark.parametrize("shape", [(ROWS, LENGTH, DENSE.dim), (1, ROWS * LEARNED, DENSE.dim)], ids=["all", "learned"])
def test_activations_that_are_gathered_are_seen(shape):
    """Partner of the above."""
    step = compiled(DENSE, "fsdp=8", everywhere=shape, tpu=True)
    assert math.prod(shape) in step.gathered() - step.base_shards() and step.of_rows()


def test_adapters_stay_where_they_are_beside_divided_heads():
    step = compiled(DENSE, "fsdp=4,tensor=2", tpu=True)
    assert step.gathered() <= step.base_shards() and not step.gathered() & step.adapter_sizes()
    asked = compiled(DENSE, "fsdp=4,tensor=2", follow=("stacked",), tpu=True, divide=False)
    assert asked.gathered() & step.adapter_sizes()


def test_data_parallel_adapters_are_all_that_is_summed():
    step, whole = (compiled(DENSE, "data=8", tpu=True, divide=divide) for divide in (True, False))
    assert set(step.found) == {"all-gather", "all-reduce", "collective-permute"} and set(whole.found) == {"all-reduce"}
    assert not step.gathered() and not step.of_rows() and step.gathered_whole() == lora.count(step.adapters)
    assert step.total("all-reduce") + step.total("collective-permute") <= lora.count(step.adapters) + 64


def test_tokens_travel_to_experts_and_not_these_to_tokens():
    step, left = (compiled(MOE, f"{axis}=4,data=2", tpu=True) for axis in ("expert", "fsdp"))
    experts = {n * MOE.dim * MOE.hidden for n in (1, MOE.experts)}
    assert left.gathered() & experts and not step.gathered() & experts
    assert ROWS * LENGTH // 2 * MOE.dim in step.gathered()  # the hidden states of all devices along "expert"


def test_of_quantised_bases_it_is_codes_that_travel():
    step, left = (compiled(DENSE, "fsdp=4,tensor=2", nf4=True, stored=stored, tpu=True) for stored in (True, False))
    assert step.gathered() <= step.base_shards() and not left.gathered() <= left.base_shards()
    assert step.exchanged["all-gather"].bytes < left.exchanged["all-gather"].bytes / 3
