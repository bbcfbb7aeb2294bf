"""Batches: shifting, masks, what does not fit, packing, and the place in the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.data import packing
from lora_jax.models import config as configs
from lora_jax.models import decoder, loss

CONFIG = configs.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
)


def example(length, name="x", learn_from=1):
    rng = np.random.default_rng(length)
    return packing.Tokens(name, rng.integers(0, 64, length, np.int32), np.arange(length) >= learn_from)


def test_targets_are_the_next_ids():
    e = example(5, learn_from=3)
    batch = packing.batch(packing.rows([e], 8), 8)
    np.testing.assert_array_equal(batch["tokens"][0], [*e.ids[:4], 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["targets"][0], [*e.ids[1:], 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["weights"][0], [0, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["segments"][0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["positions"][0, :4], range(4))
    assert {name: x.dtype.name for name, x in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "segments": "int32",
        "positions": "int32",
    }


def test_nothing_to_learn_is_an_error_that_names_the_example():
    with pytest.raises(ValueError, match="data:7: nothing to learn"):
        packing.fit([example(5), example(5, "data:7", learn_from=9)], 8)
    with pytest.raises(ValueError, match="nothing to learn"):  # the first id is never a target
        packing.fit([packing.Tokens("x", np.zeros(3, np.int32), np.array([True, False, False]))], 8)


def test_longer_ones_are_counted_and_cut_only_if_asked():
    short, exact, long = example(5), example(9), example(10)
    late = example(12, "late", learn_from=10)
    kept, dropped = packing.fit([short, exact, long, late], 8)
    assert [e.inputs for e in kept] == [4, 8]
    assert [e.inputs for e in dropped] == [9, 11]
    kept, dropped = packing.fit([short, exact, long, late], 8, truncate=True)
    assert [e.inputs for e in kept] == [4, 8, 8]
    assert [e.name for e in dropped] == ["late"]  # nothing to learn is left of it


def test_what_follows_the_last_id_to_learn_is_cut_off():
    asked = packing.Tokens("x", np.arange(9, dtype=np.int32), np.isin(np.arange(9), [3, 4]))
    ((kept,), _) = packing.fit([asked], 8)
    np.testing.assert_array_equal(kept.ids, range(5))
    ((whole,), _) = packing.fit([asked._replace(learn=np.arange(9) > 3)], 8)
    np.testing.assert_array_equal(whole.ids, range(9))


def test_share_of_padding():
    rows = [[example(5), example(4)], [example(9)]]
    assert packing.padding(rows, 8) == 1 / 16 == 1 - packing.batch(rows, 8)["segments"].astype(bool).mean()
    assert packing.padding(packing.rows([example(5), example(4)], 8), 8) == 9 / 16


def test_most_learned():
    assert packing.most_learned(packing.rows([example(5, learn_from=3), example(6, learn_from=4)], 8)) == 2
    assert packing.most_learned([[example(5, learn_from=3), example(6, learn_from=4)]]) == 4


def test_best_fit_is_complete_fits_and_is_tight():
    rng = np.random.default_rng(0)
    examples = [example(int(n), str(i)) for i, n in enumerate(rng.integers(2, 30, 200))]
    rows = packing.rows(examples, 32, pack=True)
    assert all(sum(e.inputs for e in row) <= 32 for row in rows)
    assert sorted(e.name for row in rows for e in row) == sorted(e.name for e in examples)
    total = sum(e.inputs for e in examples)
    assert len(rows) <= 1.05 * np.ceil(total / 32)
    assert len(packing.rows(examples, 32)) == 200
    assert [[e.name for e in row] for row in rows] == [
        [e.name for e in row] for row in packing.rows(examples, 32, pack=True)
    ]


def test_packed_loss_and_gradients_are_the_unpacked_ones(quick):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), CONFIG))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), jnp.float32), shapes)
    examples = [example(n, learn_from=n // 2) for n in (4, 7, 9, 12, 15)]

    @functools.partial(jax.jit, static_argnames="segments")
    @functools.partial(jax.value_and_grad, has_aux=True)
    def sums(params, b, segments):
        apart = (b["positions"], b["segments"]) if segments else (None, None)
        hidden = decoder.hidden(params, b["tokens"], CONFIG, *apart)
        return loss.cross_entropy(params, hidden, b["targets"], b["weights"], CONFIG)

    def total(pack, segments=True):
        return sums(params, packing.batch(packing.rows(examples, 24, pack), 24), segments=segments)

    ((packed, n), gradient), ((unpacked, m), expected) = total(True), total(False)
    assert n == m == sum(len(e.ids) - len(e.ids) // 2 for e in examples)
    np.testing.assert_allclose(packed, unpacked, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), gradient, expected)
    (leaking, _), other = total(True, segments=False)
    assert abs(leaking - unpacked) > 1e-2
    assert all(
        np.abs(a - b).max() > 1e-3 * np.abs(b).max()
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True)
    )


def test_the_place_in_the_data_is_restored():
    rows = packing.rows([example(n) for n in range(3, 14)], 12)

    def new(seed=3):
        return packing.iterate(rows, 12, batch_size=4, seed=seed)

    first = new()
    for _ in range(4):  # into the second pass
        next(first)
    place = first.get_state()
    expected = [next(first)["tokens"] for _ in range(5)]
    again = new()
    again.set_state(place)
    for tokens in expected:
        np.testing.assert_array_equal(next(again)["tokens"], tokens)
    assert not np.array_equal(next(new())["tokens"], expected[0])  # a new one begins elsewhere
    assert not np.array_equal(next(new(seed=4))["tokens"], next(new())["tokens"])


def test_every_pass_shows_every_row_once_in_another_order():
    rows = packing.rows([example(n) for n in range(3, 15)], 13)
    batches = packing.iterate(rows, 13, batch_size=4, seed=0)
    passes = [np.concatenate([next(batches)["segments"].sum(1) for _ in range(3)]) for _ in range(2)]
    for lengths in passes:
        assert sorted(lengths) == list(range(2, 14))
    assert not np.array_equal(*passes)


def test_a_text_in_pieces_has_every_target_once():
    whole, short = example(23, "a", learn_from=0), example(4, "b", learn_from=0)
    cut = list(packing.pieces([whole, short], 8))
    assert [e.inputs for e in cut] == [8, 8, 6, 3] and [e.name for e in cut] == ["a", "a", "a", "b"]
    targets = np.concatenate([e.ids[1:] for e in cut])
    np.testing.assert_array_equal(targets, [*whole.ids[1:], *short.ids[1:]])
    assert len(list(packing.pieces([short], 3))) == 1 and len(list(packing.pieces([short], 2))) == 2


def test_padding_is_told_by_length_not_by_id():
    """An id that is used as padding elsewhere is learned like any other."""
    zeros = packing.Tokens("x", np.zeros(5, np.int32), np.arange(5) >= 2)
    batch = packing.batch([[zeros]], 8)
    np.testing.assert_array_equal(batch["weights"][0], [0, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch["segments"][0], [1, 1, 1, 1, 0, 0, 0, 0])


def test_parts_are_the_batches_of_the_whole():
    rows = packing.rows([example(n) for n in range(3, 15)], 13)
    whole = packing.iterate(rows, 13, 4, seed=0)
    parts = [packing.iterate(rows, 13, 4, seed=0, part=part) for part in (slice(0, 2), slice(2, 4))]
    for _ in range(7):
        expected, halves = next(whole)["tokens"], [next(part)["tokens"] for part in parts]
        np.testing.assert_array_equal(np.concatenate(halves), expected)
        assert not np.array_equal(*halves)
    assert parts[0].get_state() == parts[1].get_state() == whole.get_state()


def test_a_mixture_has_its_weights_and_its_place():
    short, long = (packing.rows([example(n, str(n)) for n in sizes], 13) for sizes in (range(3, 7), range(8, 14)))

    def new():
        return packing.mix([(short, 3.0), (long, 1.0)], 13, 4, seed=0)

    batches = new()
    lengths = np.concatenate([next(batches)["segments"].sum(1) for _ in range(24)])
    assert (lengths < 6).sum() == 72 and (lengths > 6).sum() == 24
    assert {*lengths} == {*range(2, 6), *range(7, 13)}  # every row of both comes
    place = batches.get_state()
    expected = [next(batches)["tokens"] for _ in range(5)]
    again = new()
    again.set_state(place)
    for tokens in expected:
        np.testing.assert_array_equal(next(again)["tokens"], tokens)
    assert not np.array_equal(next(new())["tokens"], expected[0])
