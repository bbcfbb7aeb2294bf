"""Sources: what is read, what is held out, and what bad files are told."""

import json

import pytest
import tiny

from lora_jax.data import kinds, sources

SUMS = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=400"


def test_jsonl_of_chats_and_of_prompts(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"messages": chat}, {"prompt": "c", "completion": "d"}])
    first, second = sources.load(str(path))
    assert (first.messages, first.answer) == (chat, "b")
    assert [m["content"] for m in second.messages] == ["c", "d"]
    assert second.name == f"{path}:2"


def test_fields_are_mapped(tmp_path):
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    (example,) = sources.load(str(path), {"prompt": "question", "completion": "answer"})
    assert [m["content"] for m in example.messages] == ["q", "a"]
    with pytest.raises(ValueError, match="no text 'prompt'"):
        sources.load(str(path))


def test_blank_lines_keep_the_count(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"prompt": "a", "completion": "b"}\n\n{"prompt": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:4: no text 'prompt'"):
        sources.load(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", ', "not JSON: .* at column 16"),
        (b"[1, 2]", "not an object with 'messages' or 'prompt' but a list"),
        (b'{"prompt": "a"}', "no text 'completion'"),
        (b'{"text": "a"}', "it has 'text'"),
        (b'{"messages": []}', "at least one message"),
        (b'{"messages": [{"role": "user"}]}', "message 1 has no text 'content'"),
        (b'{"messages": ["hi"]}', "message 1 has no text 'role'"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 13"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    good = b'{"prompt": "a", "completion": "b"}'
    path.write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{message}") as caught:
        sources.load(str(path))
    assert "\n" not in str(caught.value)
    path.write_bytes(good + b"\n" + good + b"\n")
    assert len(sources.load(str(path))) == 2


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        sources.load(str(tmp_path / "no.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no examples"):
        sources.load(str(tmp_path / "empty.jsonl"))


def test_reasoning_gym_is_deterministic_and_right():
    examples = sources.load(SUMS)
    assert examples == sources.load(SUMS)
    assert examples != sources.load(SUMS + "&seed=7")
    for example in examples:
        sum_ = example.messages[0]["content"].removesuffix("=").rpartition(":")[2]
        assert eval(sum_) == int(example.answer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning_gym:chain_sums", "no task 'chain_sums'; did you mean 'chain_sum'"),
        ("reasoning_gym:chain_sum?min_term=2", "no parameter 'min_term'; did you mean 'min_terms'"),
        ("reasoning_gym:chain_sum?min_terms=0", "does not accept these parameters"),
        ("reasoning_gym:chain_sum?min_terms=two", "does not accept these parameters"),
    ],
)
def test_bad_task_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        sources.load(source)


def test_no_heldout_question_is_trained_on():
    examples = sources.load(SUMS)
    questions = {example.question for example in examples}
    assert len(questions) < len(examples)  # else the test shows nothing
    train, heldout = sources.split(examples, 64, seed=0)
    assert len(heldout) == 64 == len({example.question for example in heldout})
    assert not {e.question for e in train} & {e.question for e in heldout}
    assert {e.question for e in train} | {e.question for e in heldout} == questions
    assert sources.split(examples, 64, seed=0) == (train, heldout)
    assert sources.split(examples, 64, seed=1)[1] != heldout
    # Partner: cutting the list in two, as seeds alone would, leaves questions on both sides.
    assert {e.question for e in examples[:64]} & {e.question for e in examples[64:]}


def test_too_few_questions_to_hold_out(tmp_path):
    lines = [{"prompt": "a", "completion": str(i)} for i in range(9)]
    examples = sources.load(str(tiny.write_jsonl(tmp_path / "x.jsonl", lines)))
    with pytest.raises(ValueError, match="1 different questions are too few to hold out 4"):
        sources.split(examples, 4, seed=0)


def test_question_is_everything_before_the_answer():
    ask = {"role": "user", "content": "a"}
    one, two = (sources.Example("x", [ask, {"role": "assistant", "content": said}]) for said in ("b", "c"))
    assert one.question == two.question
    assert json.loads(one.question) == [["user", "a"]]
    assert one.question != sources.Example("x", [{"role": "system", "content": "a"}, ask]).question


def test_no_turn_of_a_heldout_chat_is_trained_on():
    """A chat that goes on from another one holds its exercise."""
    ask, said, again = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c")))
    short, long = sources.Example("short", [ask, said]), sources.Example("long", [ask, said, again, said])
    other = sources.Example("other", [again, said])
    assert sources.without([short, other], [long]) == [other]
    assert sources.without([long, other], [short]) == [other]
    assert short.question != long.question  # by the last question alone, both would be trained on


def test_pairs_and_tasks_are_split_by_their_prompt():
    pairs = [kinds.Pair(str(i), [{"role": "user", "content": str(i // 2)}], [], []) for i in range(8)]
    train, heldout = sources.split(pairs, 2, seed=0)
    assert len(train) == 4 and len(heldout) == 2
    assert not {pair.question for pair in train} & {pair.question for pair in heldout}


def test_repeated_ids(tmp_path):
    one, two = ({"id": i, "prompt": p, "completion": "b"} for i, p in ((7, "a"), (8, "c")))
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [one, two, one, {**two, "id": None}])
    said = []
    assert [e.name for e in sources.load(str(path), log=said.append)] == [f"{path}:{n}" for n in (1, 2, 4)]
    assert said == [f"1 records are left out for they repeat another's id, such as {path}:3"]
    tiny.write_jsonl(path, [one, two, {**one, "completion": "other"}])
    with pytest.raises(ValueError, match=r"x.jsonl:3: its id 7 is also that of .*x.jsonl:1, which is another"):
        sources.load(str(path))
    assert len(sources.load(str(path), {"id": ""}, log=pytest.fail)) == 3


def test_texts_do_not_mix_with_chats(tmp_path):
    path = tiny.write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match=r"x.jsonl:3: texts and chats do not mix .*it has 'prompt', 'completion'"):
        sources.load(str(path))


def test_a_task_keeps_what_its_own_check_needs():
    import reasoning_gym

    task = sources.load(SUMS.replace("size=400", "size=2"), kind=kinds.Task)[1]
    check = reasoning_gym.get_score_answer_fn("chain_sum")
    assert check(task.answer, task.values["entry"]) == 1.0
    assert check("none", task.values["entry"]) < 0.1
