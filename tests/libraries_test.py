"""Data sets that other libraries hold: GSM8K's real builder in tensorflow-datasets, and Hugging Face's library."""

import csv
import os
import sys
import types
from pathlib import Path

import pytest
import tiny

from lora_jax.data import sources
from lora_jax.data.kinds import Task

DATA = Path(os.environ.get("LORA_JAX_DATA", "../shared/data"))


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    """The builder as it is, with the files that it would download."""
    if not (DATA / "gsm8k" / "train.jsonl").is_file():
        pytest.skip(f"{DATA}/gsm8k is not there; LORA_JAX_DATA says where")
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tfds.download.DownloadManager,
            "download_and_extract",
            lambda self, urls: {split: DATA / "gsm8k" / f"{split.partition('_')[0]}.jsonl" for split in urls},
        )
        builder = tfds.builder("gsm8k", data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
    return folder


def test_gsm8k_through_tensorflow_datasets_without_tensorflow(gsm8k):
    assert "tensorflow" not in sys.modules
    columns = {"prompt": "question", "completion": "answer"}
    examples = sources.load(f"tfds:gsm8k?split=test&data_dir={gsm8k}", columns)
    lines = sources.load(str(DATA / "gsm8k" / "test.jsonl"), columns)
    assert len(examples) == 660 and examples[3].name == "tfds:gsm8k[3]"
    assert {e.question for e in examples} == {e.question for e in lines}
    assert {e.answer for e in examples} == {e.answer for e in lines}
    few = sources.load(f"tfds:gsm8k?split=train[:50]&data_dir={gsm8k}", {"prompt": "question"}, Task)
    assert len(few) == 50 and not {e.question for e in few} & {e.question for e in lines}
    assert few[0].values["short_answer"] in few[0].answer


def test_a_real_table_is_what_the_csv_module_reads():
    """E2E NLG: quotes, commas and pound signs."""
    path = DATA / "e2e_nlg" / "devset.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there; LORA_JAX_DATA says where")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    examples = sources.load(str(path), {"prompt": "mr", "completion": "ref"})
    assert [e.messages[0]["content"] for e in examples] == [row["mr"] for row in rows]
    assert [e.answer for e in examples] == [row["ref"] for row in rows]
    assert len(examples) == 4672 and any("£" in e.answer for e in examples)


def test_a_data_set_that_is_not_there(gsm8k):
    with pytest.raises(ValueError, match="no data set 'gsm8'; did you mean 'gsm8k'"):
        sources.load("tfds:gsm8")
    with pytest.raises(ValueError, match="tensorflow-datasets cannot read it: "):
        sources.load(f"tfds:gsm8k?split=nowhere&data_dir={gsm8k}")


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:gsm8k: needs the package datasets .* pip install datasets"):
        sources.load("hf:gsm8k")


def test_arguments_reach_hugging_faces_library(monkeypatch):
    """Its own is asked in the test below, where it is installed."""

    def load_dataset(path, **arguments):
        assert (path, arguments) == ("some/set", {"split": "test", "name": "main"})
        return [{"prompt": "a", "completion": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (example,) = sources.load("hf:some/set?split=test&name=main")
    assert example.answer == "b" and example.name == "hf:some/set[0]"


def test_rows_that_cannot_be_read(monkeypatch):
    held = {"rows": [{"text": b"\xff"}]}
    library = types.SimpleNamespace(load_dataset=lambda path, **arguments: held["rows"])
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(ValueError, match=r"hf:x\[0\]: holds bytes that are no UTF-8 text"):
        sources.load("hf:x")
    for held["rows"] in (iter([{"text": "a"}]), {"train": [{"text": "a"}]}):
        with pytest.raises(ValueError, match="hf:x: has no numbered rows; name one split, and leave streaming out"):
            sources.load("hf:x")
    held["rows"] = [{"text": b"a"}]
    assert sources.load("hf:x")[0].text == "a"


def test_hugging_faces_library(tmp_path):
    pytest.importorskip("datasets")
    values = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(i)}]} for i in range(3)
    ]
    path = tiny.write_jsonl(tmp_path / "x.jsonl", values)
    examples = sources.load(f"hf:json?data_files={path}&cache_dir={tmp_path}")
    assert [{"messages": example.messages} for example in examples] == values
