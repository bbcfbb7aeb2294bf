"""Grade-school maths: SmolLM2-135M-Instruct on 200 batches of GSM8K's worked solutions.

Reproduces: the loss on held-out solutions falls.
Command:    LORA_JAX_DATA=<folder with gsm8k/train.jsonl> python -m train.sft --config=configs/gsm8k.py
Hardware:   two CPU cores.
Expected:   held-out loss 1.306 -> 0.687 (docs/results.md).
"""

import os

from train import config as defaults


def get_config():
    config = defaults.sft()
    config.model = "smollm2"
    config.data.source = os.path.join(os.environ.get("LORA_JAX_DATA", "../shared/data"), "gsm8k", "train.jsonl")
    config.data.prompt = "question"
    config.data.completion = "answer"
    config.data.length = 256
    config.data.pack = True
    config.data.heldout = 64
    config.steps = 200
    config.batch_size = 2
    config.optim.lr = 1e-3
    config.eval.every = 100
    config.eval.answers = 4
    config.eval.max_new = 128
    return config
