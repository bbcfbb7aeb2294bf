"""Runs that go on with an adapter: from where it stands, as it is, and no other."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import sft_test
import template_test
import tiny
import tiny_run

import lora_jax as lora
from lora_jax import sharding
from lora_jax.interop import hf, peft
from train import (
    adapter,
    dpo,
    dpo_settings,
    examples,
    heldout,
    launch,
    loop,
    objective,
    programs,
    sft,
    source,
    start,
    trained,
)

pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    """An adapter that changes what the model says: its folder, and its arrays."""
    place = tmp_path_factory.mktemp("begun")
    base, found, shape = tiny_run.write(place / "run", model, rank=3)
    peft.save(place / "adapter", found, shape, base, peft.Card(str(model)))
    return place / "adapter", found


def test_a_run_goes_on_with_an_adapter(model, begun, tmp_path, capsys):
    folder, found = begun
    config = sft_test.configured(model, tmp_path, adapter=str(folder), eval__answers=0, steps=2)
    sft.train(config, tmp_path / "more", "more")
    assert f"going on with lora of {folder}, 2,784 parameters of layers/" in capsys.readouterr().out
    m = hf.load(model)
    data = examples.prepare(config, template_test.tiny_format(tiny.CHATML), 128)
    nll = jax.jit(functools.partial(objective.negative_log_likelihood, shape=m.config, learned=data.learned))
    both = lora.merge(m.params, found), m.params
    merged, plain = (heldout.loss(nll, params, data.heldout_rows, data.length, 4) for params in both)
    first = next(x["heldout_loss"] for x in loop.read(tmp_path / "more" / loop.METRICS))
    np.testing.assert_allclose(first, merged, rtol=1e-5)
    assert abs(first - plain) > 1e-3
    # What it began with lies in the run: all scripts read what was trained without the folder that was named.
    run = loop.resolved(tmp_path / "more")
    run["adapter"] = str(tmp_path / "gone")
    (tmp_path / "more" / loop.CONFIG).write_text(json.dumps(run))
    now = trained.load(tmp_path / "more", m).adapters
    assert now.keys() == found.keys() == source.read(tmp_path / "more").adapters.keys()
    for path, before in found.items():
        assert now[path].rank == 3 and now[path].scale == before.scale
        moved = np.abs(now[path].b - before.b)
        assert 0 < moved.max() < 0.1 < np.abs(before.b).max()
    with safetensors.safe_open(tmp_path / "more" / adapter.FOLDER / "adapter_model.safetensors", "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["training"])["began"] == str(folder) and "spec" not in metadata
    assert f"Went on with: {folder}" in (tmp_path / "more" / adapter.FOLDER / "README.md").read_text()


def test_dropout_is_the_configs(model, begun, tmp_path):
    config = sft_test.configured(model, tmp_path, adapter=str(begun[0]), lora__dropout=0.25)
    assert {x.dropout for x in start.adapters(config, hf.load(model), force=False).values()} == {0.25}


def test_a_plan_counts_what_is_in_it(model, begun, tmp_path):
    config = sft_test.configured(model, tmp_path, adapter=str(begun[0]))
    shape, mesh = hf.load(model, weights=False).config, sharding.mesh("data=1")
    parts = programs.state(config, shape, mesh, jnp.float32)
    planned = {path: x.a.shape for path, x in parts["adapters"].items()}
    assert planned == {path: x.a.shape for path, x in begun[1].items()}
    config.adapter = ""
    other = programs.state(config, shape, mesh, jnp.float32)["adapters"]
    assert planned != {path: x.a.shape for path, x in other.items()}


def test_mistakes(model, begun, tmp_path):
    m, other = hf.load(model), hf.load(tiny.write(tmp_path / "other", seed=1))
    tiny_run.write(tmp_path / "run", model)
    base, prompt, shape = tiny_run.write(tmp_path / "prompt", model, "prompt", rank=5)
    peft.save(tmp_path / "five", prompt, shape, base, peft.Card(str(model)))
    for changes, over, words in (
        ({"adapter": str(begun[0]), "method": "dora"}, m, "goes on with 'lora' or 'lora+' or 'rslora'"),
        ({"adapter": str(begun[0]), "method": "full"}, m, "config.method='full'"),
        ({"adapter": str(tmp_path / "run")}, m, f"give its {tmp_path / 'run' / 'adapter'}"),
        ({"adapter": str(tmp_path / "none")}, m, "none/adapter_config.json"),
        ({"adapter": str(begun[0])}, other, "trained over a base with fingerprint"),
        ({"adapter": str(tmp_path / "five"), "method": "prompt"}, m, "5 trained tokens; give config.lora.rank=5"),
    ):
        with pytest.raises(launch.MISTAKES) as caught:
            start.begin(sft_test.configured(model, tmp_path, **changes), over, len, None)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    forced = sft_test.configured(model, tmp_path, adapter=str(begun[0]), force=True)
    one = start.begin(forced, other, len, None)
    assert one.trainable.keys() == begun[1].keys() and one.trained.startswith("lora from ")
    five = sft_test.configured(model, tmp_path, adapter=str(tmp_path / "five"), method="prompt", lora__rank=5)
    assert start.begin(five, m, len, None).trained != one.trained


@pytest.mark.slow
def test_the_reference_of_preferences_is_the_adapter_as_it_was(model, begun, tmp_path):
    config = dpo_settings.dpo()
    config.model, config.adapter, config.steps, config.batch_size = str(model), str(begun[0]), 2, 4
    lines = [{"prompt": f"what is {i}", "chosen": "one and two", "rejected": "three"} for i in range(16)]
    config.data.source, config.data.heldout = str(tiny.write_jsonl(tmp_path / "pairs.jsonl", lines)), 4
    for config.reference in ("base", "precomputed"):
        dpo.train(config, tmp_path / config.reference, "pairs")
        first, last = (x for x in loop.read(tmp_path / config.reference / loop.METRICS) if "reward_margin" in x)
        np.testing.assert_allclose([first["reward_margin"], first["heldout_loss"]], [0, np.log(2)], atol=1e-5)
        assert last["reward_margin"] > 1e-3
