"""Kernels of other platforms compute what the attention in chunks computes, and say where they cannot."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import lora_jax as lora
from lora_jax.models import attention, decoder, kernels
from lora_jax.models.config import DecoderConfig

pytestmark = pytest.mark.usefixtures("quick_module")
TINY = DecoderConfig("llama", 61, 16, 24, 2, 2, 1, 8, context=64)
interpreted = functools.partial(kernels.splash, interpret=True)


def given(tokens, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, tokens, heads, 8)), dtype) for heads in (4, 2, 2))
    return q, k, v, jnp.asarray(np.sort(rng.integers(0, 4, (2, tokens)), axis=1), jnp.int32)


def both(kernel, q, k, v, segments, window=None, scale=None, cap=None):
    """Output and gradients, of the kernel and of the attention in chunks, computed by one program."""

    def one(f):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    more = (cap,) if cap else ()
    ours = functools.partial(attention.causal, segments_BT=segments, window=window, scale=scale, cap=cap)
    return jax.jit(lambda: (one(lambda *x: kernel(*x, segments, window, scale, *more)), one(ours)))()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "packed", "options"),
    [
        pytest.param(150, False, {}, id="one segment, padded"),
        pytest.param(600, True, {}, id="packed, several blocks"),
        pytest.param(256, True, {"window": 20, "scale": 0.5, "cap": 3.0}, id="window, scale and cap"),
    ],
)
def test_splash_equals_chunks(tokens, packed, options):
    *x, segments = given(tokens)
    got, want = both(interpreted, *x, segments if packed else None, **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.abs(want[0] - attention.causal(*x, None if packed else segments, **options)).max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_what_cudnn_is_asked_for_equals_chunks(monkeypatch, packed):
    """cuDNN cannot run here; XLA's own attention, asked the same, can."""
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation, **how: asked(*x, **how))
    *x, segments = given(51)
    segments = segments if packed else None
    for window in (None, 9):
        got, want = both(kernels.cudnn, *x, segments, window, 0.5)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        other = attention.causal(*x, segments, None, None if window else 9, 0.5)
        assert np.abs(want[0] - other).max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_is_called_by_the_program_for_a_gpu(monkeypatch, packed):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    *x, segments = given(51, jnp.bfloat16)
    segments = segments if packed else None

    def called(f):
        gradient = jax.jit(jax.grad(lambda *x: jnp.sum(f(*x, segments).astype(jnp.float32)), argnums=(0, 1, 2)))
        text = gradient.trace(*x).lower(lowering_platforms=("cuda",)).as_text()
        return sorted(set(re.findall(r"__cudnn\$\w+", text)))

    mask = "ScaleBias" if packed else ""
    assert called(kernels.cudnn) == [f"__cudnn$fmha{mask}Softmax", f"__cudnn$fmha{mask}SoftmaxBackward"]
    assert called(attention.causal) == []


@pytest.mark.slow
def test_a_lifted_decoder_with_splash(monkeypatch):
    monkeypatch.setattr(kernels, "splash", interpreted)
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(0, 61, (2, 20)), np.repeat([[1, 2]], 10, axis=1).repeat(2, axis=0)
    params = decoder.init(jax.random.key(0), TINY)
    sites = lora.trace(decoder.hidden, params, tokens, TINY)
    adapters = lora.init(jax.random.key(1), params, sites, lora.Spec(rank=2))
    adapters = jax.tree.map(lambda w: jnp.asarray(0.3 * rng.normal(size=w.shape), w.dtype), adapters)

    def gradient(attention, remat, segments=segments):
        config = dataclasses.replace(TINY, attention=attention)
        lifted = lora.lift(lambda p: decoder.hidden(p, tokens, config, segments_BT=segments, remat=remat))
        return jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(lifted(lora.attach(params, a))))))(adapters)

    def apart(one, other):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)

    want = gradient("chunked", "none")
    assert apart(gradient("splash", "dots"), want) < 1e-5
    assert apart(gradient("chunked", "none", None), want) > 0.1


def chosen(asked, platform, dtype=jnp.bfloat16, prefix=False, **changes):
    return kernels.choose(asked, platform, dataclasses.replace(TINY, **changes), dtype, prefix)


def test_the_platform_chooses():
    assert chosen("auto", "tpu") == ("splash", "the kernel for tpu")
    assert chosen("auto", "gpu") == ("cudnn", "the kernel for gpu")
    assert chosen("auto", "cpu") == ("chunked", "there is no kernel for cpu")
    assert chosen("chunked", "tpu") == ("chunked", "as asked for")
    assert chosen("auto", "tpu", jnp.float32, attn_cap=5.0, window=4)[0] == "splash"
    assert chosen("auto", "gpu", window=4)[0] == "cudnn"


@pytest.mark.parametrize(
    ("platform", "changes", "why"),
    [
        ("tpu", {"prefix": True}, "not splash: a prompt or a prefix comes before the text"),
        ("tpu", {"window": 4, "sliding": (True, False)}, "not splash: layers differ in their window"),
        ("gpu", {"attn_cap": 5.0}, "not cudnn: cuDNN has no cap of scores"),
        ("gpu", {"dtype": jnp.float32}, "not cudnn: cuDNN has no float32"),
        ("gpu", {"head_dim": 12}, "not cudnn: cuDNN has no heads of 12 numbers"),
    ],
)
def test_what_a_kernel_cannot_do_is_done_in_chunks_and_said(platform, changes, why):
    assert chosen("auto", platform, **changes) == ("chunked", why)
    kind = kernels.OF_PLATFORM[platform]
    with pytest.raises(ValueError, match=f"attention='{kind}': {why.partition(': ')[2]}; 'auto' and 'chunked' do"):
        chosen(kind, platform, **changes)


def test_what_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="attention='splash': there is no splash on gpu; 'auto' and 'chunked' do"):
        chosen("splash", "gpu")
    with pytest.raises(ValueError, match="attention='flash' is not one of: auto, chunked, splash, cudnn"):
        chosen("flash", "tpu")
