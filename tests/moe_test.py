"""Experts compute what each token asks of them, cost what is active, and have factors of their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cost import flops
from lora_jax.models import config as configs
from lora_jax.models import decoder, moe
from lora_jax.models.config import DecoderConfig
from lora_jax.quantize import dequantize, quantize

pytestmark = pytest.mark.usefixtures("quick_module")
N, D, F, E, ACTIVE = 11, 8, 12, 5, 2
CONFIG = DecoderConfig("qwen3_moe", 61, D, F, 2, 4, 2, 8, 32, qk_norm="head", experts=E, active_experts=ACTIVE)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))
EXPERTS = [f"layers/{name}_proj/kernel" for name in ("gate", "up", "down")]


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def token_by_token(x, scores, w, active, normalised, weights=softmax, weighted_inputs=False):
    """In float64, an expert at a time."""
    out = np.zeros_like(x)
    for n, p in enumerate(weights(scores)):
        best = np.argsort(-p)[:active]
        total = p[best].sum() if normalised else 1.0
        for e in best:
            before, after = (p[e] / total, 1.0) if weighted_inputs else (1.0, p[e] / total)
            out[n] += after * np.tanh(before * x[n] @ w["up"][e]) @ w["down"][e]
    return out


def random(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(N, D)),
        rng.normal(size=(N, E)),
        {
            "up": rng.normal(size=(E, D, F)),
            "down": rng.normal(size=(E, F, D)),
        },
    )


def mlp(w):
    def f(x_GMD, expert_G):
        h_GMF = jnp.tanh(jnp.einsum("gmd,gdf->gmf", x_GMD, w["up"][expert_G]))
        return jnp.einsum("gmf,gfd->gmd", h_GMF, w["down"][expert_G])

    return f


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("idle", [None, 2], ids=["all experts", "one without a token"])
@pytest.mark.parametrize("active", [1, 3])
def test_routed_equals_token_by_token(active, idle, normalised):
    x, scores, w = random()
    if idle is not None:
        scores[:, idle] = -50.0
    f32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    got = moe.routed(mlp(f32(w)), f32(x), f32(scores), active, normalised)
    np.testing.assert_allclose(got, token_by_token(x, scores, w, active, normalised), rtol=1e-4, atol=1e-4)
    for other in ((active + 1, normalised), (active, not normalised)):
        assert np.abs(got - token_by_token(x, scores, w, *other)).max() > 1e-2


@pytest.mark.parametrize("weighted_inputs", [True, False])
@pytest.mark.parametrize("weights", [softmax, sigmoid], ids=["softmax", "sigmoid"])
def test_weights_of_the_scores_and_what_they_multiply(weights, weighted_inputs):
    x, scores, w = random()
    f32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    got = moe.routed(mlp(f32(w)), f32(x), f32(scores), 2, False, weights.__name__, weighted_inputs)
    want = functools.partial(token_by_token, x, scores, w, 2, False)
    np.testing.assert_allclose(got, want(weights, weighted_inputs), rtol=1e-4, atol=1e-4)
    for other in ((weights, not weighted_inputs), ({softmax: sigmoid, sigmoid: softmax}[weights], weighted_inputs)):
        assert np.abs(got - want(*other)).max() > 1e-2


def test_scores_that_saturate_are_still_told_apart():
    x, _, w = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random())
    scores = jnp.tile(jnp.array([30.0, 40.0, 20.0, 0.0, 0.0]), (N, 1))  # whose first three sigmoids are 1
    got = moe.routed(mlp(w), x, scores, 1, False, "sigmoid")
    expert = [jnp.tanh(x @ w["up"][e]) @ w["down"][e] for e in range(2)]
    np.testing.assert_allclose(got, expert[1], atol=1e-5)
    assert np.abs(got - expert[0]).max() > 0.1


def test_scores_are_learnt_from():
    x, scores, w = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random())
    gradient = jax.grad(lambda scores: moe.routed(mlp(w), x, scores, 2, True)[0, 0])(scores)
    assert np.count_nonzero(np.abs(gradient) > 1e-6) == 2  # of the two experts of the first token
    alone = jax.grad(lambda scores: moe.routed(mlp(w), x, scores, 1, True)[0, 0])(scores)
    np.testing.assert_allclose(alone, 0, atol=1e-6)  # a single weight is 1 whatever the scores


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("longest", [512, 1])
def test_what_each_device_adds_is_the_sum_of_all(crowded, longest, monkeypatch):
    """Also where all tokens ask for one device's experts, which computes them by and by."""
    monkeypatch.setattr(moe, "LONGEST", longest)
    x, scores, w = random()
    x, scores = np.tile(x, (8, 1)), np.tile(scores, (8, 1))
    w, scores = jax.tree.map(lambda a: np.concatenate([a, -a])[:8], w), np.concatenate([scores, scores - 1], 1)[:, :8]
    if crowded:
        scores[:, 2:4] += 50
    expert = np.argsort(-scores)[:, :2].copy()
    p = np.take_along_axis(softmax(scores), expert, 1)
    f32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))

    def part(device, rounds=True):
        own = f32(jax.tree.map(lambda a: a[2 * device : 2 * device + 2], w))

        def loss(x):
            y = moe._computed(mlp(own), x, jnp.asarray(expert) - 2 * device, f32(p), 8, 4, False)
            return jnp.sum(jnp.cos(y)), y

        with monkeypatch.context() as patch:
            if not rounds:
                patch.setattr(jax.lax, "cond", lambda _, then, otherwise, *args: otherwise(*args))
            (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(f32(x))
        return np.asarray(y), gradient

    parts = [part(device)[0] for device in range(4)]
    np.testing.assert_allclose(sum(parts), token_by_token(x, scores, w, 2, False), rtol=1e-4, atol=1e-4)
    once, gradient = part(1, rounds=False)
    assert (np.abs(once - parts[1]).max() > 1e-2) == crowded
    if crowded:
        assert not any(np.any(parts[device]) for device in (0, 2, 3))
        assert np.abs(gradient - part(1)[1]).max() > 1e-2


def test_cost_is_that_of_the_active_experts():
    def cost(**changes):
        config = dataclasses.replace(CONFIG, **{"hidden": 256, **changes})
        params = jax.eval_shape(functools.partial(decoder.init, config=config), jax.random.key(0))
        return flops(functools.partial(decoder.hidden, config=config), params, np.tile(TOKENS, (4, 1)))

    layers, tokens = 2, 4 * TOKENS.size
    per_expert = layers * tokens * 2 * 3 * D * 256
    # Groups that are filled up: at most as many rows again as there are, and no more of them for more experts.
    assert 2 * per_expert < cost(active_experts=3) - cost(experts=0, hidden=1, active_experts=0) < 6.5 * per_expert
    assert cost(experts=16, active_experts=2) < cost(experts=4, active_experts=2) + 2 * per_expert


@pytest.fixture(scope="module")
def adapted():
    """Parameters, the function, and adapters of everything, all factors random."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(decoder.init, config=CONFIG), jax.random.key(0))
    params = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), jnp.float32), shapes)
    f = functools.partial(decoder.forward, config=CONFIG)
    spec = lora.Spec(rank=4, active_experts=ACTIVE)
    adapters = lora.init(jax.random.key(1), params, lora.trace(f, params, TOKENS), spec)
    return params, f, jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), adapters)


def test_every_expert_has_factors_of_its_own(adapted):
    params, f, adapters = adapted
    assert {f"layers/{name}_proj/kernel" for name in "qkvo"} | {"layers/router/kernel", *EXPERTS} == set(adapters)
    rank = 4 // ACTIVE  # divided among the experts of a token
    for path in EXPERTS:
        into, out = (F, D) if "down" in path else (D, F)
        assert adapters[path].a.shape == (2, E, into, rank) and adapters[path].b.shape == (2, E, out, rank)
    assert adapters["layers/router/kernel"].a.shape == (2, D, 4)
    lifted = jax.jit(lambda a: lora.lift(f)(lora.attach(params, a), TOKENS))(adapters)
    np.testing.assert_allclose(lifted, jax.jit(f)(lora.merge(params, adapters), TOKENS), atol=2e-4)
    shuffled = adapters | {path: jax.tree.map(lambda w: w[:, ::-1], adapters[path]) for path in EXPERTS}
    assert np.abs(lifted - jax.jit(f)(lora.merge(params, shuffled), TOKENS)).max() > 1e-2


@pytest.mark.slow
def test_gradients_and_remat(adapted):
    params, _, adapters = adapted

    def gradient(lift, remat):
        f = functools.partial(decoder.hidden, config=CONFIG, remat=remat)

        def loss(adapters):
            y = lora.lift(f)(lora.attach(params, adapters), TOKENS) if lift else f(lora.merge(params, adapters), TOKENS)
            return jnp.mean(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y)

        return jax.jit(jax.grad(loss))(adapters)

    dense = gradient(lift=False, remat="none")
    for remat in ("dots", "full"):
        for got, want in zip(jax.tree.leaves(gradient(True, remat)), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
            assert np.abs(want).max() > 1e-5


@pytest.mark.slow
def test_quantised_experts(adapted):
    params, f, adapters = adapted
    small = quantize(params, lora.trace(f, params, TOKENS), {"all-linear": "int8"})
    f = jax.jit(f)
    lifted = lora.lift(f)(lora.attach(small, adapters), TOKENS)
    want = f(lora.merge(dequantize(small), adapters), TOKENS)
    np.testing.assert_allclose(lifted, want, atol=2e-4)
    assert np.abs(want - f(lora.merge(params, adapters), TOKENS)).max() > 1e-3


FILE = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_sparse_step": 2}, r"layers \[0, 2\] are without experts, which is not supported where others have"),
        ({"mlp_only_layers": [3]}, r"layers \[3\] are without experts"),
        ({"num_experts_per_tok": 9, "num_experts": 8}, "a token cannot go through 9 of 8 experts"),
        ({"model_type": "llama4_text", "interleave_moe_layer_step": 2}, r"layers \[0, 2\] are without experts"),
        ({"model_type": "llama4_text", "moe_layers": [0, 1, 3]}, r"layers \[2\] are without experts"),
        (
            {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 2000},
            "2000 is no multiple of the experts' 1408",
        ),
        ({"model_type": "llama4_text", "layer_types": ["sliding_attention"] * 4}, "sliding_attention is not supported"),
    ],
)
def test_refused(changes, message):
    assert configs.from_hf(FILE).experts == 128
    with pytest.raises(ValueError, match=message):
        configs.from_hf(FILE | changes)
