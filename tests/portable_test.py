"""What is converted for servers has the deltas that it had; what cannot be is one line that says why."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run

import lora_jax as lora
from lora_jax import Rule, Spec, soft
from lora_jax.interop import peft, portable, safetensors
from lora_jax.models import decoder

pytestmark = pytest.mark.usefixtures("quick")
QKV = set(portable.QKV)
EXACT = {
    "lora": Spec(rank=4, alpha=7),
    "rslora": Spec(rank=3, alpha=5, rslora=True),
    "pissa": Spec(rank=3, alpha=4, init="pissa"),
    "adalora": Spec(rank=4, method="adalora", target="q_proj"),
    "vera": Spec(rank=6, method="vera", target="v_proj|down_proj"),
    "patterns": Spec(Rule("q_proj", rank=2), Rule("up_proj", alpha=3), Rule(rank=5), exclude=["v_proj"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("base") / "model", tie_word_embeddings=False)
    return safetensors.load(folder, jnp.float32)


def made(spec, model):
    config, params = model
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    return tiny_run.moved(lora.init(jax.random.key(0), params, sites, spec))


def close(left, right, atol=2e-5):
    return all(np.allclose(x, y, atol=atol) for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_converted_exactly(name, model, tmp_path):
    config, params = model
    adapters = made(EXACT[name], model)
    ready = portable.convert(adapters, config, params)
    assert not ready.errors
    assert close(lora.merge(params, ready.adapters), lora.merge(params, adapters))
    assert not close(lora.merge(params, ready.adapters), params, atol=1e-2)
    assert {(x.rank, x.scale, x.start) for x in ready.adapters.values()} == {(ready.rank, 1.0, None)}
    assert set(ready.adapters) >= QKV
    peft.save(tmp_path, ready.adapters, config, params, uniform=True)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == ready.rank and not settings["use_rslora"]
    assert not settings["rank_pattern"] and not settings["alpha_pattern"] and settings["modules_to_save"] is None
    assert close(lora.merge(params, peft.load(tmp_path, config, params)), lora.merge(params, adapters))


def test_layers_of_zeros_are_written_too(model, tmp_path):
    config, params = model
    adapters = made(Spec(rank=2, target="q_proj|k_proj|v_proj"), model)
    first = portable.QKV[0]
    adapters[first] = jax.tree.map(lambda x: x.at[1].set(0), adapters[first])
    ready = portable.convert(adapters, config, params)
    for uniform, layers in ((True, 2), (False, 1)):
        peft.save(tmp_path, ready.adapters, config, params, uniform=uniform)
        names = safetensors.safe_open(tmp_path / "adapter_model.safetensors", "numpy").keys()
        assert sum("q_proj.lora_A" in name for name in names) == layers


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_what_is_not_low_rank_becomes_the_nearest_that_is(method, model):
    config, params = model
    rule = Rule("k_proj|v_proj", method=method) if method == "ia3" else Rule("k_proj|v_proj", method=method, rank=4)
    adapters = made(Spec(rule), model)
    with pytest.raises(ValueError, match=r"which servers do not take: write the merged model instead, or give a rank"):
        portable.convert(adapters, config, params)
    wanted, errors = lora.merge(params, adapters), []
    for rank in (2, 8, 16):
        ready = portable.convert(adapters, config, params, rank=rank)
        got = lora.merge(params, ready.adapters)["layers"]["k_proj"]["kernel"]
        one, base = wanted["layers"]["k_proj"]["kernel"], params["layers"]["k_proj"]["kernel"]
        measured = np.linalg.norm(np.ravel(got - one)) / np.linalg.norm(np.ravel(one - base))
        assert ready.errors["layers/k_proj/kernel"] == pytest.approx(measured, abs=1e-5)
        errors.append(measured)
    assert errors[0] > errors[1] + 0.05 > errors[2] + 0.05 and errors[2] < 1e-4  # 16 is all that the matrix has


def test_a_smaller_rank_is_the_nearest_and_its_error_is_told(model):
    config, params = model
    adapters = made(Spec(rank=8, target="attention"), model)
    ready = portable.convert(adapters, config, params, "vllm", rank=4)
    assert ready.rank == 4 and 0.05 < ready.errors["layers/q_proj/kernel"] < 1
    assert not portable.convert(adapters, config, params, "vllm", rank=8).errors


def test_what_vllm_must_be_told(model):
    config, params = model
    adapters = made(Spec(rank=16, init="pissa", target="attention"), model)
    notes = portable.convert(adapters, config, params, "vllm").notes
    assert "start vLLM with --max-lora-rank=32" in notes and any("twice the rank" in note for note in notes)
    assert not any("vLLM" in note for note in portable.convert(adapters, config, params, "sglang").notes)
    huge = {path: dataclasses.replace(x, a=jnp.ones((*x.a.shape[:-1], 600))) for path, x in adapters.items()}
    huge = {p: dataclasses.replace(x, b=jnp.ones((*x.b.shape[:-1], 600)), start=None) for p, x in huge.items()}
    with pytest.raises(ValueError, match="rank 600 is more than vLLM's 512: give a rank"):
        portable.convert(huge, config, params, "vllm")


def test_q_without_k_and_v_gets_zeros_for_them(model):
    config, params = model
    ready = portable.convert(made(Spec(rank=2, target="q_proj"), model), config, params, "sglang")
    assert set(ready.adapters) == QKV and any("k_proj, v_proj added as zeros" in note for note in ready.notes)
    assert not np.any(ready.adapters["layers/v_proj/kernel"].b) and np.any(ready.adapters["layers/q_proj/kernel"].b)
    down = portable.convert(made(Spec(rank=2, target="down_proj"), model), config, params, "sglang")
    assert set(down.adapters) == {"layers/down_proj/kernel"} and not down.notes


def test_refused(model):
    config, params = model
    norms = made(Spec(Rule("norm/scale$", method="full"), Rule("q_proj", rank=2)), model)
    rows = made(Spec(Rule("embed", method="rows", rows=(3,))), model)
    bottleneck = made(Spec(rank=2, method="bottleneck", target="o_proj"), model)
    for adapters, server, message in (
        (norms, "any", "trained as a whole, which servers refuse or drop: write the merged model"),
        (rows, "sglang", "trained in some rows, which servers refuse or drop"),
        (bottleneck, "vllm", "a bottleneck behind its product"),
        (soft.Prompt(jnp.zeros((3, 32))), "any", "Prompts are served by neither"),
        ({}, "any", "no adapters"),
        (norms, "ollama", "no server 'ollama'; there are any, vllm, sglang"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            portable.convert(adapters, config, params, server)
        assert "\n" not in str(caught.value)
