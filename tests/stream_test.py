"""Streams: against the same examples in memory, the place in the data, shards, and what is never trained on."""

import json

import numpy as np
import pytest
import template_test
import tiny

from lora_jax.data import packing, sources, stream
from train import config as settings
from train import loop, sft

FORMAT = template_test.tiny_format(tiny.CHATML)


def examples(tmp_path, values, name="x"):
    return sources.Examples(sources.records(str(tiny.write_jsonl(tmp_path / f"{name}.jsonl", values))), {})


def sums(tmp_path, n=60):
    return examples(tmp_path, [{"prompt": f"{i} + 1", "completion": "x" * (i % 17) + str(i + 1)} for i in range(n)])


def streamed(some, length=64, truncate=False):
    return stream.Stream(some, np.arange(len(some)), FORMAT, length, truncate)


def contents(batches, count):
    """What is said in the next batches, example by example."""
    said = []
    for _ in range(count):
        batch = next(batches)
        for b, segments in enumerate(batch["segments"]):
            for n in range(1, segments.max() + 1):
                at = segments == n
                np.testing.assert_array_equal(batch["positions"][b][at], np.arange(at.sum()))
                said.append(tuple(np.stack([batch[k][b][at] for k in ("tokens", "targets", "weights")]).ravel()))
    return said


def expected(some, length=64):
    kept, _ = packing.fit(packing.tokenize(FORMAT, some), length)
    return contents(iter([packing.batch(packing.rows(kept, length), length)]), 1)


def test_a_pass_over_a_stream_has_every_example_as_it_is_in_memory(tmp_path):
    some = sums(tmp_path)
    batches = stream.iterate(streamed(some), 4, seed=0)
    first, second = contents(batches, 15), contents(batches, 15)
    assert sorted(first) == sorted(second) == sorted(expected(some))
    assert first != second and first != expected(some)
    assert {x.dtype.name for x in next(batches).values()} == {"int32", "float32"}


def test_a_packed_stream_loses_nothing_and_is_tight(tmp_path):
    some = sums(tmp_path, 1000)
    batches = stream.iterate(streamed(some), 4, seed=0, pack=True)
    seen, places, full = [], 0, 0
    while len(seen) < 500:
        batch = next(batches)
        places, full = places + batch["segments"].size, full + (batch["segments"] > 0).sum()
        seen += contents(iter([batch]), 1)
    assert set(seen) <= set(expected(some)) and len(set(seen)) == len(seen)
    assert full / places > 0.85
    apart = next(stream.iterate(streamed(some), 4, seed=0))["segments"]
    assert (apart > 0).mean() < full / places


@pytest.mark.parametrize("pack", [False, True])
def test_the_place_in_a_stream_is_restored(tmp_path, pack):
    some = streamed(sums(tmp_path))
    first = stream.iterate(some, 3, seed=1, pack=pack)
    for _ in range(25):
        next(first)
    place = json.loads(json.dumps(first.get_state()))
    following = contents(first, 30)
    again = stream.iterate(some, 3, seed=1, pack=pack)
    again.set_state(place)
    assert contents(again, 30) == following
    assert contents(stream.iterate(some, 3, seed=1, pack=pack), 30) != following


@pytest.mark.parametrize("pack", [False, True])
def test_a_mixture_of_streams_has_the_rows_of_each_in_their_shares(tmp_path, pack):
    ones = sums(tmp_path)
    twos = examples(tmp_path, [{"prompt": f"{i} + 2", "completion": str(i + 2)} for i in range(40)], "twos")
    parts = [(streamed(ones), 1.0), (streamed(twos), 0.5)]
    mixed = stream.mix(parts, 3, seed=1, pack=pack)
    alone = [stream.iterate(one, 1, seed=1 + i, pack=pack) for i, (one, _) in enumerate(parts)]
    # Two rows of the first for one of the second, each in the order that it has by itself.
    rows = [next(alone[i])["tokens"][0].tolist() for i in (0, 0, 1)]
    assert sorted(next(mixed)["tokens"].tolist()) == sorted(rows)
    seen = contents(mixed, 30)
    if not pack:
        assert [sum(x in set(expected(some)) for x in seen) for some in (ones, twos)] == [60, 30]
    place = json.loads(json.dumps(mixed.get_state()))
    following = contents(mixed, 30)
    again = stream.mix(parts, 3, seed=1, pack=pack)
    again.set_state(place)
    assert contents(again, 30) == following != seen
    assert contents(stream.mix(parts[::-1], 3, seed=1, pack=pack), 30) != contents(stream.mix(parts, 3, 1, pack), 30)


