"""The QLoRA step of the scanned decoder compiled for an H100 and a TPU v5e: no weight is kept as floats."""

import functools

import hlo
import jax
import jax.numpy as jnp
import pytest
import steps
from aot_test import device
from steps import SMOLLM2, Steps

import lora_jax as lora
from lora_jax import products
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.quantize import dequantize, quantize

pytestmark = pytest.mark.slow
LLAMA_8B = DecoderConfig(
    family="llama",
    vocab=128256,
    dim=4096,
    hidden=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    context=8192,
    rope_base=5e5,
    tied=False,
)
ADAPTERS, PARAMS, DATA = steps.shapes(SMOLLM2, jnp.bfloat16, batch=1, length=256)


@functools.cache
def quantised():
    sites = lora.trace(decoder.hidden, PARAMS, DATA["tokens"], SMOLLM2)
    return jax.eval_shape(lambda params: quantize(params, sites, {"all-linear": "nf4"}), PARAMS)


@functools.cache
def compiled(target, remat, how):
    """What is computed of a whole stack's size, and the temporaries in bytes."""
    step = Steps(SMOLLM2, remat).lifted

    def run(adapters, params, data):
        return step(adapters, dequantize(params) if how == "at once" else params, data)

    options = {"xla_gpu_autotune_level": 0} if target == "h100" else None
    arguments = ADAPTERS, PARAMS if how == "floats" else quantised(), DATA
    where = jax.sharding.SingleDeviceSharding(device(target))
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments)
    with pytest.MonkeyPatch.context() as patch:
        if how == "kept":  # an ordinary product with the array
            patch.setattr(products, "used", lambda f, w, *data: f(getattr(w, "value", lambda: w)(), *data))
        program = jax.jit(run).lower(*arguments).compile(options)
    stacks = {leaf.size for leaf in jax.tree.leaves(PARAMS["layers"]) if leaf.ndim > 2}
    return hlo.parse(program.as_text()).computed(stacks, 256), program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("target", ["h100", "tpu"])
def test_only_codes_and_scales_are_kept(target):
    weights = lora.nbytes([leaf for leaf in jax.tree.leaves(PARAMS["layers"]) if leaf.ndim > 2])
    made, temporaries = compiled(target, "none", "nf4")
    assert made == []
    # One layer's weights are made into arrays at a time; there are 30.
    assert temporaries < compiled(target, "none", "floats")[1] + weights / 10
    # As an ordinary product with the array, every layer's is kept for the backward pass.
    assert compiled(target, "none", "kept")[1] > temporaries + 0.9 * weights


@pytest.mark.parametrize("target", ["h100", "tpu"])
def test_rematerialised_it_is_as_small(target):
    weights = lora.nbytes([leaf for leaf in jax.tree.leaves(PARAMS["layers"]) if leaf.ndim > 2])
    made, temporaries = compiled(target, "full", "nf4")
    assert made == []
    assert temporaries < compiled(target, "full", "floats")[1] + weights / 10
    # Made into arrays before the scan, all of them are held.
    made, at_once = compiled(target, "full", "at once")
    assert made and at_once > temporaries + 0.9 * weights


@pytest.mark.parametrize("target", ["h100", "tpu"])
def test_an_8b_model_takes_the_bytes_that_arithmetic_says(target):
    adapters, params, data = steps.shapes(LLAMA_8B, jnp.bfloat16, batch=1, length=256)
    sites = lora.trace(decoder.hidden, params, data["tokens"], LLAMA_8B)
    small = jax.eval_shape(lambda params: quantize(params, sites, {"all-linear": "nf4"}), params)
    where = jax.sharding.SingleDeviceSharding(device(target))
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (adapters, small, data))
    options = {"xla_gpu_autotune_level": 0} if target == "h100" else None
    program = jax.jit(Steps(LLAMA_8B, "full").lifted).lower(*arguments).compile(options)
    linear = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim > 2)
    # 4 bits, an 8-bit scale for each 64 of them, and a float32 for each 256 of those.
    expected = linear * (4 + 8 / 64 + 32 / 64 / 256) / 8 + 2 * (lora.count(params) - linear) + lora.nbytes(adapters)
    assert linear > 6.9e9
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(expected, rel=0.05)
    assert lora.nbytes(params) > 2.5 * expected
