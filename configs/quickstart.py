"""The quickstart: a 135M chat model learns to answer sums with the number alone.

Reproduces: exact match on held-out questions from 0% (it answers in sentences, often wrongly) to about 75%.
Command:    make quickstart, or: python -m train.sft --config=configs/quickstart.py
Hardware:   two CPU cores, about 4 minutes.
Expected:   a last line like `exact match 0.0% -> 75.0%`.
"""

from train import config as defaults


def get_config():
    config = defaults.sft()
    config.model = "smollm2"
    config.data.source = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=3000"
    config.steps = 60
    config.batch_size = 16
    config.optim.lr = 2e-3
    config.eval.every = 30
    config.eval.max_new = 8
    config.checkpoint.every = 20
    return config
