"""What is told of adapters is what dense deltas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import tiny
import tiny_run

import lora_jax as lora
from lora_jax import Rule, Spec
from lora_jax.interop import contents, safetensors
from lora_jax.models import decoder
from lora_jax.tree import leaves_by_path
from train import describe as script

pytestmark = pytest.mark.usefixtures("quick")
SPEC = Spec(Rule("q_proj", method="dora", rank=3), Rule("k_proj", method="vera", rank=4), Rule("v_proj|o_proj", rank=4))
Q, K, V = (f"layers/{name}_proj/kernel" for name in "qkv")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    config, params = safetensors.load(tiny.write(tmp_path_factory.mktemp("base") / "model"), jnp.float32)
    sites = lora.trace(decoder.forward, params, jnp.zeros((1, 8), jnp.int32), config)
    start = lora.init(jax.random.key(0), params, sites, SPEC)
    return [tiny_run.moved(start, seed) for seed in (1, 2)], params


def dense(adapters, params, path):
    """The weight and its change, matrix by matrix, in float64."""
    base, merged = (leaves_by_path(tree)[path] for tree in (params, lora.merge(params, adapters)))
    w = np.asarray(base, np.float64).reshape(2, 32, -1)
    return w, np.asarray(merged, np.float64).reshape(2, 32, -1) - w


@pytest.mark.parametrize("path", [Q, K, V])
def test_sizes_and_directions(path, found):
    (adapters, _), params = found
    change = contents.changes(adapters, leaves_by_path(params))[path]
    w, delta = dense(adapters, params, path)
    norms = np.linalg.norm(delta, axis=(1, 2))
    np.testing.assert_allclose(change.norms_S, norms, rtol=1e-4)
    np.testing.assert_allclose(change.relative_S, norms / np.linalg.norm(w, axis=(1, 2)), rtol=1e-4)
    if path == Q:
        assert change.kind == "DoRA" and np.isnan(change.effective_S).all()
        return
    p = np.linalg.svd(delta, compute_uv=False)[:, :4]
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(change.effective_S, np.exp(-(p * np.log(p)).sum(1)), rtol=1e-3)
    assert np.all(change.effective_S < 4) and np.all(change.effective_S > 1)


def test_effective_rank_of_what_is_known():
    s = np.array([[2.0, 2.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(contents.effective_rank(s), [3.0, 1.0, np.nan], rtol=1e-6)


@pytest.mark.parametrize("path", [Q, K, V])
def test_likeness(path, found):
    (left, right), params = found
    leaf = leaves_by_path(params)[path]
    (_, x), (_, y) = (dense(tree, params, path) for tree in (left, right))
    like = contents.likeness(path, leaf, left, right)
    norms = np.linalg.norm(x, axis=(1, 2)), np.linalg.norm(y, axis=(1, 2))
    np.testing.assert_allclose(like.cosine_S, (x * y).sum((1, 2)) / (norms[0] * norms[1]), atol=1e-4)
    np.testing.assert_allclose(like.distance_S, np.linalg.norm(y - x, axis=(1, 2)) / norms[0], rtol=1e-3)
    if path != Q:
        for layer in range(2):
            (u, _, a), (v, _, b) = (np.linalg.svd(d[layer], full_matrices=False) for d in (x, y))
            inputs, outputs = (np.square(p).sum() / 4 for p in (u[:, :4].T @ v[:, :4], a[:4] @ b[:4].T))
            assert like.inputs_S[layer] == pytest.approx(inputs, abs=1e-3)
            assert like.outputs_S[layer] == pytest.approx(outputs, abs=1e-3)
    same = contents.likeness(path, leaf, left, left)
    np.testing.assert_allclose(same.cosine_S, 1, atol=1e-5)
    assert np.all(same.distance_S < 1e-2) and np.all(np.abs(like.cosine_S) < 0.99)


def test_filling_up_with_zeros_changes_nothing(found):
    (left, right), params = found
    wide = {
        V: left[V].__class__(
            *(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 3)]) for x in (left[V].a, left[V].b)),
            left[V].scale,
            left[V].axes,
        )
    }
    leaf = leaves_by_path(params)[V]
    pairs = zip(contents.likeness(V, leaf, left, right), contents.likeness(V, leaf, wide, right), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=1e-4)


def shown(folder, other="", picture=""):
    console = rich.console.Console(record=True, width=200)
    script.describe(folder, str(other), str(picture), console)
    return console.export_text()


def test_a_run_and_a_model_are_described(model, tmp_path):
    tiny_run.write(tmp_path / "one", model, target="q_proj|v_proj")
    tiny_run.write(tmp_path / "two", model, target="q_proj", rank=2)
    text = shown(tmp_path / "one", picture=tmp_path / "one.png")
    assert "2 weights" in text and "layers/v_proj/kernel" in text and "metrics.jsonl" in text and "fingerprint" in text
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    text = shown(tmp_path / "one", tmp_path / "two", tmp_path / "both.png")
    assert "1 weights that both adapt" in text and "same inputs" in text and (tmp_path / "both.png").is_file()
    text = shown(model)
    assert "base: llama" in text and "model.safetensors" in text


def test_refused(model, tmp_path):
    tiny_run.write(tmp_path / "one", model, target="q_proj")
    tiny_run.write(tmp_path / "other", model, target="o_proj")
    tiny_run.write(tmp_path / "full", model, "full")
    for folder, other, message in (
        (tmp_path / "one", tmp_path / "other", "no weight in common"),
        (tmp_path / "full", "", "every parameter was trained, and there is no adapter"),
        (model, tmp_path / "one", "is a model without an adapter: there is nothing to compare or draw"),
        (tmp_path / "nothing", "", "nothing: no such folder; give that of a run"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            shown(folder, other)
        assert "\n" not in str(caught.value)
