"""The quickstart: a 135M chat model learns to answer sums with the number alone.

Reproduces: exact match on held-out questions from 0% (it answers in sentences, often wrongly) to about 70%.
Command:    make quickstart, or: python -m train.sft --config=configs/quickstart.py
Hardware:   two CPU cores; 6.4 minutes of CPU time in all, shared between them.
Expected:   held-out loss 3.01 -> 0.36, and a last line like `exact match 0.0% -> 70.3%` (128 questions).
"""

from train import config as defaults


def get_config():
    config = defaults.sft()
    config.model = "smollm2"
    config.data.source = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=3000"
    config.steps = 60
    config.batch_size = 16
    config.optim.lr = 2e-3
    config.data.heldout = 128
    config.eval.answers = 128
    config.eval.every = 30
    config.eval.max_new = 8
    config.checkpoint.every = 20
    return config
