"""Preference pairs and judged answers as batches: what is learned of them, what is left out, and GSM8K's solutions."""

import numpy as np
import pytest
import template_test
import tiny

from lora_jax.data import kinds, sources
from train import dpo_settings, pairs

FORMAT = template_test.tiny_format(tiny.CHATML)
LINES = [
    {"prompt": f"{a} + {b}", "chosen": f"it is {a + b}", "rejected": str(a - b)} for a in range(5) for b in range(4)
]


def configured(tmp_path, lines=LINES, **changes):
    config = dpo_settings.dpo()
    config.data.source, config.data.heldout = str(tiny.write_jsonl(tmp_path / "pairs.jsonl", lines)), 4
    config.data.update(changes)
    config.batch_size = 4
    return config


def learned(rows):
    """What is learned of every row, as text."""
    return [
        FORMAT.tokenizer.decode(t[w > 0].tolist(), skip_special_tokens=False)
        for t, w in zip(rows["targets"], rows["weights"], strict=True)
    ]


def test_pairs_as_rows(tmp_path, capsys):
    data = pairs.prepare(configured(tmp_path), FORMAT, 128, unpaired=False)
    assert "20 preference pairs" in capsys.readouterr().out
    assert len(data.items) == 16 and len(data.heldout) == 4
    batch = next(pairs.batches(data, 4, 0))
    assert batch["tokens"].shape == (8, data.length) and batch["good"].tolist() == [1, 0] * 4
    answers = learned(batch)
    for better, worse, tokens in zip(answers[::2], answers[1::2], batch["tokens"].reshape(4, 2, -1), strict=True):
        assert better.startswith("it is ") and not worse.startswith("it is ")
        assert better.endswith("<|im_end|>") and worse.endswith("<|im_end|>")
        asked = [
            FORMAT.tokenizer.decode(row.tolist(), skip_special_tokens=False).partition("assistant")[0] for row in tokens
        ]
        assert asked[0] == asked[1] and "user" in asked[0]
    assert data.learned == max(
        batch["weights"].sum(1).max() for batch in [pairs.batch(data.items + data.heldout, data.length)]
    )
    asked = {item.name for item in data.items}, {item.name for item in data.heldout}
    assert not asked[0] & asked[1]


def test_earlier_turns_of_the_assistant_are_not_learned(tmp_path):
    prompt = [{"role": r, "content": c} for r, c in (("user", "one"), ("assistant", "is two"), ("user", "three"))]
    pair = kinds.Pair("x", prompt, [{"role": "assistant", "content": "sum"}], [{"role": "assistant", "content": "and"}])
    judged = kinds.Feedback("y", [*prompt, {"role": "assistant", "content": "sum"}], False)
    batch = pairs.batch([pairs.item(FORMAT, pair)], 60)
    assert learned(batch) == ["sum<|im_end|>", "and<|im_end|>"]
    alone = pairs.batch([pairs.item(FORMAT, judged)], 60)
    assert learned(alone) == ["sum<|im_end|>"] and alone["good"].tolist() == [0]
    np.testing.assert_array_equal(alone["tokens"], batch["tokens"][:1])


def test_judged_answers_and_their_crossings(tmp_path):
    lines = [{"prompt": f"{a}", "completion": f"is {a}", "label": a % 3 == 0} for a in range(12)]
    for rows, source in ((1, lines), (2, LINES)):
        data = pairs.prepare(configured(tmp_path, source), FORMAT, 128, unpaired=True)
        batch = next(pairs.batches(data, 4, 0, pairs.crossed))
        assert batch["tokens"].shape == batch["crossed"]["tokens"].shape == (4 * rows, data.length)
        if rows == 1:
            good = [int(text.split()[1].partition("<")[0]) % 3 == 0 for text in learned(batch)]
            assert batch["good"].astype(bool).tolist() == good
        # Every prompt stands before the answer of the next item.
        assert learned(batch["crossed"]) == learned(batch)[rows:] + learned(batch)[:rows]
        before = np.where(batch["weights"] > 0, 0, batch["tokens"])
        width = int((batch["weights"] > 0).argmax(1).min())
        np.testing.assert_array_equal(batch["crossed"]["tokens"][:, :width], before[:, :width])
    # A long answer behind a long prompt is cut where the row ends.
    chats = ("sum", "of two and one " * 3), ("what is two " * 3, "one")
    items = [pairs.item(FORMAT, kinds.Feedback("x", _chat(*words), True)) for words in chats]
    cut = pairs.crossed(items, max(row.inputs for item in items for row in item.rows))
    first, second = learned(cut)
    assert learned(cut["crossed"])[0] == second
    assert first.startswith(learned(cut["crossed"])[1]) and first != learned(cut["crossed"])[1]


