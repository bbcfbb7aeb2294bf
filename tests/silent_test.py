"""Failures that other tools let pass, where no other file provokes them: each is said here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_trainer

import lora_jax as lora
from lora_jax import checkpoint
from lora_jax.interop import safetensors
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig


@pytest.mark.slow
def test_experts_are_among_all_linear_weights_and_leaving_them_out_has_to_be_said():
    pytest.importorskip("lora_jax.models.moe")
    config = DecoderConfig("qwen3_moe", 61, 8, 12, 2, 2, 1, 4, 32, experts=3, active_experts=2)
    params = decoder.init(jax.random.key(0), config)
    arguments = (decoder.forward, params, np.zeros((1, 8), np.int32), config)
    sites = lora.trace(*arguments)
    experts = {path for path in sites if "gate_proj" in path or "up_proj" in path or "down_proj" in path}
    assert len(experts) == 3 and experts <= set(lora.init(jax.random.key(0), params, sites, lora.Spec(rank=2)))
    without = lora.Spec(rank=2, target="attention")
    assert not experts & set(lora.init(jax.random.key(0), params, sites, without))
    text = str(lora.report(*arguments, spec=without))
    assert "layers/q_proj/kernel" in text and "layers/up_proj/kernel" not in text


def test_a_run_that_trains_nothing_ends_at_its_first_step(tmp_path):
    config = tiny_trainer.configured(steps=3, checkpoint__every=1)
    with pytest.raises(ValueError, match=r"step 1: the loss is .* and no gradient reaches what is trained"):
        tiny_trainer.train(config, tmp_path / "stuck", stuck=True)
    assert not checkpoint.newest(tmp_path / "stuck/checkpoints")
    tiny_trainer.train(config, tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run/checkpoints") == 3


def test_also_entries_that_match_nothing_name_the_nearest(tmp_path):
    config, params = safetensors.load(tiny.write(tmp_path / "model"), jnp.float32)
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    spec = lora.Spec(lora.Rule("final_nrm", method="full"), lora.Rule(rank=2))
    with pytest.raises(ValueError, match=r"'final_nrm' matches no parameter; nearest: 'final_norm/scale'"):
        lora.init(jax.random.key(0), params, sites, spec)
