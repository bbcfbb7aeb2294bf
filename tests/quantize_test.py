"""Rules choose what is quantised; loading quantises as it reads, and never holds the model as floats."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gguf

import lora_jax as lora
from lora_jax.interop import hf, safetensors
from lora_jax.models import decoder
from lora_jax.quant import Quantised, quantize_leaf
from lora_jax.quantize import Choice, choose, dequantize, quantize, quantize_report

RULES = {"head": "int8", "embed": "fp8", "attention": "nf4", "all-linear": "int4"}


def is_quantised(leaf):
    return isinstance(leaf, Quantised)


def formats(params):
    leaves = lora.tree.leaves_by_path(params, is_leaf=is_quantised)
    return {path: leaf.format for path, leaf in leaves.items() if is_quantised(leaf)}


def f(params, x):
    """A layer of which every leaf is used differently."""
    table, kernel, bias = params["table"], params["dense"]["kernel"], params["dense"]["bias"]
    hidden = table[x] @ kernel + bias
    hidden = jnp.einsum("ti,oi->to", hidden, params["turned"]) + params["ints"].astype(hidden.dtype)
    return hidden @ params["last"]


@pytest.fixture
def params(key):
    return {
        "table": jax.random.normal(key, (10, 6)),
        "dense": {"kernel": jax.random.normal(key, (6, 4), jnp.bfloat16), "bias": jnp.ones(4)},
        "turned": jax.random.normal(key, (8, 4)),
        "ints": jnp.ones((8,), jnp.int8),
        "last": jax.random.normal(key, (8, 3)),
    }


@pytest.fixture
def sites(params):
    return lora.trace(f, params, np.zeros(5, np.int32))


def test_rules_choose_formats_and_axes(quick, params, sites):
    assert choose(sites, {"all-linear": "nf4"}) == {
        "dense/kernel": Choice("nf4", -2, 0),
        "turned": Choice("nf4", -1, 0),
    }
    # The first match wins; the head and the embedding are quantised if named, a lookup's rows kept whole.
    named = choose(sites, [("turned", "int4"), ("all-linear", "nf4"), ("last|table", "fp8")])
    assert named == {
        "table": Choice("fp8", -1, 0),
        "dense/kernel": Choice("nf4", -2, 0),
        "turned": Choice("int4", -1, 0),
        "last": Choice("fp8", -2, 0),
    }


def test_quantize_and_dequantize(quick, params, sites):
    q = quantize(params, sites, {"turned": "int4", "all-linear": "nf4"})
    assert formats(q) == {"dense/kernel": "nf4", "turned": "int4"}
    assert all(q[name] is params[name] for name in ("table", "ints", "last"))
    expected = quantize_leaf(params["turned"], "int4", -1)
    jax.tree.map(np.testing.assert_array_equal, q["turned"], expected)

    d = dequantize(q)
    assert jax.tree.structure(d) == jax.tree.structure(params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), d) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    np.testing.assert_array_equal(d["turned"], expected.dequantised())
    error = np.abs(d["turned"] - params["turned"]).max()
    assert 0 < error < np.abs(params["turned"]).max() / 14


BAD_RULES = {
    "format": ({"all-linear": "nf5"}, r"no format 'nf5' \(rule 'all-linear'\); there are nf4, int4, int8, fp8"),
    "no match": ({"kernels": "nf4"}, "rule 'kernels' matches no parameter; nearest: 'dense/kernel', "),
    "preset": (
        {"mlp": "nf4"},
        r"'mlp' matches no weight \(the output head 'last' is left out: name it to quantise it\); nearest: '",
    ),
    "elementwise": ({"bias": "nf4"}, "matches only 'dense/bias' and the like, elementwise and float32: only float"),
    "integer": ({"ints": "nf4"}, "matches only 'ints' and the like, elementwise and int8: only floating-point"),
    "taken": ({"turned": "nf4", "tur": "int4"}, "'tur' matches only weights that an earlier rule takes, such as 'turn"),
}


@pytest.mark.parametrize(("rules", "message"), BAD_RULES.values(), ids=BAD_RULES.keys())
def test_bad_rules(params, sites, rules, message):
    with pytest.raises(ValueError, match=message) as caught:
        quantize(params, sites, rules)
    assert "\n" not in str(caught.value)


def test_an_integer_weight_of_a_product_is_refused():
    params = {"w": jnp.ones((4, 4), jnp.int8)}
    sites = lora.trace(lambda p, x: x @ p["w"], params, jnp.ones((2, 4), jnp.int8))
    assert sites["w"].kind == "dense"
    with pytest.raises(ValueError, match="rule 'w' matches only 'w' and the like, dense and int8"):
        quantize(params, sites, {"w": "nf4"})


def test_other_parameters_than_traced_are_refused(quick, params, sites):
    rules = {"all-linear": "nf4"}
    with pytest.raises(ValueError, match=r"the tree has \[4, 8\] at 'turned', traced as \[8, 4\]; trace the function"):
        quantize(params | {"turned": params["turned"].T}, sites, rules)
    with pytest.raises(ValueError, match="the tree does not have 'turned'"):
        quantize({name: leaf for name, leaf in params.items() if name != "turned"}, sites, rules)
    with pytest.raises(ValueError, match="'dense/kernel' is quantised already, to nf4; dequantize"):
        quantize(quantize(params, sites, rules), sites, rules)


def test_experts_are_quantised_one_by_one(quick, key):
    params = {"w": jax.random.normal(key, (2, 3, 80, 5))}

    def mixture(params, x):
        return jax.lax.scan(lambda x, w: (jnp.einsum("eti,eio->eto", x, w)[..., :1] + x, None), x, params["w"])[0]

    sites = lora.trace(mixture, params, jnp.ones((3, 4, 80)))
    assert choose(sites, {"w": "nf4"}) == {"w": Choice("nf4", -2, 2)}
    q = quantize(params, sites, {"w": "nf4"})["w"]
    alone = quantize_leaf(params["w"][1, 2], "nf4", -2)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[1, 2], q), alone)


def test_report(params, sites):
    rules = {"all-linear": "int8"}
    text = quantize_report(jax.eval_shape(lambda p: p, params), sites, rules)
    q = jax.eval_shape(lambda p: quantize(p, sites, rules), params)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert rows["turned"] == ["[8,", "4]", "int8", "16.000", "0.000", "0.000"]
    assert "last" not in rows
    before, after = lora.nbytes(params), lora.nbytes(q)
    assert f"2 of 6 weights; all parameters {before / 1e6:.3f} MB before, {after / 1e6:.3f} MB after" in text


@pytest.fixture
def folder(tmp_path):
    return tiny.write(tmp_path / "model", hidden_size=128, intermediate_size=192, tie_word_embeddings=False)


def traced(config, params):
    return lora.trace(functools.partial(decoder.forward, config=config), params, np.zeros((1, 8), np.int32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loading_quantises_as_quantize_does(quick, tmp_path, folder, dtype):
    whole = hf.load(folder, dtype)
    expected = quantize(whole.params, traced(whole.config, whole.params), RULES)
    assert set(formats(expected).values()) == {"nf4", "int4", "int8", "fp8"}
    for path in (folder, tiny_gguf.write(tmp_path / "model.gguf", folder)):
        loaded = hf.load(path, dtype, quantize=RULES).params
        assert jax.tree.structure(loaded) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    nothing_else = lora.tree.leaves_by_path(expected, is_leaf=is_quantised).keys() - formats(expected).keys()
    assert all(path.endswith("scale") for path in nothing_else)


def test_loading_refuses_bad_rules_before_it_reads(folder, monkeypatch):
    monkeypatch.delattr(safetensors.Files, "tensor")
    with pytest.raises(ValueError, match="rule 'q_porj' matches no parameter; nearest: 'layers/q_proj/kernel'"):
        hf.load(folder, quantize={"q_porj": "nf4"})


def live():
    return sum(x.nbytes for x in jax.live_arrays())


def test_loading_never_holds_the_model_as_floats(quick, tmp_path, monkeypatch):
    folder = tiny.write(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    one_layer = 4 * 256 * 1024  # large beside what Python itself takes for tracing
    rules = {"all-linear": "nf4"}
    hf.load(folder, quantize=rules)  # what is compiled once is not counted
    read, seen = safetensors.Files.tensor, []

    def watched(self, name):
        tensor = read(self, name)
        seen.append(live() + tracemalloc.get_traced_memory()[0])
        return tensor

    monkeypatch.setattr(safetensors.Files, "tensor", watched)

    def held(**kwargs):
        seen.clear()
        tracemalloc.start()
        start = live()
        params = hf.load(folder, **kwargs).params
        tracemalloc.stop()
        return max(seen) - start, lora.nbytes(params)

    floats, size = held()
    quantised, small = held(quantize=rules)
    assert small < size / 5
    assert floats > 0.9 * size
    # Of the twelve in a stacked parameter: one as read, one as floats, one quantised; one may be freed a moment late.
    assert quantised < small + 5 * one_layer
