"""Every method by name through the training script: it learns, resumes its own optimizer, and talks afterwards."""

import jax
import numpy as np
import pytest
from sft_test import configured, final

from lora_jax import checkpoint
from lora_jax.interop import hf
from train import loop, methods, sft, trained

pytestmark = pytest.mark.usefixtures("quick_module")

QUICK = ("dora",)


def settings(model, tmp_path, method, **changes):
    config = configured(model, tmp_path, method=method, eval__answers=0, **changes)
    config.lora.rank = 0 if method in ("ia3", "norms") else 4
    config.optim.lr = min(1e-2 * methods.METHODS[method].rate, 0.1)
    return config


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in methods.METHODS]
)
def test_it_learns_and_is_found_again(method, model, tmp_path, monkeypatch):
    config, folder = settings(model, tmp_path, method), tmp_path / "run"
    sft.train(config, folder, method)
    losses = [line["heldout_loss"] for line in loop.read(folder / loop.METRICS) if "heldout_loss" in line]
    assert losses[-1] < losses[0]
    # What `train.chat` finds is what was trained.
    base = hf.load(config.model)
    tree = trained.from_run(folder, loop.resolved(folder), base)
    params, start = methods.start(jax.random.key(config.seed), config, base)
    again = methods.runner(config, base)(_trainable(start, folder), params)
    for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(got, want)
    started = methods.runner(config, base)(start, params)
    pairs = zip(jax.tree.leaves(started), jax.tree.leaves(tree), strict=True)
    assert any(not np.array_equal(old, new) for old, new in pairs)


def _trainable(like, folder):
    saved = jax.tree.leaves(final(folder))
    by_path = {jax.tree_util.keystr(k, simple=True, separator="|"): x for k, x in _named(final(folder))}
    found = [by_path[jax.tree_util.keystr(k, simple=True, separator="|")] for k, _ in _named(like)]
    assert len(found) == len(saved)
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _named(tree):
    return jax.tree_util.tree_flatten_with_path(tree)[0]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_over_a_quantised_base(format, model, tmp_path):
    config = settings(model, tmp_path, "lora", quantize=format)
    sft.train(config, tmp_path / "run", "q")
    losses = [line["heldout_loss"] for line in loop.read(tmp_path / "run" / loop.METRICS) if "heldout_loss" in line]
    plain = settings(model, tmp_path, "lora")
    sft.train(plain, tmp_path / "plain", "plain")
    float_losses = [x["heldout_loss"] for x in loop.read(tmp_path / "plain" / loop.METRICS) if "heldout_loss" in x]
    assert losses[-1] < losses[0]
    assert 0 < abs(losses[0] - float_losses[0]) < 0.1
    with pytest.raises(ValueError, match="trained over a base with fingerprint"):
        trained.from_run(tmp_path / "run", loop.resolved(tmp_path / "run"), hf.load(config.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora++"}, "config.method='lora\\+\\+' is not one of 'lora', "),
        ({"method": "full", "quantize": "nf4"}, "trains every parameter: these cannot be quantised"),
        ({"method": "ia3", "lora__rank": 4}, "method 'ia3' has no rank"),
        ({"method": "prompt", "lora__rank": 500}, "lora.rank=500: that many trained tokens leave no room for a text"),
    ],
)
def test_refusals(changes, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        sft.train(configured(model, tmp_path, **changes), tmp_path / "run", "x")
    assert not (tmp_path / "run").exists()


def test_fingerprint_of_a_quantised_base_is_its_own(model):
    rules = {"all-linear": "nf4"}
    bases = [hf.load(model).params, hf.load(model, quantize=rules).params, hf.load(model, quantize=rules).params]
    plain, first, again = map(checkpoint.fingerprint, bases)
    assert first == again != plain
