"""Reinforcement learning on two cores: a small decoder learns to spell words backward from rewards alone, at rank 1.

Reproduces: "LoRA Without Regret": rank 1 suffices where a reward tells little.
Command:    python -m train.fresh --config=configs/rl_base.py && python -m train.rl --config=configs/rl.py
Hardware:   two CPU cores.
Expected:   docs/rl.md.
"""

from train import rl_settings as defaults

TASK = "reasoning_gym:spell_backward?min_word_len=3&max_word_len=6"


def get_config():
    config = defaults.rl()
    config.model = "runs/rl_base/model"
    config.data.source = f"{TASK}&size=12000&seed=1"
    config.data.heldout_source = f"{TASK}&size=256&seed=2"
    config.data.heldout = 256
    config.reward.functions = (("reasoning_gym", 1.0),)
    config.method = "lora"
    config.lora.rank = 1
    config.optim.lr = 1e-3
    config.steps = 200
    config.sampler.prompts = 16
    config.sampler.samples = 8
    config.sampler.max_new = 10
    config.batch_size = 128
    config.eval.every = 25
    config.checkpoint.every = 25
    return config
