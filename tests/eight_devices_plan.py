"""Plans for eight devices are what runs on them are; `sharding_test.py` runs this file in a process of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plan_test
import pytest
import sft_test
import tiny

from lora_jax import sharding
from lora_jax.interop import hf
from lora_jax.models import decoder
from train import methods, placing, programs

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}


def zeros(shapes):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def seen(arrays):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), arrays)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("method", methods.METHODS)
def test_a_plans_arrays_are_where_a_run_has_them(quick, method, divide):
    """What is computed without a device, beside what arrays on a mesh say of themselves."""
    config, mesh = plan_test.configured(method=method), sharding.mesh("data=2,fsdp=2,tensor=2")
    config.sharding.divide, config.optim.mu_dtype = divide, "bfloat16"
    shape = plan_test.TINY
    model = hf.Checkpoint(shape, zeros(jax.eval_shape(lambda: decoder.init(jax.random.key(0), shape))), *[None] * 4)

    def start(key, params):
        return methods.start(key, config, dataclasses.replace(model, params=params))

    with jax.set_mesh(mesh):
        base, trainable = zeros(jax.eval_shape(start, jax.random.key(0), model.params))
        if base is None:
            trainable = jax.device_put(trainable, placing.base(config)(shape, trainable))
        base, trainable, _ = placing.started(config, shape, base, trainable)
        state = {"base": base, "adapters": trainable}
        state["optimizer"] = methods.optimizer(config, trainable, lambda step: 1e-3).init(trainable)
    planned = programs.state(config, shape, mesh, jnp.float32)
    assert planned.keys() == state.keys()
    for name, arrays in state.items():
        assert seen(planned[name]) == seen(arrays), name
    if divide:
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(planned["optimizer"]))


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("fsdp=4,tensor=2", {"quantize": "nf4", "method": "lora+"}),
        ("expert=4,data=2", {"batch_size": 16, "accumulate": 2, "loss_chunk": 24, "remat": "full", "data__pack": True}),
    ],
    ids=["quantised", "experts in parts"],
)
def test_a_plan_is_of_the_step_that_a_run_compiles(tmp_path, quick, monkeypatch, line, changes):
    model = tiny.write(tmp_path / "model", vocab_size=320, **SHAPE, **(EXPERTS if "expert" in line else {}))
    rows = {"batch_size": 8, "eval__batch_size": 8}
    config = sft_test.configured(model, tmp_path, mesh=line, **rows | changes)
    given, lowered = plan_test.step_of_a_run(config, tmp_path, monkeypatch)
    program = plan_test.planned(config)
    for real, name in zip(given, ("adapters", "optimizer", "base", "batch"), strict=True):
        assert seen(real) == seen(program.parts[name]), name
    assert lowered.as_text() == program.lowered.as_text()
