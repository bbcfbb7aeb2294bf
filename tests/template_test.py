"""Chat templates of every build, against transformers' renderer; what the assistant says in them; and their limits."""

import datetime
import importlib.util
import re
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny

from lora_jax.data import chat, template

NOW = datetime.datetime(2024, 7, 26)
STOPS = ("<|im_end|>", "<|end|>", "</s>", "<end_of_turn>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>")
# Ours, each with what makes one public family hard. BEGIN and END are where a training template has its marks.
FAMILIES = {
    # Gemma: no system role, so it is folded into the first question; the assistant is called otherwise.
    "folds": """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content ~ '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
    {%- set who = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' ~ who ~ '\n' }}
    {%- if who == 'model' %}BEGIN{{ m.content | trim ~ '<end_of_turn>' }}END{{ '\n' }}
    {%- else %}{{ (first if loop.first else '') ~ m.content | trim ~ '<end_of_turn>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    # Mistral: no header before an answer, the end token after it, and the system with the last question alone.
    "bare": """{{ bos_token }}
{%- set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}{% continue %}{% endif %}
    {%- if m.role == 'user' %}{{ '[INST] ' ~ (ns.system if loop.last else '') ~ m.content ~ '[/INST]' }}
    {%- else %}BEGIN{{ ' ' ~ m.content ~ eos_token }}END{% endif %}
{%- endfor %}""",
    # Phi: the end token after whole chats alone.
    "ends": """{% for m in messages %}{{ '<|' + m.role + '|>' }}
{% if m.role == 'assistant' %}BEGIN{{ m.content + '<|end|>' }}END{{ '\n' }}
{% else %}{{ m.content + '<|end|>\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    # Qwen 3: a thought, if only an empty one, in the turns after the last question; earlier ones are forgotten. Tools.
    "forgets": """{%- macro say(text) %}{{ text | trim }}{% endmacro -%}
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ ('user' if m.role == 'tool' else m.role) ~ '\n' }}
    {%- if m.role != 'assistant' %}{{ say(m.content) ~ '<|im_end|>\n' }}{% continue %}{% endif %}
    {%- set said = (m.content or '').split('</think>')[-1].lstrip('\n') %}
    {%- if loop.index0 > ns.last %}BEGIN{{ '<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>\n\n' }}
    {%- else %}BEGIN{% endif %}
    {{- said }}
    {%- for call in m.tool_calls or [] %}
        {{- ('\n' if said or not loop.first else '') ~ '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}END{{ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<a> & 'b'"}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": [1, "ü"]}}}]}


def chats():
    turns = {
        "one": [("user", "what is 1 + 2?"), ("assistant", "3")],
        "three": [*[("user", "hello"), ("assistant", "hello")] * 2, ("user", "hello"), ("assistant", "🙂 hello")],
        "system": [("system", "be short"), ("user", "the sum"), ("assistant", "three")],
        "asked": [("user", "one"), ("assistant", "two"), ("user", "three")],
    }
    named = {name: [{"role": role, "content": text} for role, text in chat] for name, chat in turns.items()}
    ask, said = named["one"]
    return named | {
        "tools": [ask, CALL, {"role": "tool", "content": "3"}, said],
        "thought": [ask, {**said, "reasoning": "well"}, ask, {**said, "reasoning": "so"}],
    }


CHATS = chats()
CASES = [
    (family, name) for family in FAMILIES for name in CHATS if family == "forgets" or name not in ("tools", "thought")
]


def written(family, marks=False):
    begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    return FAMILIES[family].replace("BEGIN", begin).replace("END", end)


def tiny_format(source):
    tok = tiny.tokenizer()
    tok.add_special_tokens([*STOPS, "<s>", "<|im_start|>", "<start_of_turn>", "[INST]", "[/INST]"])
    stop = tuple(tok.token_to_id(name) for name in STOPS)
    special = types.SimpleNamespace(bos=tok.token_to_id("<s>"), eos=tok.token_to_id("</s>"), stop=stop)
    return chat.Format(tok, source, special, NOW)


@pytest.fixture
def theirs(monkeypatch):
    """A tokenizer of transformers with a format's tokens and template, on the day NOW."""
    transformers = pytest.importorskip("transformers")
    fixed = type("datetime", (), {"now": staticmethod(lambda: NOW)})
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", fixed)

    def ask(format, messages, **options):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=format.tokenizer, chat_template=format.template, bos_token="<s>", eos_token="</s>"
        )
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)

    return ask


def tools_of(name):
    return TOOLS if name == "tools" else None


@pytest.mark.parametrize(("family", "name"), CASES)
def test_ids_equal_transformers(family, name, theirs):
    format, tools = tiny_format(written(family)), tools_of(name)
    ids, learn = chat.render(format, CHATS[name], tools or ())
    assert ids.tolist() == theirs(format, CHATS[name], tools=tools)["input_ids"]
    assert 0 < learn.sum() < len(ids)
    asked = CHATS[name][:-1] if CHATS[name][-1]["role"] == "assistant" else CHATS[name]
    prompt = chat.prompt(format, asked, tools or ())
    assert prompt.tolist() == theirs(format, asked, tools=tools, add_generation_prompt=True)["input_ids"]


# A block cannot begin in one branch and end behind it, as the marks of "forgets" would.
@pytest.mark.parametrize(("family", "name"), [case for case in CASES if case[0] != "forgets"])
def test_what_is_learned_without_marks_is_what_marks_would_say(family, name, theirs):
    ids, learn = chat.render(tiny_format(written(family)), CHATS[name])
    marked = tiny_format(written(family, marks=True))
    reference = theirs(marked, CHATS[name], return_assistant_tokens_mask=True)
    assert ids.tolist() == reference["input_ids"]
    assert learn.astype(int).tolist() == reference["assistant_masks"]
    assert chat.render(marked, CHATS[name])[1].astype(int).tolist() == reference["assistant_masks"]


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("one", "<think>\n\n</think>\n\n3<|im_end|>"),
        ("three", "hello<|im_end|>hello<|im_end|><think>\n\n</think>\n\n🙂 hello<|im_end|>"),
        ("asked", "two<|im_end|>"),
        ("thought", "3<|im_end|><think>\nso\n</think>\n\n3<|im_end|>"),
        (
            "tools",
            '<think>\n\n</think>\n\n<tool_call>{"name": "add", "arguments": {"a": [1, "ü"]}}</tool_call><|im_end|>'
            "<think>\n\n</think>\n\n3<|im_end|>",
        ),
    ],
)
def test_what_is_learned_of_turns_that_are_written_otherwise_later(name, learned):
    format = tiny_format(written("forgets"))
    ids, learn = chat.render(format, CHATS[name], tools_of(name) or ())
    assert format.tokenizer.decode(ids[learn].tolist(), skip_special_tokens=False) == learned


