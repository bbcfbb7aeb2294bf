"""Adapters that PEFT has trained compute here what they compute there, and so do ours in PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax.interop import peft
from lora_jax.models import decoder

tiny_peft = pytest.importorskip("tiny_peft")
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module", params=tiny_peft.CASES)
def case(request, tmp_path_factory):
    """Of every kind: PEFT's logits, the folder that it saved, and what is read from it."""
    folder = tmp_path_factory.mktemp("peft")
    changes = tiny_peft.BIASED if "bias" in request.param else {}
    model, config, params = tiny_peft.base(folder / "base", **changes)
    plain = tiny_peft.peeled(model)
    theirs = tiny_peft.peeled(tiny_peft.trained(model, tiny_peft.CASES[request.param](), folder))
    return request.param, folder, config, params, peft.load(folder, config, params), theirs, plain


def test_read_logits_equal_peft(case):
    _, _, config, params, adapters, theirs, plain = case
    np.testing.assert_allclose(tiny_peft.our_logits(params, adapters, config), theirs, atol=1e-4)
    assert np.abs(theirs - plain).max() > 0.05


def rows(tensors):
    return next(x for key, x in tensors.items() if "trainable_tokens" in key)


def test_written_again_it_is_the_same(case, tmp_path):
    name, folder, config, params, adapters, theirs, _ = case
    peft.save(tmp_path, adapters, config, params)
    changes = tiny_peft.BIASED if "bias" in name else {}
    np.testing.assert_allclose(tiny_peft.their_logits(tmp_path, **changes), theirs, atol=1e-4)
    before, after = tiny_peft.tensors(folder), tiny_peft.tensors(tmp_path)
    assert {key for key in before if not key.endswith(".base_layer.weight")} == set(after)
    again = peft.load(tmp_path, config, params)
    if name.startswith("rows"):  # added here to the base's, there they stand in their place: that rounds once
        np.testing.assert_allclose(rows(after), rows(before), atol=1e-6)
        return
    tiny_peft.same(again, adapters)
    for key, x in after.items():
        if name == "scales" and "lora_B" in key:  # one scale for all layers is what a stack of them has
            continue
        np.testing.assert_array_equal(x, before[key])


def test_rows_of_a_tied_matrix_are_trained_on_both_sides(tmp_path):
    tied = {"tie_word_embeddings": True}
    model, config, params = tiny_peft.base(tmp_path / "base", **tied)
    plain = tiny_peft.peeled(model)
    theirs = tiny_peft.peeled(tiny_peft.trained(model, tiny_peft.CASES["rows"](), tmp_path / "theirs"))
    adapters = peft.load(tmp_path / "theirs", config, params)
    np.testing.assert_allclose(tiny_peft.our_logits(params, adapters, config), theirs, atol=1e-4)
    assert np.abs(theirs - plain)[..., [5, 3, 9]].max() > 0.05
    peft.save(tmp_path / "ours", adapters, config, params)
    np.testing.assert_allclose(tiny_peft.their_logits(tmp_path / "ours", **tied), theirs, atol=1e-4)


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("dora", "layers", "vera", "whole", "biases")]


@pytest.mark.parametrize("kind", ["lora", *OTHERS])
def test_training_goes_on_here_and_there(kind, tmp_path):
    changes = tiny_peft.BIASED if "bias" in kind else {}
    model, config, params = tiny_peft.base(tmp_path / "base", **changes)
    before = tiny_peft.peeled(tiny_peft.trained(model, tiny_peft.CASES[kind](), tmp_path / "theirs"))
    adapters = peft.load(tmp_path / "theirs", config, params)
    tokens = jnp.array(tiny_peft.texts(), jnp.int32)

    @jax.jit
    def nll(adapters):
        logits = lora.lift(decoder.forward)(lora.attach(params, adapters), tokens[:, :-1], config)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    first, gradient = jax.value_and_grad(nll)(adapters)
    mask = lora.trainable_mask(adapters)
    after = jax.tree.map(lambda x, g, m: x - 0.05 * g if m else x, adapters, gradient, mask)
    peft.save(tmp_path / "ours", after, config, params)
    there = tiny_peft.their_logits(tmp_path / "ours", **changes)
    np.testing.assert_allclose(tiny_peft.our_logits(params, after, config), there, atol=1e-4)
    assert np.abs(there - before).max() > 1e-3 and nll(after) < first
    assert set(tiny_peft.tensors(tmp_path / "ours")) <= set(tiny_peft.tensors(tmp_path / "theirs"))
