"""The decoder computes what transformers computes, and keeps rows, segments and padding apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import test_util

from lora_jax import trace
from lora_jax.interop import safetensors
from lora_jax.models import attention, decoder
from lora_jax.models.config import DecoderConfig

pytestmark = pytest.mark.usefixtures("quick_module")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "one head each": {"num_key_value_heads": 4},
    "one shared head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}
forward = jax.jit(decoder.forward, static_argnames=("config", "remat"))
TINY = DecoderConfig("llama", 61, 32, 48, 3, 4, 2, 8, context=64)


def tokens(batch=2, length=20, seed=0):
    return np.random.default_rng(seed).integers(3, 61, (batch, length))


@pytest.fixture
def tiny_llama():
    return pytest.importorskip("tiny_llama")


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path, tiny_llama):
    model = tiny_llama.make(**request.param)
    model.save_pretrained(tmp_path)
    return model, *safetensors.load(tmp_path, jnp.float32)


@pytest.fixture(scope="module")
def tiny():
    return decoder.init(jax.random.key(0), TINY)


def test_logits_equal_transformers(pair, tiny_llama):
    model, config, params = pair
    x = tokens()
    ours = forward(params, x, config)
    np.testing.assert_allclose(ours, tiny_llama.logits(model, x), atol=1e-4)
    assert np.abs(ours - tiny_llama.logits(model, x[:, ::-1].copy())).max() > 0.1


def test_llama3_rope_differs_from_plain_rope(tiny_llama):
    model = tiny_llama.make(rope_parameters=LLAMA3)
    plain = tiny_llama.make(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    x = tokens()
    assert np.abs(tiny_llama.logits(model, x) - tiny_llama.logits(plain, x)).max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_equal_transformers(tmp_path, tiny_llama, side):
    model = tiny_llama.make()
    model.save_pretrained(tmp_path)
    config, params = safetensors.load(tmp_path, jnp.float32)
    x = tokens()
    real = np.ones_like(x)
    real[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    theirs = tiny_llama.logits(model, x, attention_mask=real, position_ids=positions)
    ours = forward(params, x, config, positions, segments_BT=real)
    np.testing.assert_allclose(ours[real == 1], theirs[real == 1], atol=1e-4)
    if side == "left":
        unmasked = forward(params, x, config, positions)
        assert np.abs(unmasked[1, 7:] - theirs[1, 7:]).max() > 1e-2


def test_packed_equals_separate(tiny):
    first, second = tokens(1, 9), tokens(1, 11, seed=1)
    packed = np.concatenate([first, second], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(11)])[None]
    segments = np.array([[1] * 9 + [2] * 11])
    together = forward(tiny, packed, TINY, positions, segments)
    np.testing.assert_allclose(together[:, :9], forward(tiny, first, TINY), atol=1e-5)
    np.testing.assert_allclose(together[:, 9:], forward(tiny, second, TINY), atol=1e-5)
    leaking = forward(tiny, packed, TINY, positions)
    assert np.abs(together[:, 9:] - leaking[:, 9:]).max() > 1e-2


def test_no_token_sees_a_later_one(tiny):
    x = tokens()
    changed = np.concatenate([x[:, :12], x[:, :8]], axis=1)
    before, after = forward(tiny, x, TINY), forward(tiny, changed, TINY)
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 1e-2


def gradient(params, remat, tokens_BT, segments_BT=None):
    def mean(params):
        logits = forward(params, tokens_BT, TINY, segments_BT=segments_BT, remat=remat)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 7])

    return jax.jit(jax.grad(mean))(params)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_changes_no_gradient(tiny, remat):
    x, segments = tokens(), np.repeat([[1, 2]], 10, axis=1).repeat(2, axis=0)
    kept, again = gradient(tiny, "none", x, segments), gradient(tiny, remat, x, segments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), kept, again)
    other = gradient(tiny, "none", x)
    assert np.abs(other["layers"]["q_proj"]["kernel"] - kept["layers"]["q_proj"]["kernel"]).max() > 1e-5


def test_unknown_remat_is_an_error(tiny):
    with pytest.raises(ValueError, match="remat='some' is not one of: none, full, dots, offload"):
        decoder.hidden(tiny, tokens(), TINY, remat="some")


step = jax.jit(decoder.forward_with_cache, static_argnames="config")


def test_cache_equals_no_cache(tiny):
    x = tokens(2, 12)
    cache = decoder.init_cache(TINY, 2, 16)
    positions = np.broadcast_to(np.arange(12), (2, 12))
    logits, cache = step(tiny, x[:, :8], TINY, positions[:, :8], cache)
    np.testing.assert_allclose(logits, forward(tiny, x[:, :8], TINY)[:, -1], atol=1e-5)
    for t in range(8, 12):
        token = (x[:, t : t + 1], TINY, positions[:, t : t + 1])
        logits, cache = step(tiny, *token, cache)
        np.testing.assert_allclose(logits, forward(tiny, x[:, : t + 1], TINY)[:, -1], atol=1e-5)
    emptied = decoder.init_cache(TINY, 2, 16)
    alone, _ = step(tiny, *token, emptied)
    assert np.abs(alone - logits).max() > 1e-2


def test_bfloat16_keeps_its_dtype_and_float32_logits(tiny):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    assert decoder.hidden(half, tokens(), TINY).dtype == jnp.bfloat16
    logits = forward(half, tokens(), TINY)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(tiny, tokens(), TINY), atol=0.1)


def test_attention_gradient_is_the_derivative(tiny):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 6, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
    test_util.check_grads(lambda *x: attention.causal(*x, segments), (q, k, v), 1, modes=["rev"], rtol=1e-2)


@pytest.mark.slow
def test_blocks_of_queries_equal_one_masked_product():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 150, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 2]], 50, axis=1))
    same = segments[:, :, None] == segments[:, None]
    earlier = jnp.tril(jnp.ones((150, 150), bool))[None].repeat(2, 0)

    def whole(mask, q, k, v):
        return attention.masked(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)

    cases = ((None, earlier, same & earlier), (segments, same & earlier, earlier))
    for segments, mask, other in cases:
        blocks, pull = jax.vjp(lambda *x, s=segments: attention.causal(*x, s), q, k, v)
        one, pull_one = jax.vjp(lambda *x, m=mask: whole(m, *x), q, k, v)
        np.testing.assert_allclose(blocks, one, atol=1e-5)
        for a, b in zip(pull(one), pull_one(one), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        assert np.abs(blocks - whole(other, q, k, v)).max() > 0.1


def test_every_projection_is_a_plain_dense_product(tiny):
    """An interpreter of jaxprs can follow each kernel to its product: none enters a custom derivative."""
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    sites = trace(lambda p: decoder.hidden(p, tokens(), TINY, remat="dots"), tiny)
    assert {path.split("/")[1] for path, site in sites.items() if site.kind == "dense"} == dense
    assert "custom_vjp" not in str(jax.make_jaxpr(lambda p: decoder.forward(p, tokens(), TINY))(tiny))


def test_no_silent_promotion_of_dtypes(tiny):
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), tiny)
        with jax.numpy_dtype_promotion("strict"):
            assert decoder.hidden(params, tokens(), TINY, segments_BT=tokens()).dtype == dtype
