"""A small model that has begun to learn a task: words spelled backward, less than a third of the letters right.

Reproduces: where reinforcement learning begins; a decoder of 0.5 million parameters, random before.
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
    config.sft = defaults.sft()
    config.sft.data.source = f"{TASK}&size=12000&seed=0"
    config.sft.data.heldout_source = f"{TASK}&size=256&seed=2"
    config.sft.data.heldout = 256
    config.sft.method = "full"
    config.sft.steps = 200
    config.sft.batch_size = 64
    config.sft.optim.lr = 1e-3
    config.sft.optim.schedule = "constant"
    config.sft.eval.max_new = 8
    config.sft.eval.batch_size = 64
    config.run = ""
    return config