def _chat(asked, said):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def test_reference_goes_with_its_pair(tmp_path):
    data = pairs.prepare(configured(tmp_path), FORMAT, 128, unpaired=False)
    items = [item._replace(reference=(float(i), -float(i))) for i, item in enumerate(data.items)]
    plain = next(pairs.batches(data, 4, 0))
    batch = next(pairs.batches(data._replace(items=items), 4, 0))
    assert "reference" not in plain
    np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
    where = [int(i) for i in batch["reference"][::2]]
    np.testing.assert_array_equal(batch["tokens"], pairs.batch([data.items[i] for i in where], data.length)["tokens"])
    np.testing.assert_array_equal(batch["reference"][1::2], -batch["reference"][::2])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "1", "chosen": "2"}, ("no text 'rejected'", "'prompt', 'chosen'")),
        ({"prompt": "1", "completion": "2"}, ("not preference pairs", "'prompt', 'completion'")),
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, ("'chosen' and 'rejected' are the same",)),
        ({"chosen": "2", "rejected": "1"}, ("no prompt",)),
    ],
)
def test_broken_pairs(tmp_path, line, words):
    with pytest.raises(ValueError, match=r"pairs.jsonl:21: ") as caught:
        pairs.prepare(configured(tmp_path, [*LINES, line]), FORMAT, 128, unpaired=False)
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_is_left_out_is_counted(tmp_path, capsys):
    long = {"prompt": "x" * 300, "chosen": "1", "rejected": "2"}
    alike = {"prompt": "what", "chosen": [{"role": "assistant", "content": "a", "x": 1}], "rejected": "a"}
    data = pairs.prepare(configured(tmp_path, [*LINES, long, alike], length=60), FORMAT, 128, unpaired=False)
    said = capsys.readouterr().out
    assert "1 are longer than 60 tokens with their prompts" in said and "1 have a chosen and a rejected answer" in said
    assert len(data.items) == 16
    with pytest.raises(ValueError, match="every answer with its prompt is longer than 9 tokens"):
        pairs.prepare(configured(tmp_path, length=9), FORMAT, 128, unpaired=False)
    with pytest.raises(ValueError, match="more than the 128 positions"):
        pairs.prepare(configured(tmp_path, length=129), FORMAT, 128, unpaired=False)


def test_judged_answers_are_of_both_kinds(tmp_path):
    lines = [{"prompt": f"{a}", "completion": "is", "label": True} for a in range(9)]
    with pytest.raises(ValueError, match="the answers to train on are all judged good"):
        pairs.prepare(configured(tmp_path, lines), FORMAT, 128, unpaired=True)


def test_models_solutions_are_pairs(tmp_path):
    def said(text, right):
        return {"solution": text, "is_correct": right}

    line = {"question": "1 + 1?", "ground_truth": "A: 2", "small": said("A: 3", False), "large": said("is\nA: 2", True)}
    hard = line | {"question": "2 + 2?", "ground_truth": "A: 4", "large": said("A: 5", False)}
    easy = line | {"small": said("two\nA: 2", True)}
    path = tiny.write_jsonl(tmp_path / "solutions.jsonl", [line, hard, easy])
    found = sources.load(f"gsm8k_solutions:{path}", kind=kinds.Pair)
    assert [(p.prompt[0]["content"], p.chosen[0]["content"], p.rejected[0]["content"]) for p in found] == [
        ("1 + 1?", "is\nA: 2", "A: 3"),
        ("2 + 2?", "A: 4", "A: 3"),
        ("2 + 2?", "A: 4", "A: 5"),
    ]
    tiny.write_jsonl(path, [line, {"question": "1?", "answer": "2"}])
    with pytest.raises(
        ValueError, match=r"solutions.jsonl:2: no 'question', 'ground_truth'.*it has 'question', 'answer'"
    ):
        sources.load(f"gsm8k_solutions:{path}", kind=kinds.Pair)
    with pytest.raises(ValueError, match="takes no parameters"):
        sources.records(f"gsm8k_solutions:{path}?n=1")
    with pytest.raises(FileNotFoundError, match="no such file"):
        sources.records("gsm8k_solutions:nowhere.jsonl")
