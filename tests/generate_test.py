"""Generation gives transformers' tokens, whatever the padding, and stops where it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.interop import safetensors
from lora_jax.models import decoder, generate
from lora_jax.models.config import DecoderConfig

pytestmark = pytest.mark.usefixtures("quick_module")
LENGTHS = [3, 9, 6]
NEW = 12


@pytest.fixture(scope="module")
def loaded():
    config = DecoderConfig("llama", 64, 32, 48, 2, 4, 2, 8, context=64)
    return config, decoder.init(jax.random.key(3), config)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(3, 64, (3, 9))


def without_cache(params, config, prompt, count):
    """The argmax of the whole text's logits, one token at a time."""
    forward = jax.jit(decoder.forward, static_argnames="config")
    text = np.zeros((1, len(prompt) + count), int)
    text[0, : len(prompt)] = prompt
    for end in range(len(prompt), text.shape[1]):
        text[0, end] = np.argmax(forward(params, text, config)[0, end - 1])
    return text[0, len(prompt) :]


def test_greedy_equals_transformers(prompts, tmp_path):
    tiny_llama = pytest.importorskip("tiny_llama")
    model = tiny_llama.make()
    model.save_pretrained(tmp_path)
    config, params = safetensors.load(tmp_path, jnp.float32)
    tokens, counts = generate.generate(params, config, prompts, LENGTHS, NEW, eos_ids=())
    assert list(counts) == [NEW] * 3
    for row, prompt, length in zip(tokens, prompts, LENGTHS, strict=True):
        prompt = tiny_llama.torch.tensor(prompt[None, :length])
        theirs = model.generate(prompt, do_sample=False, max_new_tokens=NEW, eos_token_id=-1)
        np.testing.assert_array_equal(row, theirs[0, length:])


def test_greedy_equals_generation_without_cache(loaded, prompts):
    config, params = loaded
    tokens, _ = generate.generate(params, config, prompts, LENGTHS, NEW, eos_ids=())
    for row, prompt, length in zip(tokens, prompts, LENGTHS, strict=True):
        np.testing.assert_array_equal(row, without_cache(params, config, prompt[:length], NEW))
    assert not np.array_equal(tokens[0], tokens[1])


def test_padding_ids_do_not_matter(loaded, prompts):
    config, params = loaded
    other = np.where(np.arange(9) < np.array(LENGTHS)[:, None], prompts, 5)
    first, _ = generate.generate(params, config, prompts, LENGTHS, NEW, eos_ids=())
    second, _ = generate.generate(params, config, other, LENGTHS, NEW, eos_ids=())
    np.testing.assert_array_equal(first, second)
    longer, _ = generate.generate(params, config, prompts, [9, 9, 9], NEW, eos_ids=())
    assert not np.array_equal(first, longer)


def test_rows_end_at_their_end_tokens(loaded, prompts):
    config, params = loaded
    free, _ = generate.generate(params, config, prompts, LENGTHS, NEW, eos_ids=())
    ends = (int(free[0, 4]), int(free[1, 2]))
    tokens, counts = generate.generate(params, config, prompts, LENGTHS, NEW, eos_ids=ends)
    for row, count, whole in zip(tokens, counts, np.asarray(free), strict=True):
        hits = np.flatnonzero(np.isin(whole, ends))
        expected = hits[0] + 1 if len(hits) else NEW
        assert count == expected
        np.testing.assert_array_equal(row[:expected], whole[:expected])
        assert not np.any(row[expected:])
    assert min(counts) < NEW


def test_the_loop_stops_when_every_row_has_ended(loaded, prompts):
    config, params = loaded
    calls = []

    def counted(params, tokens, config, positions, cache):
        jax.debug.callback(lambda: calls.append(1))
        return decoder.forward_with_cache(params, tokens, config, positions, cache)

    first, _ = generate.generate(params, config, prompts[:1], [9], 1, eos_ids=())
    for ends, expected in (((int(first[0, 0]),), 1), ((), NEW)):
        calls.clear()
        generate.generate(params, config, prompts[:1], [9], NEW, ends, apply=counted)[0].block_until_ready()
        jax.effects_barrier()
        assert len(calls) == expected


