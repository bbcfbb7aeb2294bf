"""LoRA on a large model, on chips that need not be there: `train.plan` and `benchmarks/scale.py` start from it.

Reproduces: docs/scale.md.
Command:    python -m train.plan --config=configs/scale.py --topology=v5e:4x4
Hardware:   none of it; a CPU compiles.
Expected:   it fits, as docs/scale.md says in its first line.
"""

from train import config as defaults


def get_config():
    config = defaults.sft()
    config.model = "llama-3.1-8b"
    config.data.length = 4096
    config.data.pack = True
    config.batch_size = 16
    config.eval.batch_size = 16
    config.lora.rank = 16
    config.optim.mu_dtype = "bfloat16"  # else a 1B model keeps 1.055 of its base between steps
    config.remat = "full"
    config.loss_chunk = 16 * 512
    config.mesh = "fsdp=-1"
    return config
