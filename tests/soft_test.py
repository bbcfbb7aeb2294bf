"""A prompt does what the same tokens before the text do, in packed rows and with a cache, and trains nothing else."""

import dataclasses

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_soft import KINDS, REMATS, TINY, N, T, forward, gradient, speak, texts, trained

import lora_jax as lora
from lora_jax import checkpoint, soft
from lora_jax.cost import flops
from lora_jax.models import decoder, generate

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def tiny():
    params = decoder.init(jax.random.key(0), TINY)
    return {**params, "embed": {"embedding": 20 * params["embed"]["embedding"]}}


# --- A prompt is what its tokens are ---


@pytest.mark.parametrize("init", [soft.init_prompt, soft.init_prefix])
def test_a_start_from_a_text_is_that_text(tiny, key, init):
    prompt, x = texts(1, N, seed=1), texts()
    whole = forward(tiny, np.concatenate([prompt.repeat(2, axis=0), x], axis=1), TINY)[:, N:]
    start = init(key, tiny, TINY, N, prompt[0])
    np.testing.assert_allclose(forward(soft.attach(tiny, start, TINY), x, TINY), whole, atol=1e-5)
    for other in (init(key, tiny, TINY, N, prompt[0, ::-1]), init(key, tiny, TINY, N - 1, prompt[0])):
        assert np.abs(forward(soft.attach(tiny, other, TINY), x, TINY) - whole).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(tiny, kind):
    tree = soft.attach(tiny, trained(kind), TINY)
    first, second = texts(1, 7), texts(1, 9, seed=1)
    packed = np.concatenate([first, second], axis=1)
    positions, segments = np.r_[:7, :9][None], np.repeat([1, 2], [7, 9])[None]
    together = forward(tree, packed, TINY, positions, segments)
    np.testing.assert_allclose(together[:, :7], forward(tree, first, TINY), atol=1e-5)
    np.testing.assert_allclose(together[:, 7:], forward(tree, second, TINY), atol=1e-5)
    assert np.abs(together - forward(tiny, packed, TINY, positions, segments)).max() > 0.1
    assert np.abs(together - forward(tree, packed, TINY, positions))[:, 7:].max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_queries_see_all_of_a_prefix(tiny, kind):
    """Texts longer than a block of queries, against the cache, which has no blocks."""
    config = dataclasses.replace(TINY, context=256)
    tree, x = soft.attach(tiny, trained(kind), config), texts(1, 150)
    step = jax.jit(speak, static_argnames="config")
    rest = x, config, np.arange(150)[None], decoder.init_cache(config, 1, 150)
    expected, _ = step(tree, *rest)
    np.testing.assert_allclose(forward(tree, x, config)[:, -1], expected, atol=1e-5)
    assert np.abs(step(tiny, *rest)[0] - expected).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_equals_that_without(tiny, kind):
    tree, x, lengths, new = soft.attach(tiny, trained(kind), TINY), texts(), [T, 7], 8
    tokens, _ = generate.generate(tree, TINY, x, lengths, new, (), apply=speak)
    for row, prompt, length in zip(tokens, x, lengths, strict=True):
        text = np.zeros((1, T + new), int)
        text[0, :length] = prompt[:length]
        for end in range(length, length + new):
            text[0, end] = np.argmax(forward(tree, text, TINY)[0, end - 1])
        np.testing.assert_array_equal(row, text[0, length : length + new])
    assert not np.array_equal(tokens[0], tokens[1])


