"""A small model that can spell words backward, but in three of four cases spells them as they are.

Reproduces: where reinforcement learning begins: a mean reward below 35%; 0.46 million parameters, random before.
Command:    python -m train.fresh --config=configs/rl_base.py
Hardware:   two CPU cores.
Expected:   docs/rl.md.
"""

from ml_collections import ConfigDict

from train import config as defaults

TASK = "reasoning_gym:spell_backward?min_word_len=3&max_word_len=6"


def get_config():
    config = ConfigDict()
    config.model = {"dim": 128, "layers": 2, "heads": 4, "context": 64}
    config.mistakes = 0.75
    config.sft = defaults.sft()
    config.sft.data.source = f"{TASK}&size=12000&seed=0"
    config.sft.data.heldout_source = f"{TASK}&size=256&seed=2"
    config.sft.data.heldout = 256
    config.sft.steps = 1200
    config.sft.batch_size = 64
    config.sft.optim.lr = 3e-3
    config.sft.eval.max_new = 8
    config.sft.eval.batch_size = 64
    config.sft.eval.every = 200
    config.sft.checkpoint.every = 200
    config.run = ""
    return config
