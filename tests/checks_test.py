"""The mistakes that nothing else would tell of, each beside what is not one."""

import numpy as np
import pytest
import template_test
import tiny

from lora_jax.data import checks, packing
from lora_jax.data.kinds import Example

USER, SAID = {"role": "user", "content": "what is one"}, {"role": "assistant", "content": "the sum"}
GOOD = template_test.tiny_format(tiny.CHATML)


def example(*messages, name="x:1"):
    return Example(name, list(messages))


def tokens(*examples, format=GOOD):
    return packing.tokenize(format, examples)


def test_what_is_right_is_let_through():
    some = [example(USER, SAID), example(USER, SAID, USER, SAID)]
    checks.refuse(GOOD, tokens(*some))
    assert checks.remarks(GOOD, some, tokens(*some), 64) == []
    text = Example("x:1", [], text="<s>the sum")
    checks.refuse(GOOD, tokens(text), texts=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<s><s>" + tiny.CHATML, r"x:1: begins with two beginning tokens \('<s>'\)"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
            "x:1, as every other example, is learned from its first token to its last",
        ),
        (
            tiny.CHATML.replace("<|im_end|>", "<|endoftext|>"),
            r"x:1, as every other example, never shows where to stop: .*'<\|im_end\|>'",
        ),
    ],
)
def test_templates_that_teach_what_is_not_meant(template, message):
    format = template_test.tiny_format(template)
    with pytest.raises(ValueError, match=message) as caught:
        checks.refuse(format, tokens(example(USER, SAID), format=format))
    assert "\n" not in str(caught.value)


def test_a_beginning_token_in_the_messages_is_a_second_one():
    format = template_test.tiny_format("{{ bos_token }}{{ messages[0].content }}<|im_end|>")
    once, twice = (packing.Tokens("x:1", format.tokenizer.encode(t).ids, np.array([])) for t in ("<s>a", "<s><s>a"))
    with pytest.raises(ValueError, match="two beginning tokens"):
        checks.refuse(format, [twice], texts=True)
    checks.refuse(format, [once], texts=True)


def test_empty_answers():
    empty, said = example(USER, {**SAID, "content": ""}), example(USER, SAID, name="x:2")
    with pytest.raises(ValueError, match="x:1, as every other example, has an empty answer"):
        checks.refuse(GOOD, tokens(empty))
    checks.refuse(GOOD, tokens(empty, said))
    (line,) = checks.remarks(GOOD, [empty, said], tokens(empty, said), 64)
    assert line == "1 examples learn from an answer with nothing in it, such as x:1"


def test_an_end_of_turn_in_a_message_is_told():
    bad = example({**USER, "content": "a<|im_end|>b"}, SAID)
    (line,) = checks.remarks(GOOD, [bad], tokens(bad), 64)
    assert line.startswith("1 examples say an end of turn within a message")


def test_answers_that_are_cut_are_told():
    some = [example(USER, SAID)]
    (line,) = checks.remarks(GOOD, some, tokens(*some), 10)
    assert line == "1 examples are cut at 10 tokens, before the end of their answer, such as x:1"


def test_a_question_that_is_asked_otherwise_than_trained_on_is_told():
    """Some templates write the system message with the last question alone, and so never when it is answered."""
    format = template_test.tiny_format(template_test.written("bare"))
    chat, plain = example({"role": "system", "content": "be short"}, USER, SAID), example(USER, SAID, name="x:2")
    (line,) = checks.remarks(format, [chat, plain], tokens(chat, plain, format=format), 64)
    assert line.startswith("1 examples are trained on with another beginning than they will be asked with")
    assert line.endswith("such as x:1")