def test_a_call_that_is_written_otherwise_later():
    format = tiny_format(written("forgets"))
    chat_ = [*CHATS["tools"], {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    ids, learn = chat.render(format, chat_, TOOLS)
    assert format.tokenizer.decode(ids[learn].tolist(), skip_special_tokens=False) == (
        '<tool_call>{"name": "add", "arguments": {"a": [1, "ü"]}}</tool_call><|im_end|>'
        "3<|im_end|><think>\n\n</think>\n\nhello<|im_end|>"
    )


def test_a_text_is_learned_whole_between_its_ends():
    format = tiny_format(None)
    ids, learn = chat.plain(format, "the sum")
    assert ids.tolist() == [*format.tokenizer.encode("the sum").ids, format.special.eos]
    assert learn.all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system') }}", "fails on this chat: no system"),
        ("{% for m in messages %}", "fails on this chat: Unexpected end of template"),
        ("{{ messages[7].content.x }}", "fails on this chat: .*no element 7"),
        ("{{ 1 / 0 }}", "fails on this chat: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(99999999) %}{% endfor %}", "too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on this chat: "),
    ],
)
def test_templates_that_fail(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        template.render(source, CHATS["one"], (), NOW)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_templates_that_do_not_end(source):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="it does not end: 200,000 turns"):
        template.render(source, CHATS["one"], (), NOW)
    assert time.perf_counter() - start < 30
    text, _ = template.render(source.replace("99999", "9").replace("60", "3"), CHATS["one"], (), NOW)
    assert text == ""


def public():
    """Templates of public models that the package trl has, each with a twin that marks what is said."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("none")
    names = ["llama3", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "cohere", "cohere2"]
    return [path for name in names if (path := folder / f"{name}.jinja").is_file()]


@pytest.mark.skipif(not public(), reason="the package trl, which has them, is not installed")
@pytest.mark.parametrize("path", public(), ids=lambda path: path.stem)
def test_public_templates(path, theirs):
    format, marked = tiny_format(path.read_text()), tiny_format(path.with_stem(path.stem + "_training").read_text())
    compared = 0
    for name in ("one", "three"):
        ids, learn = chat.render(format, CHATS[name])
        assert ids.tolist() == theirs(format, CHATS[name])["input_ids"]
        prompt = theirs(format, CHATS[name][:-1], add_generation_prompt=True)["input_ids"]
        assert chat.prompt(format, CHATS[name][:-1]).tolist() == prompt
        said = theirs(marked, CHATS[name], return_assistant_tokens_mask=True)
        if said["input_ids"] == ids.tolist():  # some twins write otherwise
            masks = learn, np.array(said["assistant_masks"], bool)
            # They differ about the white space around a turn, and about the end of the text behind its end.
            mine, other = (re.sub(r"\s|</s>", "", format.tokenizer.decode(ids[mask].tolist(), False)) for mask in masks)
            assert mine == other
            compared += 1
    assert compared
