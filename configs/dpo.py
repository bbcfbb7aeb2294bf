"""Preferences: SmolLM2-135M-Instruct learns to tell right solutions of GSM8K from wrong ones, with DPO.

Reproduces: held-out preference accuracy rises.
Command:    LORA_JAX_DATA=<folder with gsm8k/model_solutions.jsonl> python -m train.dpo --config=configs/dpo.py
Hardware:   two CPU cores.
Expected:   docs/results.md.
"""

import os

from train import dpo_settings as defaults


def get_config():
    config = defaults.dpo()
    config.model = "smollm2"
    folder = os.path.join(os.environ.get("LORA_JAX_DATA", "../shared/data"), "gsm8k")
    config.data.source = f"gsm8k_solutions:{os.path.join(folder, 'model_solutions.jsonl')}"
    config.data.length = 256
    config.data.heldout = 128
    config.steps = 50
    config.batch_size = 4
    config.checkpoint.every = 25
    return config
