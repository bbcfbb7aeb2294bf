"""Reinforcement learning at rank 1 and of every parameter, three seeds each, side by side.

Reproduces: "LoRA Without Regret": rank 1 reaches what full fine-tuning reaches.
Command:    python -m train.seeds --config=configs/rl_seeds.py
Hardware:   two CPU cores.
Expected:   docs/rl.md.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.base = "configs/rl_base.py"
    config.rl = "configs/rl.py"
    config.variants = {
        "rank-1": {"method": "lora", "lora": {"rank": 1}, "optim": {"lr": 1e-3}},
        "full": {"method": "full", "optim": {"lr": 3e-4}},
    }
    config.seeds = (0, 1, 2)
    config.run = ""
    return config
