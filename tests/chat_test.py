"""Chat rendering against transformers, and the supervised mask against its generation markers."""

import datetime
import functools
import types

import numpy as np
import pytest
import tiny
import tokenizers

from lora_jax.data import chat
from lora_jax.interop import gguf, hf

NOW = datetime.datetime(2024, 7, 26)
LLAMA3 = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{{- system + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}{%- endif %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}BEGIN{{- message['content']|trim + '<|eot_id|>' }}END{%- else %}"
    "{{- message['content']|trim + '<|eot_id|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}BEGIN{{ message['content'] + '<|im_end|>' }}END{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML}
CHATS = {
    "one": [("user", "what is 1 + 2?"), ("assistant", "3")],
    "two": [
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "und nun, mein Schatz? 🙂"),
        ("assistant", "näh 🙃\n"),
    ],
    "system": [("system", "be short"), ("user", "the sum"), ("assistant", " three")],
    "asked": [("user", "one"), ("assistant", "two"), ("user", "three")],
}


def messages(name):
    return [{"role": role, "content": content} for role, content in CHATS[name]]


def markers(template):
    return template.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")


def bare(template):
    return template.replace("BEGIN", "").replace("END", "")


def tiny_format(template, name="chatml"):
    tok = tiny.tokenizer()
    if name == "llama3":
        tok.add_special_tokens(["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        bos, eos = tok.token_to_id("<|begin|>"), tok.token_to_id("<|eot_id|>")
        # This tokenizer begins every text by itself, and the template begins it too.
        tok.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", bos)]
        )
    else:
        bos, eos = None, tok.token_to_id("<|im_end|>")
    special = types.SimpleNamespace(bos=bos, eos=eos, stop=(eos,))
    return chat.Format(tok, template, special, NOW)


@functools.cache
def smollm2_format():
    try:
        file = gguf.File(hf.packaged())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tok = gguf.tokenizer(file)
    end = file.metadata["tokenizer.ggml.eos_token_id"]
    special = types.SimpleNamespace(bos=file.metadata["tokenizer.ggml.bos_token_id"], eos=end, stop=(end,))
    return chat.Format(tok, file.metadata["tokenizer.chat_template"], special, NOW)


def oracle(format, monkeypatch):
    """The same tokenizer in transformers, on the day NOW."""
    transformers = pytest.importorskip("transformers")
    fixed = type("datetime", (), {"now": staticmethod(lambda: NOW)})
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", fixed)
    name = {
        role: format.tokenizer.id_to_token(i)
        for role, i in (("bos_token", format.special.bos), ("eos_token", format.special.eos))
        if i is not None
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=format.tokenizer, chat_template=format.template, **name
    )


@pytest.mark.parametrize("asked", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_equal_transformers(name, asked, monkeypatch):
    ids, learn = chat.render(tiny_format(bare(TEMPLATES[name]), name), messages(asked))
    reference = oracle(tiny_format(markers(TEMPLATES[name]), name), monkeypatch).apply_chat_template(
        messages(asked), return_assistant_tokens_mask=True, return_dict=True
    )
    assert ids.tolist() == reference["input_ids"]
    assert learn.astype(int).tolist() == reference["assistant_masks"]
    assert 0 < learn.sum() < len(ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_markers_change_nothing(name):
    marked, plain = (tiny_format(f(TEMPLATES[name]), name) for f in (markers, bare))
    for a, b in zip(chat.render(marked, messages("two")), chat.render(plain, messages("two")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("asked", CHATS)
def test_smollm2_equals_transformers(asked, monkeypatch):
    format = smollm2_format()
    ids, learn = chat.render(format, messages(asked))
    reference = oracle(format, monkeypatch).apply_chat_template(messages(asked), return_dict=True)
    assert ids.tolist() == reference["input_ids"]
    said = [m["content"] for m in messages(asked) if m["role"] == "assistant"]
    assert format.tokenizer.decode(ids[learn].tolist(), skip_special_tokens=False) == "".join(
        text + "<|im_end|>" for text in said
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_equals_transformers(name, monkeypatch):
    format = tiny_format(bare(TEMPLATES[name]), name)
    reference = oracle(format, monkeypatch).apply_chat_template(
        messages("asked"), add_generation_prompt=True, return_dict=True
    )
    assert chat.prompt(format, messages("asked")).tolist() == reference["input_ids"]


def test_beginning_is_not_doubled():
    format = tiny_format(bare(LLAMA3), "llama3")
    assert chat.render(format, messages("one"))[0].tolist().count(format.special.bos) == 1
    # Partner: the tokenizer left to itself would add another.
    assert format.tokenizer.encode("<|begin|>x").ids.count(format.special.bos) == 2


def test_date_is_the_formats():
    texts = {
        day: format.tokenizer.decode(chat.render(format, messages("one"))[0].tolist())
        for day in (1, 2)
        for format in [tiny_format(bare(LLAMA3), "llama3")._replace(now=datetime.datetime(2024, 1, day))]
    }
    assert "01 Jan 2024" in texts[1] and "02 Jan 2024" in texts[2]


def test_template_that_rewrites_history_is_an_error():
    forgetful = (
        "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else '...') }}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ValueError, match="message 2"):
        chat.render(tiny_format(forgetful), messages("two"))
    stable = forgetful.replace("(m.content if loop.last else '...')", "m.content")
    assert chat.render(tiny_format(stable), messages("two"))[1].any()


def test_template_errors_are_one_line():
    with pytest.raises(ValueError, match="unknown role"):
        chat.render(tiny_format(bare(LLAMA3), "llama3"), [{"role": "tool", "content": "x"}])


def test_template_cannot_leave_the_sandbox():
    with pytest.raises(ValueError, match="unsafe"):
        chat.prompt(tiny_format("{{ messages.__class__.__mro__ }}"), messages("one"))


def test_without_template_prompt_and_completion_are_joined():
    format = tiny_format(None)
    ids, learn = chat.render(format, messages("one"))
    before = format.tokenizer.encode("what is 1 + 2?").ids
    assert ids.tolist() == [*before, *format.tokenizer.encode("3").ids, format.special.eos]
    assert learn.tolist() == [False] * len(before) + [True] * (len(ids) - len(before))
    assert chat.prompt(format, messages("one")[:1]).tolist() == before
    with pytest.raises(ValueError, match="no chat template"):
        chat.render(format, messages("two"))


def test_answer_ends_with_the_turn():
    format = tiny_format(bare(CHATML))
    ids = [*format.tokenizer.encode(" the sum").ids, format.special.eos, *format.tokenizer.encode("one").ids]
    assert chat.answer(format, ids) == "the sum"
    assert chat.answer(format, ids[:1]) != "the sum"


def test_half_a_character_is_an_error():
    format = tiny_format(bare(CHATML))
    with pytest.raises(ValueError, match=r"'.ud83d' in it is half a character"):
        chat.render(format, [{"role": "user", "content": "\ud83d"}, *messages("one")[1:]])
    assert chat.render(format, [{"role": "user", "content": "\U0001f642"}, *messages("one")[1:]])[1].any()