def test_what_is_held_out_of_a_mixture_is_in_no_part(tmp_path):
    both = [{"prompt": str(i), "completion": "one"} for i in range(10)]
    parts = [sums(tmp_path, 20), examples(tmp_path, both * 2, "b"), examples(tmp_path, both[:4], "c")]
    found = stream.index(parts, 12, seed=0)
    held, training = (
        [part[int(i)] for part, index in zip(parts, found, strict=True) for i in getattr(index, name)]
        for name in ("heldout", "training")
    )
    questions = {example.question for example in held}
    assert len(questions) == len(held) == 12 and 0 < sum("+" in question for question in questions) < 12
    everything = [example for part in parts for example in part]
    assert [e.name for e in training] == [e.name for e in everything if e.question not in questions]
    assert len({index.digest for index in found}) == 3


def test_parts_are_the_whole(tmp_path):
    some = sums(tmp_path)
    parts = [stream.iterate(streamed(some), 4, seed=0, part=part) for part in (slice(0, 1), slice(1, 4))]
    whole = stream.iterate(streamed(some), 4, seed=0)
    for _ in range(15):
        expected, (one, other) = next(whole), map(next, parts)
        for name, x in expected.items():
            np.testing.assert_array_equal(np.concatenate([one[name], other[name]]), x)
    assert parts[0].get_state() == parts[1].get_state() == whole.get_state()


def test_chats_that_are_too_long_are_counted_and_texts_are_cut(tmp_path):
    some = streamed(sums(tmp_path), length=32)
    long = sum(not some[i] for i in range(len(some)))
    some.long = 0
    contents(stream.iterate(some, 1, seed=0), len(some) - long)
    assert 0 < long <= some.long < len(some)  # of a pass, and of what was read ahead of the next
    cut = streamed(some.examples, length=32, truncate=True)
    assert all(len(cut[i]) == 1 and cut[i][0].inputs <= 32 for i in range(len(cut)))
    texts = streamed(examples(tmp_path, [{"text": "one and two " * 30}, {"text": "the sum"}]), length=40)
    batches = stream.iterate(texts, 1, seed=0)
    pieces = len(packing.tokens(FORMAT, texts.examples[0]).ids) // 40 + 2
    batch = [next(batches) for _ in range(pieces)]
    learned = sum(b["weights"].sum() for b in batch)
    assert learned == sum(packing.tokens(FORMAT, example).inputs for example in texts.examples)


def test_nothing_held_out_is_trained_on(tmp_path):
    ask, say = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    chats = [{"messages": [{**ask, "content": str(i % 20)}, say]} for i in range(60)]
    chats += [{"messages": [{**ask, "content": str(i)}, say, ask, say]} for i in range(20)]
    some = examples(tmp_path, chats)
    (found,) = stream.index([some], 5, seed=0)
    held, training = ([some[int(i)] for i in places] for places in (found.heldout, found.training))
    assert len(held) == 5 == len({example.question for example in held})
    exercises = {question for example in held for question in example.questions}
    assert not any(example.questions & exercises for example in training)
    rest = [e for e in map(some.__getitem__, range(len(some))) if not e.questions & exercises]
    assert [e.name for e in rest] == [e.name for e in training] and 0 < len(rest) < 75
    (elsewhere,) = stream.index([some], 0, 0, held)
    assert elsewhere.heldout.size == 0 and elsewhere.training.tolist() == found.training.tolist()
    assert len(stream.index([some], 0, 0)[0].training) == len(some)
    assert found.heldout.tolist() != stream.index([some], 5, seed=1)[0].heldout.tolist()
    again, other = (stream.index([x], 5, seed=0)[0].digest for x in (some, examples(tmp_path, chats[:-1], "y")))
    assert found.digest == again != other
    with pytest.raises(ValueError, match="40 different questions are too few to hold out 40"):
        stream.index([examples(tmp_path, chats)], 40, seed=0)


def test_a_broken_record_is_found_before_training(tmp_path):
    some = examples(tmp_path, [{"prompt": "a", "completion": "b"}] * 5 + [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"x.jsonl:6: no text 'completion'"):
        stream.index([some], 1, seed=0)


@pytest.mark.slow
def test_a_streamed_run_that_stopped_goes_on_with_the_next_example(tmp_path, quick):
    model = tiny.write(tmp_path / "model")

    def run(folder, *stops, seed=0):
        config = settings.sft()
        config.model, config.seed = str(model), seed
        config.data.source, config.data.heldout = str(sums(tmp_path).records.path), 4
        config.data.stream, config.data.pack, config.data.length = True, True, 64
        config.batch_size, config.lora.rank, config.eval.answers = 2, 4, 0
        config.optim.schedule, config.checkpoint.every = "constant", 2
        for config.steps in stops:
            sft.train(config, folder, "streamed")
        return [line["loss"] for line in loop.read(folder / "metrics.jsonl") if "loss" in line]

    through = run(tmp_path / "through", 8)
    assert run(tmp_path / "stopped", 4, 8) == through
    assert run(tmp_path / "other", 8, seed=1) != through
