"""Distillation: SmolLM2-135M-Instruct learns to answer in one sentence without being told to, from itself being told.

Reproduces: the divergence from the teacher on held-out questions falls.
Command:    LORA_JAX_DATA=<folder with gsm8k/train.jsonl> python -m train.distill --config=configs/distill.py
Hardware:   two CPU cores.
Expected:   docs/results.md.
"""

import os

from train import distill_settings as defaults


def get_config():
    config = defaults.distill()
    config.model = "smollm2"
    config.teacher.system = "You answer in one short sentence, without showing any steps."
    config.on_policy = True
    config.sampler.max_new = 48
    config.data.source = os.path.join(os.environ.get("LORA_JAX_DATA", "../shared/data"), "gsm8k", "train.jsonl")
    config.data.prompt = "question"
    config.data.completion = "answer"
    config.data.length = 192
    config.data.heldout = 16
    config.steps = 40
    config.batch_size = 4
    config.checkpoint.every = 20
    return config
