"""Prints the parity matrix of docs/models.md: `PYTHONPATH=.:tests python tests/families_matrix.py`.

Its cases and columns are those of families_test.py, and its numbers are measured as it runs.
"""

import tempfile

import jax.numpy as jnp
import numpy as np
import tiny_families

from lora_jax.interop import safetensors
from lora_jax.models import decoder

COLUMNS = {
    "logits": "test_logits",
    "padding": "test_padding",
    "packing": "test_packing",
    "generation": "test_generation",
    "load and export": "test_load_and_export",
    "adapters and merge": "test_adapters",
    "PEFT round trip": "test_peft_round_trip",
}
HEADER = f"| tiny random model | `model_type` | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 2)}"


def row(case: str, error: str, model_type: str) -> str:
    return f"| {case} | {model_type} | {error} |" + " yes |" * (len(COLUMNS) - 1)


def measured(case: str) -> str:
    """The largest difference of a logit from transformers', float32."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_families.make(case).save_pretrained(folder)
        config, params = safetensors.load(folder, jnp.float32)
    x = np.random.default_rng(0).integers(3, 61, (2, 20))
    ours = decoder.forward(params, x, config)
    error = np.abs(ours - np.array(tiny_families.logits(case, x))).max()
    return row(case, f"{error:.0e}", config.family)


if __name__ == "__main__":
    print(HEADER)
    for name in tiny_families.CASES:
        print(measured(name))
