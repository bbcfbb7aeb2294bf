"""The benchmark on E2E NLG: its tables and their references, and the whole of it on a tiny model."""

import csv
import json

import pytest
import tiny
from sft_test import configured

from lora_jax.data import sources

pytest.importorskip("sacrebleu")
from benchmarks import e2e

ROWS = [
    ("name[A]", "A is a place to eat in the city."),
    ("name[B], food[fish]", "B serves fish to everyone near the river."),
    ("name[A]", "There is a place in the city called A."),
    ("name[A]", "A place in the city, A serves food."),
]
NAMES = {"prompt": "mr", "completion": "ref"}


@pytest.fixture
def test_set(tmp_path):
    with (tmp_path / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("mr", "ref"), *ROWS])
    return tmp_path / "test.csv"


def test_every_table_is_asked_once_and_has_all_its_references(test_set):
    asked, references = e2e.tables(sources.load(str(test_set), NAMES))
    assert [example.messages[-2]["content"] for example in asked] == ["name[A]", "name[B], food[fish]"]
    assert references == [[ROWS[0][1], ROWS[2][1], ROWS[3][1]], [ROWS[1][1]]]


def test_bleu_takes_the_references_of_its_own_table():
    references = [[ROWS[0][1], ROWS[2][1], ROWS[3][1]], [ROWS[1][1]]]
    assert e2e.bleu([ROWS[2][1], ROWS[1][1] + " "], references) == pytest.approx(100)
    assert e2e.bleu([ROWS[1][1], ROWS[2][1]], references) < 20  # the right sentences, for the wrong tables
    one = e2e.bleu([ROWS[2][1], ROWS[1][1]], [refs[:1] for refs in references])
    assert 20 < one < 90  # fewer references know less


@pytest.mark.slow
@pytest.mark.usefixtures("quick_module")
def test_it_trains_asks_and_goes_on(model, test_set, tmp_path, capsys):
    train = [{"mr": f"name[{x}]", "ref": f"{x} is a place"} for x in "CDEFGHIJKL"]
    config = configured(model, tmp_path, steps=2, eval__answers=0, data__heldout=3, data__length=64, optim__lr=0.0)
    with config.unlocked():
        config.data.source = str(tiny.write_jsonl(tmp_path / "train.jsonl", train))
        config.data.update(NAMES)
        config.data.heldout_source = str(test_set)
    result = tmp_path / "result.json"
    e2e.compare(config, tmp_path / "runs", [1.0], result)
    rows = json.loads(result.read_text())["rows"]
    assert [row["method"] for row in rows] == ["base", "lora", "full"]
    assert rows[1]["tokens"] == rows[2]["tokens"] > 0 and rows[1]["rate"] > rows[2]["rate"]
    assert rows[1]["loss_before"] == pytest.approx(rows[2]["loss_before"], rel=1e-4)
    before = result.read_bytes()
    capsys.readouterr()
    e2e.compare(config, tmp_path / "runs", [1.0], result)
    assert result.read_bytes() == before and "step" not in capsys.readouterr().out
