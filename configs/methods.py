"""Every method on the same task: two-operand sums, SmolLM2-135M-Instruct, three learning rates or more each.

Reproduces: the table in docs/methods.md.
Command:    python -m train.compare --config=configs/methods.py
Hardware:   two CPU cores, about a minute a run, some sixty runs.
Expected:   docs/methods.md.
"""

from ml_collections import ConfigDict

from train import config as defaults
from train.methods import METHODS


def get_config():
    config = ConfigDict()
    config.sft = defaults.sft()
    with config.sft.unlocked():
        config.sft.model = "smollm2"
        config.sft.data.source = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=2000"
        config.sft.steps = 20
        config.sft.batch_size = 8
        config.sft.data.heldout = 64
        config.sft.eval.answers = 64
        config.sft.eval.max_new = 8
        config.sft.eval.batch_size = 64
    config.methods = ("full", *(name for name in METHODS if name not in ("full", "loftq")), "lora@nf4", "loftq@nf4")
    config.grid = (1 / 3, 1.0, 3.0)
    config.run = ""
    return config
