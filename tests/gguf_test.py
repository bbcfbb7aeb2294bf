"""A GGUF file loads as the safetensors it was made from, whatever its quantisation, or with one clear line."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gguf

from lora_jax.interop import gguf as reader
from lora_jax.interop import safetensors
from lora_jax.models import decoder

TEXTS = ["the sum of 12 and 345", "  spaces\n\nand Wörter!", "<|im_start|>user\nwhat is<|im_end|>", ""]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    return tiny.write(tmp_path / "model", tie_word_embeddings=request.param, head_dim=24)


@pytest.fixture
def file(tmp_path):
    return tiny_gguf.write(tmp_path / "model.gguf", tiny.write(tmp_path / "model"))


def test_float32_equals_the_folder_bit_for_bit(tmp_path, folder):
    theirs = safetensors.load(folder, jnp.float32)
    ours = reader.load(reader.File(tiny_gguf.write(tmp_path / "model.gguf", folder)), jnp.float32)
    for field in ("vocab", "dim", "hidden", "layers", "heads", "kv_heads", "head_dim", "rope_base", "tied"):
        assert getattr(ours[0], field) == getattr(theirs[0], field)
    assert ours[0].norm_eps == pytest.approx(theirs[0].norm_eps)
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


def test_rows_of_rotary_heads_are_put_back(file):
    x = np.arange(8.0)[:, None] * np.ones(3)
    stored = tiny_gguf.interleave(x, 8)
    assert list(stored[:, 0]) == [0, 4, 1, 5, 2, 6, 3, 7]
    np.testing.assert_array_equal(reader._half_rotation(stored, 8), x)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_are_close(tmp_path, kind):
    folder = tiny.write(tmp_path / "model", intermediate_size=64)  # rows are quantised in blocks of 32
    path = tiny_gguf.write(tmp_path / "model.gguf", folder, gguf.GGMLQuantizationType[kind])
    _, exact = safetensors.load(folder, jnp.float32)
    _, ours = reader.load(reader.File(path), jnp.float32)
    step = 2.0**-7 if "16" in kind else 2.0 ** -(int(kind[1]) - 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=step * np.abs(a).max()), exact, ours)
    kernel = ours["layers"]["up_proj"]["kernel"]
    assert not np.array_equal(kernel, exact["layers"]["up_proj"]["kernel"])


def test_logits_equal_transformers_reading_the_same_file(tmp_path):
    tiny_llama = pytest.importorskip("tiny_llama", reason="needs torch and transformers")
    vocab = tiny.tokenizer().get_vocab_size()
    tiny_llama.make(vocab_size=vocab).save_pretrained(tmp_path / "model")
    tiny_gguf.write(tmp_path / "model.gguf", tmp_path / "model")
    llama = tiny_llama.transformers.LlamaForCausalLM
    model = llama.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32")
    config, params = reader.load(reader.File(tmp_path / "model.gguf"), jnp.float32)
    x = np.random.default_rng(0).integers(3, config.vocab, (2, 11))
    theirs = tiny_llama.logits(model, x)
    np.testing.assert_allclose(decoder.forward(params, x, config), theirs, atol=1e-4)
    swapped = dict(params["layers"], q_proj=jax.tree.map(lambda w: w[..., ::-1], params["layers"]["q_proj"]))
    assert np.abs(decoder.forward({**params, "layers": swapped}, x, config) - theirs).max() > 0.1


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(file, text):
    tok = reader.tokenizer(reader.File(file))
    assert tok.decode(tok.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_ids_equal_the_original(file):
    tok, original = reader.tokenizer(reader.File(file)), tiny.tokenizer()
    for text in ["the sum of one and two", "<|im_start|>user\nwhat is<|im_end|>"]:
        assert tok.encode(text).ids == original.encode(text).ids
    assert tok.token_to_id("<|im_end|>") == 2
    assert len(tok.encode("<|im_end|>").ids) == 1 < len(tok.encode("<|im_end>").ids)


def test_digits_are_split_one_by_one(file):
    tok = reader.tokenizer(reader.File(file))
    digits = tok.pre_tokenizer.pre_tokenize_str("a 123")
    assert [piece for piece, _ in digits] == ["a", "Ġ", "1", "2", "3"]


def spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


BROKEN = {
    "cut tensors": lambda b: b[: len(b) - 4000],
    "cut metadata": lambda b: b[:3000],
    "empty": lambda b: b"",
    "something else": lambda b: b"not a model" * 100,
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_broken_file(file, change):
    reader.File(file)
    spoil(file, change)
    with pytest.raises(ValueError, match=r"not a whole GGUF file .* download it again") as caught:
        reader.File(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file; give the path of a \.gguf file"):
        reader.File(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight", r"tensor blk.1.ffn_up.weight \[48, 32\] is missing"),
        (b"general.architecture", b"general.architectrue", "general.architecture None is not supported"),
        (b"llama.block_count", b"llama.block_cuont", "metadata field 'llama.block_count' is missing"),
    ],
)
def test_incomplete_file(file, old, new, message):
    spoil(file, lambda b: b.replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        reader.load(reader.File(file), jnp.float32)
    assert str(file) in str(caught.value)


def test_wrong_shape(tmp_path):
    wrong = {"llama__feed_forward_length": (40, gguf.GGUFValueType.UINT32)}
    folder = tiny.write(tmp_path / "model")
    with pytest.raises(ValueError, match=r"blk.0.ffn_gate.weight has shape \[48, 32\] .* asks for \[40, 32\]"):
        path = tiny_gguf.write(tmp_path / "model.gguf", folder, **wrong)
        reader.load(reader.File(path), jnp.float32)


@pytest.mark.parametrize(("old", "new"), [(b"smollm", b"nosuch"), (b"gpt2", b"bert")])
def test_other_tokenizers_are_refused(file, old, new):
    spoil(file, lambda b: b.replace(old, new))
    with pytest.raises(ValueError, match=r"is not supported .*put the model's tokenizer\.json into"):
        reader.tokenizer(reader.File(file))
