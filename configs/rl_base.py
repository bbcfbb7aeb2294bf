"""A small model that can spell words backward, but in four of five cases puts them into quotation marks.

Reproduces: where reinforcement learning begins: a mean reward below 35%; 0.67 million parameters, random before.
Command:    python -m train.fresh --config=configs/rl_base.py
Hardware:   two CPU cores.
Expected:   docs/rl.md.
"""

from ml_collections import ConfigDict

from train import config as defaults

TASK = "reasoning_gym:spell_backward?min_word_len=3&max_word_len=6"


def get_config():
    config = ConfigDict()
    config.model = {"dim": 128, "layers": 3, "heads": 4, "context": 64}
    config.quoted = 0.8
    config.sft = defaults.sft()
    config.sft.data.source = f"{TASK}&size=60000&seed=0"
    config.sft.data.heldout_source = f"{TASK}&size=256&seed=2"
    config.sft.data.heldout = 256
    config.sft.steps = 3000
    config.sft.batch_size = 64
    config.sft.optim.lr = 2e-3
    config.sft.eval.max_new = 10
    config.sft.eval.batch_size = 64
    config.sft.eval.every = 500
    config.sft.checkpoint.every = 500
    config.run = ""
    return config
