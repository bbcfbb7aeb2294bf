"""Tiny models with trained adapters of PEFT's, the oracle of what is read and written."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_llama

import lora_jax as lora
from lora_jax import soft
from lora_jax.interop import safetensors as reader
from lora_jax.models import decoder

peft = pytest.importorskip("peft")
torch = tiny_llama.torch
TASK = {"task_type": "CAUSAL_LM"}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {
    "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 2},
    "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 4, "o_proj": 3, "v_proj": 5},
}
LAYERS = r"model\.layers\.(0|2)\.self_attn\.(q|v)_proj|.*\.1\.mlp\.down_proj"
CASES = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=ALL, **TASK),
    "rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"], **TASK),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=ALL, **TASK),
    "patterns": lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, **RANKS, **TASK),
    "scales": lambda: peft.LoraConfig(
        r=4, target_modules=["up_proj"], alpha_pattern={r"layers\.1\.mlp\.up_proj": 3}, **TASK
    ),
    "regex": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, **TASK),
    "layers": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], layers_to_transform=[1], **TASK),
    "ends": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "v_proj"], **TASK),
    "whole": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"], **TASK),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["embed_tokens"], **TASK),
    "bias": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all", **TASK),
    "biases": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], bias="lora_only", **TASK),
    "vera biases": lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj"], bias="all", **TASK),
    "rows": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 3, 9], **TASK),
    "rows alone": lambda: peft.TrainableTokensConfig(token_indices=[7, 3], **TASK),
    "vera": lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj", "down_proj"], **TASK),
    "vera layers": lambda: peft.VeraConfig(
        r=5, target_modules=["k_proj", "up_proj"], layers_to_transform=[0, 2], **TASK
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "ia3 layers": lambda: peft.IA3Config(target_modules=r".*\.[01]\.mlp\.up_proj", feedforward_modules=[], **TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **TASK),
}


def texts(vocab=64):
    return np.random.default_rng(0).integers(3, vocab, (2, 9)) % np.array([[vocab], [12]])


BIASED = {"attention_bias": True, "mlp_bias": True}  # of the models that cases of biases are for


def base(folder, **changes):
    """A model of transformers, its config and its parameters."""
    model = tiny_llama.make(**changes)
    model.save_pretrained(folder)
    return model, *reader.load(folder, jnp.float32)


def trained(model, settings, folder):
    """A model of PEFT's, far from where it begins, and saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, settings).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return model


def their_logits(folder, **changes):
    """Of an adapter that PEFT loads; tensors that it misses or does not know are errors."""
    model = tiny_llama.make(**changes)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peeled(peft.PeftModel.from_pretrained(model, folder).eval())


def peeled(model):
    """Logits, without those of virtual tokens."""
    return tiny_llama.logits(model, texts())[:, -texts().shape[1] :]


def our_logits(params, adapters, config):
    if isinstance(adapters, soft.Prompt | soft.Prefix):
        forward, tree = soft.applied(decoder.forward), soft.attach(params, adapters, config)
    else:
        forward, tree = lora.lift(decoder.forward), lora.attach(params, adapters)
    return np.asarray(jax.jit(forward, static_argnums=2)(tree, jnp.array(texts(), jnp.int32), config))


def tensors(folder):
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def same(left, right):
    """Whether two trees are one, to the last bit and in their static data."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(x, y)
