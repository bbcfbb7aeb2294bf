"""Files of records: every kind against the library that wrote it, and what broken ones are told."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from lora_jax.data import files

VALUES = [
    {"prompt": "a, b", "completion": 'say "x"'},
    {"prompt": "über\nzwei Zeilen", "completion": "🙂"},
    {"prompt": "", "completion": "\\n"},
]


def as_jsonl(path):
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in VALUES), encoding="utf-8")


def as_json(path):
    path.write_text(json.dumps(VALUES, indent=1), encoding="utf-8")


def as_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, VALUES[0])
        writer.writeheader()
        writer.writerows(VALUES)


def as_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(VALUES), path, row_group_size=2)


WRITERS = {".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_was_written_is_read_in_any_order(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    WRITERS[suffix](path)
    records = files.read(path)
    assert [record.values for record in records] == VALUES
    assert [records[i].values for i in (2, 0, -2)] == [VALUES[i] for i in (2, 0, 1)]
    assert len({record.name for record in records}) == 3
    assert records[0].values != records[1].values
    with pytest.raises(IndexError):
        records[3]


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("a.jsonl", "b/c.csv", "d.parquet"):
        WRITERS[name[name.index(".") :]](tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("{")
    records = files.read(tmp_path)
    assert [record.values for record in records] == VALUES * 3
    assert [records[i].name for i in (0, 3, 8)] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b/c.csv:2",
        f"{tmp_path}/d.parquet[2]",
    ]
    with pytest.raises(FileNotFoundError, match=r"no file in this folder ends in .jsonl, .json"):
        (tmp_path / "empty").mkdir()
        files.read(tmp_path / "empty")


def test_names_are_lines_even_behind_empty_ones_and_quoted_ones(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('a,b\n\n1,"two\nlines"\n\n3,4\n')
    assert [tuple(record) for record in files.read(path)] == [
        (f"{path}:3", {"a": "1", "b": "two\nlines"}),
        (f"{path}:6", {"a": "3", "b": "4"}),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
@pytest.mark.parametrize("damage", ["bom", "crlf", "both"])
def test_marks_and_line_ends_of_other_systems_are_no_data(tmp_path, suffix, damage):
    plain, odd = tmp_path / f"plain{suffix}", tmp_path / f"odd{suffix}"
    if suffix == ".txt":
        plain.write_text("one\ntwo\n\nthree\n")
    else:
        WRITERS[suffix](plain)
    data = plain.read_bytes()
    if suffix == ".csv":  # the csv module ends its own lines with CRLF
        data = data.replace(b"\r\n", b"\n")
        plain.write_bytes(data)
    if damage != "bom":
        data = data.replace(b"\n", b"\r\n")
    odd.write_bytes((files.BOM if damage != "crlf" else b"") + data)
    assert odd.read_bytes() != plain.read_bytes()
    expected = [record.values for record in files.read(plain)]
    if suffix == ".csv" and damage != "bom":  # but within quotes a line end is what it is
        expected[1] = {**expected[1], "prompt": expected[1]["prompt"].replace("\n", "\r\n")}
    assert [record.values for record in files.read(odd)] == expected


def test_text_is_its_paragraphs(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("\n\nA:\nspeak.\n\n \nB:\n  all\n")
    assert [tuple(record) for record in files.read(path)] == [
        (f"{path}:3", {"text": "A:\nspeak."}),
        (f"{path}:7", {"text": "B:\n  all"}),
    ]


def test_lines_in_a_file_called_json(tmp_path):
    as_jsonl(tmp_path / "x.json")
    assert [record.values for record in files.read(tmp_path / "x.json")] == VALUES


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_ten_megabytes_in_a_line(tmp_path, suffix):
    path, long = tmp_path / f"x{suffix}", "x" * 10_000_000
    if suffix == ".csv":
        path.write_text(f"text,id\n{long},1\nshort,2\n")
    else:
        path.write_text(f'{{"text": "{long}"}}\n{{"text": "short"}}\n')
    records = files.read(path)
    assert records[0].values["text"] == long and records[1].values["text"] == "short"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.csv", b"", "x.csv: no examples"),
        ("x.csv", b"a,b\n1\n", r"x.csv:2: 1 values for 2 columns \(a, b\)"),
        ("x.csv", b'a,b\n1,"2\n', "x.csv:2: not CSV"),
        ("x.csv", b"a,b\n1,\xe9\n", "x.csv:2: not UTF-8: byte 3"),
        ("x.json", b"", "x.json:1: not JSON"),
        ("x.json", b'[{"a": 1},\n{"a": }]', "x.json:2: not JSON: .* at column 7"),
        ("x.json", b'{"a":\n1}', "x.json: not a list of objects but a dict"),
        ("x.json", b"[1]", r"x.json\[0\]: not an object .* but a int"),
        ("x.json", b'["\xe9"]', "x.json: not UTF-8: byte 3"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "x.jsonl: UTF-16, not UTF-8"),
        ("x.jsonl", b"[" * 200_000, "x.jsonl:1: not "),
        ("x.txt", b"one\n\ntw\xf6", "x.txt:3: not UTF-8"),
        ("x.parquet", b"PAR1", "x.parquet: not Parquet"),
        ("x.doc", b"a", "x.doc: not a known kind of file; a source ends in .jsonl"),
    ],
)
def test_broken_files_are_named(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        list(files.read(path))
    assert "\n" not in str(caught.value)


def test_one_encoding_in_a_line_and_another_in_the_next(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": "é"}\n'.encode() + '{"a": "é"}\n'.encode("latin-1"))
    records = files.read(path)
    assert records[0].values == {"a": "é"}
    with pytest.raises(ValueError, match=r"x.jsonl:2: not UTF-8: byte 8 of the line"):
        records[1]


def test_only_places_are_held_in_memory(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(('{"text": "' + "x" * 10_000 + '"}\n') * 500)
    records = files.read(path)
    assert records.pieces.nbytes < 20_000 < path.stat().st_size / 100
    assert len(records[499].values["text"]) == 10_000
