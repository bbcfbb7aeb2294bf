"""From a config to batches: streamed and mixed sources, texts, and hosts that share a batch."""

import numpy as np
import pytest
import template_test
import tiny

from lora_jax.data import packing
from train import config as settings
from train import examples, hosts

FORMAT = template_test.tiny_format(tiny.CHATML)
LINES = [{"prompt": f"{a} + {b}", "completion": str(a + b)} for a in range(6) for b in range(6)]


def configured(tmp_path, lines=LINES, **changes):
    config = settings.sft()
    config.data.source = str(tiny.write_jsonl(tmp_path / "data.jsonl", lines))
    config.data.heldout, config.batch_size = 4, 4
    for name, value in changes.items():
        config.data[name] = value
    return config


def test_streamed_and_mixed_data(tmp_path, capsys):
    other = tiny.write_jsonl(tmp_path / "other.jsonl", [{"prompt": f"not {i}", "completion": "no"} for i in range(9)])
    data = {
        "plain": {},
        "streamed": {"stream": True, "length": 60},
        "mixed": {"mixture": ((str(other), 1.0),)},
        "mixed streams": {"mixture": ((str(other), 1.0),), "stream": True, "length": 60},
        "texts": {"length": 20},
    }
    prepared = {}
    for name, changes in data.items():
        lines = [{"text": f"one and two is {i} " * 9} for i in range(9)] if name == "texts" else LINES
        (tmp_path / name).mkdir()
        config = configured(tmp_path / name, lines, **changes)
        prepared[name] = examples.prepare(config, FORMAT, 128)
    said = capsys.readouterr().out
    assert "36 prompts and completions" in said and "32 prompts and completions to train on, read as" in said
    assert "9 texts" in said and "% of the places are padding" in said
    assert len({data.digest for data in prepared.values()}) == 5
    for mixed in ("mixed", "mixed streams"):
        names = {e.name.rpartition("/")[2].partition(":")[0] for e in prepared[mixed].tokens}
        assert names == {"data.jsonl", "other.jsonl"}
    assert len(prepared["texts"].tokens) > 9 and prepared["texts"].asked == []
    for data in prepared.values():
        batches = data.batches(4, 0)
        assert all(np.shape(next(batches)["tokens"]) == (4, data.length) for _ in range(3))
        assert packing.most_learned(data.rows) <= data.learned
    with pytest.raises(ValueError, match=r"config.data.stream needs config.data.length"):
        examples.prepare(configured(tmp_path, stream=True), FORMAT, 128)


@pytest.mark.parametrize("stream", [False, True])
def test_hosts_share_a_batch(tmp_path, monkeypatch, stream):
    def batches():
        config = configured(tmp_path, stream=stream, length=60)
        batches = examples.prepare(config, FORMAT, 128).batches(config.batch_size, config.seed)
        return [next(batches)["tokens"] for _ in range(5)]

    whole = batches()
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        monkeypatch.setattr(hosts, "part", lambda batch_size, part=part: part)
        halves.append(batches())
    for all_, first, second in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), all_)
        assert not set(map(bytes, first)) & set(map(bytes, second))


def test_another_source_is_held_out(tmp_path):
    other = tiny.write_jsonl(tmp_path / "held.jsonl", LINES[:3])
    for stream in (False, True):
        config = configured(tmp_path, stream=stream, length=60, heldout_source=str(other))
        data = examples.prepare(config, FORMAT, 128)
        assert len(data.heldout_rows) == 3 and len(data.tokens) == 33
        lines = {example.name.rpartition(":")[2] for example in data.tokens}
        assert not lines & {"1", "2", "3"}
        config.data.heldout_source = ""
        assert len(examples.prepare(config, FORMAT, 128).tokens) == 32