def test_sampling_follows_its_key_and_temperature(loaded, prompts):
    config, params = loaded

    def sample(seed, temperature):
        key = jax.random.key(seed)
        return np.asarray(generate.generate(params, config, prompts, LENGTHS, NEW, (), key, temperature)[0])

    np.testing.assert_array_equal(sample(0, 1.0), sample(0, 1.0))
    assert not np.array_equal(sample(0, 1.0), sample(1, 1.0))
    greedy, _ = generate.generate(params, config, prompts, LENGTHS, NEW, ())
    np.testing.assert_array_equal(sample(0, 1e-4), greedy)
    assert not np.array_equal(sample(0, 1.0), greedy)


def test_samples_have_the_models_distribution(loaded, prompts):
    config, params = loaded
    rows = np.repeat(prompts[:1], 2000, axis=0)
    drawn, _ = generate.generate(params, config, rows, [9] * 2000, 1, (), jax.random.key(0), temperature=2.0)
    logits = decoder.forward(params, prompts[:1], config)[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 2.0))
    seen = np.bincount(np.asarray(drawn)[:, 0], minlength=64) / 2000
    assert np.abs(seen - expected).sum() < 0.2
    assert np.abs(seen - np.asarray(jax.nn.softmax(logits))).sum() > 0.2


def test_first_argument_is_opaque(loaded, prompts):
    config, params = loaded

    def unwrap(wrapped, *rest):
        return decoder.forward_with_cache(wrapped["inside"], *rest)

    plain, _ = generate.generate(params, config, prompts, LENGTHS, NEW, ())
    wrapped, _ = generate.generate({"inside": params}, config, prompts, LENGTHS, NEW, (), apply=unwrap)
    np.testing.assert_array_equal(plain, wrapped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 draws tokens: give generate a key"),
        ({"max_new": 0}, "max_new=0"),
        ({"prompt_lengths_B": [3, 0, 6]}, "every prompt needs at least 1 token"),
    ],
)
def test_bad_arguments(loaded, prompts, changes, message):
    config, params = loaded
    arguments = {"prompt_lengths_B": LENGTHS, "max_new": NEW, "eos_ids": ()} | changes
    with pytest.raises(ValueError, match=message):
        generate.generate(params, config, prompts, **arguments)


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_whole_text(loaded, prompts):
    config, params = loaded
    end = (7, 9, 11, 13, 15, 17)
    for temperature in (1.0, 0.5, 0.0):
        key = jax.random.key(5) if temperature else None
        said = generate.sample(params, config, prompts, LENGTHS, NEW, end, key, temperature)
        for b, (length, count) in enumerate(zip(LENGTHS, np.asarray(said.counts_B), strict=True)):
            text = np.array([*prompts[b, :length], *np.asarray(said.tokens_BN)[b, :count]])
            logits = decoder.forward(params, text[None, :-1], config)[0, length - 1 :] / (temperature or 1.0)
            expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), text[length:, None], axis=1)[:, 0]
            np.testing.assert_allclose(said.log_probs_BN[b, :count], expected, rtol=1e-4, atol=1e-5)
            assert not np.any(said.log_probs_BN[b, count:])


def test_padding_on_the_left_is_padding_on_the_right(loaded, prompts):
    config, params = loaded
    lefts = np.stack([np.roll(prompt, 9 - length) for prompt, length in zip(prompts, LENGTHS, strict=True)])
    key = jax.random.key(0)
    right = generate.sample(params, config, prompts, LENGTHS, NEW, (), key)
    left = generate.sample(params, config, lefts, LENGTHS, NEW, (), key, left=True)
    np.testing.assert_array_equal(left.tokens_BN, right.tokens_BN)
    np.testing.assert_allclose(left.log_probs_BN, right.log_probs_BN, rtol=1e-4, atol=1e-5)
    mistaken = generate.sample(params, config, lefts, LENGTHS, NEW, (), key)
    assert not np.array_equal(mistaken.tokens_BN, right.tokens_BN)


def test_a_row_with_its_own_key_draws_the_same_beside_others(loaded, prompts):
    config, params = loaded
    keys = jax.random.split(jax.random.key(0), 3)
    together = generate.sample(params, config, prompts, LENGTHS, NEW, (), keys).tokens_BN
    order = np.array([2, 0, 1])
    moved = generate.sample(params, config, prompts[order], np.array(LENGTHS)[order], NEW, (), keys[order]).tokens_BN
    np.testing.assert_array_equal(moved, np.asarray(together)[order])
    mistaken = generate.sample(params, config, prompts[order], np.array(LENGTHS)[order], NEW, (), keys).tokens_BN
    assert not np.array_equal(mistaken, moved)
