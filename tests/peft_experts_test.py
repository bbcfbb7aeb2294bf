"""Adapters of experts in both of PEFT's layouts, one parameter for all or a module each: read, written, the same."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.interop import merged, parts, peft, portable
from lora_jax.interop import safetensors as reader
from lora_jax.models import decoder

pytest.importorskip("lora_jax.models.moe")
tiny_peft = pytest.importorskip("tiny_peft", reason="PEFT is the oracle")
import tiny_families  # noqa: E402  (needs transformers, as the oracle does)

pytestmark = pytest.mark.usefixtures("quick")
CASES = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "one": ["experts.gate_up_proj"],
    "a layer": ["model.layers.1.mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    "down": ["mlp.experts.down_proj"],
}
SPECS = {
    "ranks and scales": [
        lora.Rule("up_proj", rank=2, alpha=3),
        lora.Rule("down_proj", rank=1),
        lora.Rule("q_proj|gate_proj", rank=3),
    ],
    "up alone": [lora.Rule("up_proj", rank=2)],
}
GATE, DOWN = "layers/gate_proj/kernel", "layers/down_proj/kernel"


FAMILIES = ["Mixtral", "Qwen3-MoE"]
# The experts of the last are arrays in files as well, with their axes the other way round.
with_arrays = pytest.mark.parametrize("family", [*FAMILIES, "Llama 4 text"], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family, tmp_path):
    theirs = tiny_families.make(family)
    theirs.save_pretrained(tmp_path / "base")
    return theirs, *reader.load(tmp_path / "base", jnp.float32)


def theirs_with(family, folder):
    return tiny_peft.peeled(tiny_peft.peft.PeftModel.from_pretrained(tiny_families.make(family), folder).eval())


@with_arrays
@pytest.mark.parametrize("case", CASES)
def test_fused_experts_are_read(case, family, model, tmp_path):
    theirs, config, params = model
    plain = tiny_peft.peeled(theirs)
    names = [name.replace("mlp", "feed_forward") if family == "Llama 4 text" else name for name in CASES[case]]
    settings = tiny_peft.peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=names, **tiny_peft.TASK
    )
    wanted = tiny_peft.peeled(tiny_peft.trained(theirs, settings, tmp_path / "theirs"))
    adapters = peft.load(tmp_path / "theirs", config, params)
    np.testing.assert_allclose(tiny_peft.our_logits(params, adapters, config), wanted, atol=1e-4)
    assert np.abs(wanted - plain).max() > 0.05
    assert (GATE in adapters, DOWN in adapters) == (case != "down", case != "one")
    peft.save(tmp_path / "again", adapters, config, params, fused=True)
    first, again = tiny_peft.tensors(tmp_path / "theirs"), tiny_peft.tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_experts_are_written_one_by_one(family, model, tmp_path):
    _, config, params = model
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    adapters = lora.init(
        jax.random.key(0), params, sites, lora.Spec(rank=2, target="q_proj|gate_proj|up_proj|down_proj")
    )
    adapters = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), adapters)
    ours = tiny_peft.our_logits(params, adapters, config)
    peft.save(tmp_path / "ours", adapters, config, params)
    names = tiny_peft.tensors(tmp_path / "ours")
    assert sum(".experts." in name for name in names) == config.layers * config.experts * 3 * 2
    again = peft.load(tmp_path / "ours", config, params)
    tiny_peft.same(again, adapters)
    np.testing.assert_allclose(theirs_with(family, tmp_path / "ours"), ours, atol=1e-4)
    plain = decoder.forward(params, jnp.array(tiny_peft.texts()), config)
    assert np.abs(ours - plain).max() > 0.05


@with_arrays
@pytest.mark.parametrize("case", SPECS)
def test_experts_are_written_as_one_parameter(case, family, model, tmp_path):
    _, config, params = model
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    spec = lora.Spec(*SPECS[case])
    adapters = lora.init(jax.random.key(0), params, sites, spec)
    adapters = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), adapters)
    ours = tiny_peft.our_logits(params, adapters, config)
    peft.save(tmp_path / "ours", adapters, config, params, fused=True)
    np.testing.assert_allclose(theirs_with(family, tmp_path / "ours"), ours, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every pattern means something
        again = peft.load(tmp_path / "ours", config, params)
    np.testing.assert_allclose(tiny_peft.our_logits(params, again, config), ours, atol=1e-4)
    plain = decoder.forward(params, jnp.array(tiny_peft.texts()), config)
    assert np.abs(ours - plain).max() > 0.05


@with_arrays
def test_what_peft_lacks_for_fused_experts_is_refused(model, tmp_path):
    _, config, params = model
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    for rule, what in (({"method": "dora"}, "DoRA"), ({"dropout": 0.1}, "dropout")):
        adapters = lora.init(jax.random.key(0), params, sites, lora.Spec(rank=2, target="up_proj", **rule))
        with pytest.raises(ValueError, match=f"PEFT has no {what} for fused experts such as 'layers/up_proj/kernel'"):
            peft.save(tmp_path / "ours", adapters, config, params, fused=True)


@pytest.mark.parametrize("family", ["Llama 4 text"], indirect=True)
def test_arrays_of_experts_are_merged_for_servers(model, tmp_path):
    _, config, params = model
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    adapters = lora.init(jax.random.key(0), params, sites, lora.Spec(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), adapters)
    with pytest.raises(ValueError, match=r"is of experts that are one array .*: write the merged model instead"):
        portable.convert(adapters, config, params)
    merged.save(tmp_path / "merged", *parts.load(tmp_path / "base"), adapters)
    files = reader.Files(tmp_path / "merged")
    assert set(files) == set(reader.Files(tmp_path / "base"))
    written, want = reader.read_json(tmp_path / "base/config.json"), lora.merge(params, adapters)
    (tmp_path / "merged/config.json").write_text(json.dumps(written))
    again = reader.load(tmp_path / "merged", jnp.float32)[1]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), again, want)
    assert np.abs(again["layers"]["down_proj"]["kernel"] - params["layers"]["down_proj"]["kernel"]).max() > 0.01


def test_gate_without_up_is_written_with_zeros_for_servers(model, tmp_path):
    _, config, params = model
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    adapters = lora.init(jax.random.key(0), params, sites, lora.Spec(rank=2, target="gate_proj"))
    ready = portable.convert(adapters, config, params)
    assert {GATE, DOWN, "layers/up_proj/kernel"} == set(ready.adapters)
    assert any("up_proj, down_proj added as zeros" in note for note in ready.notes)


def test_what_is_no_parameter_of_experts_is_named(model, tmp_path):
    theirs, config, params = model
    settings = tiny_peft.peft.LoraConfig(r=3, target_modules=[], target_parameters=CASES["both"], **tiny_peft.TASK)
    tiny_peft.trained(theirs, settings, tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["mlp.experts.gate_proj"]}))
    with pytest.raises(
        ValueError, match=r"'mlp.experts.gate_proj' of target_parameters is no parameter .*gate_up_proj"
    ):
        peft.load(tmp_path / "theirs", config, params)
