"""What is trained here loads in PEFT and computes the same there; the file says which base it is for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import lora_jax as lora
from lora_jax import soft
from lora_jax.fingerprint import fingerprint
from lora_jax.interop import peft
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig

tiny_peft = pytest.importorskip("tiny_peft")
pytestmark = pytest.mark.usefixtures("quick")

Rule, Spec = lora.Rule, lora.Spec
SPECS = {
    "lora": Spec(rank=4, alpha=7),
    "rslora": Spec(rank=3, alpha=5, rslora=True),
    "lora-fa": Spec(rank=4, method="lora-fa", target="attention"),
    "pissa": Spec(rank=3, alpha=4, init="pissa"),
    "olora": Spec(rank=3, alpha=4, init="olora", target="mlp"),
    "adalora": Spec(rank=4, method="adalora", target="q_proj"),
    "dora": Spec(rank=4, method="dora"),
    "vera": Spec(rank=6, method="vera", target="attention"),
    "ia3": Spec(Rule("k_proj|v_proj", method="ia3"), Rule("down_proj", method="ia3", side="in")),
    "rules": Spec(Rule("q_proj", rank=2), Rule("up_proj", alpha=3), Rule(rank=5), exclude=["v_proj"]),
    "ends": Spec(Rule("embed", rank=3), Rule("head", rank=3), Rule("o_proj", rank=3)),
    "norms": Spec(Rule("norm/scale$", method="full"), Rule("q_proj", rank=2)),
    "one norm": Spec(Rule("final_norm", method="full"), Rule("q_proj", rank=2)),
    "head": Spec(Rule("head", method="full"), Rule("v_proj", method="ia3")),
    "rows": Spec(Rule("embed", method="rows", rows=(9, 4)), Rule("v_proj", rank=2)),
    "rows alone": Spec(Rule("embed", method="rows", rows=(9, 4))),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_peft.base(tmp_path_factory.mktemp("base"))


def moved(tree):
    """As training might leave it: what is trained is elsewhere, what is not is where it was."""
    mask = jax.tree.leaves(lora.trainable_mask(tree))
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(3)
    new = [
        jnp.array(x + 0.2 * rng.normal(size=x.shape), x.dtype) if m else x for x, m in zip(leaves, mask, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def made(spec, config, params):
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    return moved(lora.init(jax.random.key(0), params, sites, spec))


@pytest.mark.parametrize("name", SPECS)
def test_logits_in_peft_equal_ours(name, model, tmp_path):
    theirs, config, params = model
    adapters = made(SPECS[name], config, params)
    peft.save(tmp_path, adapters, config, params)
    ours = tiny_peft.our_logits(params, adapters, config)
    np.testing.assert_allclose(tiny_peft.their_logits(tmp_path), ours, atol=1e-4)
    assert np.abs(ours - tiny_peft.peeled(theirs)).max() > 0.05
    again = peft.load(tmp_path, config, params)
    if name in ("lora", "rslora", "dora", "vera", "ia3", "rules", "ends", "norms", "one norm", "head"):
        tiny_peft.same(again, adapters)
    else:
        np.testing.assert_allclose(tiny_peft.our_logits(params, again, config), ours, atol=1e-4)


def test_starts_are_written_at_twice_the_rank(model, tmp_path):
    _, config, params = model
    peft.save(tmp_path, made(SPECS["pissa"], config, params), config, params)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (6, 8, True)


def test_targets_and_patterns_are_short(model, tmp_path):
    _, config, params = model
    peft.save(tmp_path, made(SPECS["rules"], config, params), config, params)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    every = {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(settings["target_modules"]) == every and settings["r"] == 5
    assert settings["rank_pattern"] == {"q_proj": 2, "up_proj": 16}
    assert settings["modules_to_save"] is None
    peft.save(tmp_path, made(SPECS["one norm"], config, params), config, params)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]


def test_the_file_knows_its_base(model, tmp_path):
    _, config, params = model
    card = peft.Card(
        "org/base", SPECS["rows"], "sums.jsonl", 60, {"held-out loss": 0.3561}, "python -m train.sft\n  -x"
    )
    adapters = made(SPECS["rows"], config, params)
    peft.save(tmp_path, adapters, config, params, card)
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert metadata["base_fingerprint"] == fingerprint(params) and metadata["lora_jax_version"] == lora.__version__
    assert json.loads(metadata["training"])["losses"] == {"held-out loss": 0.3561}
    rules = json.loads(metadata["spec"])["rules"]
    assert Spec(*(Rule(**rule) for rule in rules)) == SPECS["rows"]
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(ValueError, match=f"fingerprint {fingerprint(params)}, this one has {fingerprint(other)}; load"):
        peft.load(tmp_path, config, other)
    forced = peft.load(tmp_path, config, other, force=True)
    assert set(forced) == set(adapters)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_the_card_says_what_it_is_given_and_no_more(model, tmp_path):
    _, config, params = model
    adapters = made(SPECS["rules"], config, params)
    card = peft.Card("org/base", None, "sums.jsonl", 60, {"held-out loss": 0.3561}, "python -m train.sft\n  -x")
    peft.save(tmp_path, adapters, config, params, card)
    text = (tmp_path / "README.md").read_text()
    numbers = sum(x.size for x in jax.tree.leaves(adapters))
    for part in (
        '---\nbase_model: "org/base"\nlibrary_name: "peft"\n---',
        f"LORA, {numbers:,} parameters",
        "- Data: sums.jsonl\n- Steps: 60\n- Held-out loss: 0.3561\n",
        "\n    python -m train.sft\n      -x\n",
        fingerprint(params),
    ):
        assert part in text
    peft.save(tmp_path, adapters, config, params)
    bare = (tmp_path / "README.md").read_text()
    for word in ("Data", "Steps", "loss", "Trained with", "base_model"):
        assert word not in bare


def test_refused(model, tmp_path):
    _, config, params = model
    q, v = made(SPECS["lora"], config, params), made(SPECS["dora"], config, params)
    bottleneck = made(Spec(rank=2, method="bottleneck", target="o_proj"), config, params)
    norm = made(Spec(Rule("final_norm", method="full")), config, params)
    tied = dataclasses.replace(config, tied=True)
    nan = jax.tree.map(lambda x: x * jnp.nan, v)
    vera = made(SPECS["vera"], config, params)
    vera.pop("/vera")
    first = "layers/q_proj/kernel"
    for adapters, shape, message in (
        ({first: q[first], "layers/k_proj/kernel": v["layers/k_proj/kernel"]}, config, "one method, but .*LoRA.*DoRA"),
        ({"layers/q/kernel": q[first]}, config, "no parameter of this decoder; nearest: 'layers/q_proj/kernel'"),
        ({"layers/v_proj/kernel": q[first]}, config, "does not fit its weight"),
        (bottleneck, config, "is a Bottleneck, which PEFT does not have"),
        (norm, config, "beside adapters only"),
        (nan, config, "is not finite"),
        (vera, config, "'/vera', its matrices, is not among them"),
        ({}, config, "no adapters"),
        (made(SPECS["ends"], config, params), tied, "is no parameter|is this model's head too"),
        (soft.Prompt(jnp.zeros((3, 5))), config, r"should be \[N, 32\]"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            peft.save(tmp_path / "refused", adapters, shape, params)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "refused").exists()


def test_parts_of_a_fused_tensor_are_refused(tmp_path):
    config = DecoderConfig("phi3", 61, 32, 48, 2, 4, 2, 8, context=64)
    params = decoder.init(jax.random.key(0), config)
    for target in ("q_proj", "up_proj"):
        with pytest.raises(ValueError, match=f"'layers/{target}/kernel' is a part of .*: merge it instead"):
            peft.save(tmp_path / "refused", made(Spec(rank=2, target=target), config, params), config, params)
    peft.save(tmp_path / "written", made(Spec(rank=2, target="o_proj"), config, params), config, params)


def test_dropouts_that_differ_are_told(model, tmp_path):
    _, config, params = model
    spec = Spec(Rule("q_proj", rank=2, dropout=0.1), Rule("v_proj", rank=2))
    with pytest.warns(UserWarning, match=r"one dropout: of \[0.0, 0.1\] the largest"):
        peft.save(tmp_path, made(spec, config, params), config, params)
    assert peft.load(tmp_path, config, params)["layers/v_proj/kernel"].dropout == 0.1
