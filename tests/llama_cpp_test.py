"""llama.cpp, with an adapter that was written for it, speaks the tokens that we do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gguf
import tiny_run

import lora_jax as lora
from lora_jax.interop import gguf_adapter, hf, portable
from lora_jax.models import decoder, generate

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is the oracle")
pytestmark = pytest.mark.slow
NEW = 12
PROMPT = "<|im_start|>user\nwhat is the sum of one and two<|im_end|>\n<|im_start|>assistant\n"


def theirs(path, prompt, adapter=None):
    model = llama_cpp.Llama(
        str(path), lora_path=adapter and str(adapter), n_ctx=256, n_threads=1, use_mmap=False, verbose=False
    )
    return list(itertools.islice(model.generate(prompt, temp=0.0), NEW))


def ours(params, adapters, config, prompt):
    speak = lora.lift(decoder.forward_with_cache)
    tree = lora.attach(params, adapters)
    tokens, _ = generate.generate(tree, config, np.array([prompt]), np.array([len(prompt)]), NEW, (), apply=speak)
    return np.asarray(tokens)[0].tolist()


def adapted(model, scale, target):
    sites = lora.trace(decoder.forward, model.params, jnp.zeros((1, 8), jnp.int32), model.config)
    start = lora.init(jax.random.key(0), model.params, sites, lora.Spec(rank=4, alpha=scale, target=target))
    return tiny_run.moved(start)


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_greedy_tokens_are_equal(name, tmp_path):
    if name == "tiny":  # in float32, with fewer key and value heads than query heads, and a head of its own
        folder = tiny.write(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
        path, scale, target = tiny_gguf.write(tmp_path / "model.gguf", folder), 4.0, "_proj|embed|head"
    else:
        path, scale, target = hf.packaged(), 1.0, "_proj"
    model = hf.load(path)
    prompt = model.tokenizer.encode(PROMPT).ids
    adapters = adapted(model, scale, target)
    adapter = tmp_path / "adapter.gguf"
    gguf_adapter.save(adapter, portable.convert(adapters, model.config, model.params).adapters, model.config)
    said = theirs(path, prompt, adapter)
    assert said == ours(model.params, adapters, model.config, prompt)
    assert said != theirs(path, prompt) == ours(model.params, {}, model.config, prompt)