def test_adapters_beside_a_prompt(tiny, key):
    """What stands for the decoder's functions may have adapters of its own."""
    x, prompt = texts(), trained("prompt")
    adapters = lora.init(key, tiny, lora.trace(decoder.forward, tiny, x, TINY), lora.Spec(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    tree = soft.attach(lora.attach(tiny, adapters), prompt, TINY, keys_values=lora.lift(decoder.keys_values))
    run = jax.jit(soft.applied(lora.lift(decoder.forward)), static_argnames="config")
    both = run(tree, x, TINY)
    merged = forward(soft.attach(lora.merge(tiny, adapters), prompt, TINY), x, TINY)
    np.testing.assert_allclose(both, merged, atol=1e-3)
    assert np.abs(both - forward(soft.attach(tiny, prompt, TINY), x, TINY)).max() > 0.1
    np.testing.assert_array_equal(run(tiny, x, TINY), forward(tiny, x, TINY))


# --- Starts ---


def test_random_starts_are_rows_of_the_vocabulary(tiny, key):
    vectors, table = soft.init_prompt(key, tiny, TINY, N).vectors, tiny["embed"]["embedding"]
    assert (vectors[:, None] == table).all(-1).any(-1).all()
    np.testing.assert_array_equal(vectors, soft.init_prompt(key, tiny, TINY, N).vectors)
    assert not np.array_equal(vectors, soft.init_prompt(jax.random.key(1), tiny, TINY, N).vectors)
    prefix, other = (soft.init_prefix(jax.random.key(seed), tiny, TINY, N) for seed in (0, 1))
    assert np.abs(prefix.k - other.k).max() > 0.1


@pytest.mark.parametrize(("n", "expected"), [(2, [9, 4]), (3, [9, 4, 7]), (8, [9, 4, 7, 9, 4, 7, 9, 4])])
def test_a_text_is_repeated_or_cut(tiny, key, n, expected):
    vectors = soft.init_prompt(key, tiny, TINY, n, [9, 4, 7]).vectors
    np.testing.assert_array_equal(vectors, tiny["embed"]["embedding"][np.array(expected)])


@pytest.mark.parametrize("init", [soft.init_prompt, soft.init_prefix])
def test_what_is_trained_is_float32_over_a_bfloat16_base(tiny, key, init):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    small = jax.eval_shape(lambda: init(key, half, TINY, N))
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype(jnp.float32)}
    with jax.numpy_dtype_promotion("strict"):
        tree = jax.eval_shape(lambda small: soft.attach(half, small, TINY), small)
        hidden = jax.eval_shape(lambda tree: soft.applied(decoder.hidden)(tree, texts(), TINY), tree)
    assert hidden.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_over_a_bfloat16_base(tiny, kind):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    over_half, exact = (gradient(trained(kind), base, texts(), TINY, "none") for base in (half, tiny))
    for slope, other in zip(jax.tree.leaves(over_half), jax.tree.leaves(exact), strict=True):
        assert slope.dtype == jnp.float32
        np.testing.assert_allclose(slope, other, atol=0.1 * np.abs(other).max())
        assert not np.array_equal(slope, other)


# --- What a step costs, and that it trains ---


def products(step, params, *rest):
    """The compiled products of a weight's size."""
    sizes = {leaf.size // layers for leaf in jax.tree.leaves(params["layers"]) for layers in (1, TINY.layers)}
    sizes = {size for size in sizes if size > TINY.layers * TINY.dim} | {params["embed"]["embedding"].size}
    program = hlo.parse(step.lower(*rest).compile().as_text())
    return [instruction for instruction in program.computed(sizes) if instruction.opcode == "dot"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", REMATS)
def test_no_gradient_of_the_base_is_computed(tiny, kind, remat):
    x, small = texts(3, 10), trained(kind)
    assert products(gradient, tiny, small, tiny, x, TINY, remat) == []


def test_a_gradient_of_the_base_would_be_seen(tiny):
    full = jax.jit(jax.grad(lambda params: decoder.forward(params, texts(3, 10), TINY).sum()))
    assert len(products(full, tiny, tiny)) >= 7


def test_a_prompt_is_run_once_for_all_rows(tiny):
    def cost(kind, batch):
        return flops(lambda small, x: gradient(small, tiny, x, TINY, "none"), trained(kind), texts(batch))

    assert cost("prompt", 2) - cost("prefix", 2) == cost("prompt", 8) - cost("prefix", 8) > 0
    assert cost("prefix", 8) > cost("prefix", 2)


@pytest.mark.parametrize("init", [soft.init_prompt, soft.init_prefix])
def test_training_under_scan(tiny, key, init):
    x, tx = texts(), optax.adam(0.03)

    def loss(small):
        logits = soft.applied(decoder.forward)(soft.attach(tiny, small, TINY), x, TINY)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], x[:, 1:]).mean()

    def step(state, _):
        small, optimizer = state
        value, slopes = jax.value_and_grad(loss)(small)
        updates, optimizer = tx.update(slopes, optimizer, small)
        return (optax.apply_updates(small, updates), optimizer), value

    start = init(key, tiny, TINY, N)
    (_, _), losses = jax.jit(lambda small: jax.lax.scan(step, (small, tx.init(small)), length=30))(start)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_counted_like_any_tree(tmp_path, kind):
    small, tx = trained(kind), optax.adam(1e-3)
    assert lora.count(small) == {"prompt": N * 32, "prefix": 2 * 2 * N * 2 * 8}[kind]
    saved = checkpoint.State(1, small, tx.init(small), {})
    with checkpoint.Checkpoints(tmp_path, {"base": "abc"}, keep=1) as checkpoints:
        checkpoints.save(saved)
    back = checkpoint.load(tmp_path, jax.eval_shape(lambda: small), "abc")
    jax.tree.map(np.testing.assert_array_equal, back, small)
    assert isinstance(back, type(small))


# --- Bad input ---


@pytest.mark.parametrize("init", [soft.init_prompt, soft.init_prefix])
@pytest.mark.parametrize(
    ("n", "tokens", "message"),
    [
        (0, None, "n=0: this decoder has room for 1 to 63 trained tokens before a text"),
        (64, None, "n=64: this decoder has room for 1 to 63"),
        (4, [3, 61], "token 61 of the prompt is not in the vocabulary of 61"),
        (4, [-1], "token -1 of the prompt"),
        (4, [], "no tokens to start the prompt from"),
    ],
)
def test_bad_starts(tiny, key, init, n, tokens, message):
    with pytest.raises(ValueError, match=message):
        init(key, tiny, TINY, n, tokens)


def test_what_does_not_fit(tiny):
    x = texts()
    with pytest.raises(ValueError, match=r"prompt: vectors \(5, 31\) do not fit this decoder: they are \[N, 32\]"):
        soft.attach(tiny, soft.Prompt(jnp.ones((5, 31))), TINY)
    good = trained("prefix")
    for bad in (soft.Prefix(good.k, good.v[:1]), soft.Prefix(good.k, good.v[:, :3])):
        with pytest.raises(ValueError, match=r"prefix: keys \(2, 5, 2, 8\) and values .* each is \(2, 5, 2, 8\)"):
            decoder.forward(tiny, x, TINY, prefix=(bad.k, bad.v))
    tree = soft.attach(tiny, good, TINY)
    assert (soft.room(tree, TINY), soft.room(tiny, TINY)) == (59, 64)
    assert forward(tree, texts(1, 59), TINY).shape == (1, 59, 61)
    too_long = "a prefix of 5 and 60 tokens of text are more than the 64 positions of this decoder"
    with pytest.raises(ValueError, match=too_long):
        forward(tree, texts(1, 60), TINY)
    with pytest.raises(ValueError, match=too_long):
        generate.generate(tree, TINY, texts(1, 50), [50], 11, (), apply=speak)
