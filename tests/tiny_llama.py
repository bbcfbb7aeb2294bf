"""Tiny random Llama models of the transformers library, the oracle of the decoder's tests."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # its threads spin where other processes want the cores

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def make(**changes):
    """A float32 model with weights far enough from zero for every part to matter."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def logits(model, tokens, **inputs) -> np.ndarray:
    with torch.no_grad():
        inputs = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
        return model(torch.tensor(np.asarray(tokens)), **inputs).logits.numpy()
