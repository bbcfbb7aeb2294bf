"""Prompt and prefix tuning compute what PEFT's do: logits, gradients, generated tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_soft import KINDS, REMATS, N, T, forward, gradient, speak, texts, trained

from lora_jax import soft
from lora_jax.interop import safetensors
from lora_jax.models import generate

pytestmark = pytest.mark.usefixtures("quick")
tiny_llama, peft = pytest.importorskip("tiny_llama"), pytest.importorskip("peft")
torch = tiny_llama.torch


def table(small):
    """What PEFT trains: a row for each token, of a prefix layer by layer the keys and then the values."""
    if isinstance(small, soft.Prompt):
        return np.asarray(small.vectors)
    return np.stack([small.k, small.v]).transpose(2, 1, 0, 3, 4).reshape(N, -1)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A model of PEFT's, and ours with what it has trained."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_llama.make()
    model.save_pretrained(folder)
    config, params = safetensors.load(folder, jnp.float32)
    small = trained(request.param, config)
    settings = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[request.param]
    theirs = peft.get_peft_model(model, settings(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
    weight = theirs.prompt_encoder["default"].embedding.weight
    weight.data.copy_(torch.tensor(table(small)))
    return theirs, weight, small, params, config


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits_equal_peft(pair, padding):
    theirs, _, small, params, config = pair
    x, real = texts(), np.ones((2, T), int)
    if padding:
        real[1, slice(0, 4) if padding == "left" else slice(-4, None)] = 0
    expected = tiny_llama.logits(theirs, x, attention_mask=real)[:, -T:]
    ours = forward(soft.attach(params, small, config), x, config, segments_BT=real)
    np.testing.assert_allclose(ours[real == 1], expected[real == 1], atol=1e-4)
    alone = forward(params, x, config, segments_BT=real)
    assert np.abs(alone - ours)[real == 1].max() > 0.1
    other = forward(soft.attach(params, jax.tree.map(lambda x: -x, small), config), x, config, segments_BT=real)
    assert np.abs(other - ours)[real == 1].max() > 0.1


@pytest.mark.parametrize("remat", REMATS)
def test_gradients_equal_peft(pair, remat):
    theirs, weight, small, params, config = pair
    x, weight.grad = texts(), None
    logits = theirs(torch.tensor(x)).logits[:, -T:-1]
    torch.nn.functional.cross_entropy(logits.reshape(-1, config.vocab), torch.tensor(x[:, 1:]).reshape(-1)).backward()
    ours, expected = table(gradient(small, params, x, config, remat)), weight.grad.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3
    assert np.abs(ours - expected[::-1]).max() > 0.5 * np.abs(expected).max()


def test_greedy_tokens_equal_peft(pair):
    theirs, _, small, params, config = pair
    x, lengths = texts(), [T, 7]
    tree = soft.attach(params, small, config)
    tokens, _ = generate.generate(tree, config, x, lengths, 8, (), apply=speak)
    for row, prompt, length in zip(tokens, x, lengths, strict=True):
        prompt = torch.tensor(prompt[None, :length])
        asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 8}
        expected = theirs.generate(input_ids=prompt, eos_token_id=config.vocab, pad_token_id=0, **asked)
        np.testing.assert_array_equal(row, expected[0, length:])
    alone, _ = generate.generate(params, config, x, lengths, 8, ())
    assert not np.array_equal(tokens, alone)
