"""E2E NLG: SmolLM2-135M-Instruct says in a sentence what a table of attributes says of a restaurant.

Reproduces: the LoRA paper's comparison of LoRA and full fine-tuning on this task (its table 3), at this scale and with
            as many tokens for both: trained on the development set, asked half of the test set's tables.
Command:    LORA_JAX_DATA=<folder with e2e_nlg> python -m benchmarks.e2e --config=configs/e2e.py
Hardware:   two CPU cores.
Expected:   the paper's: LoRA no worse than full fine-tuning. Not seen: LoRA was 0.7 BLEU behind (docs/results.md).
"""

import os

from train import config as defaults


def get_config():
    config = defaults.sft()
    folder = os.path.join(os.environ.get("LORA_JAX_DATA", "../shared/data"), "e2e_nlg")
    config.model = "smollm2"
    config.data.source = os.path.join(folder, "devset.csv")
    config.data.heldout_source = os.path.join(folder, "testset_w_refs.csv")
    config.data.prompt = "mr"
    config.data.completion = "ref"
    config.data.heldout = 256
    config.data.length = 256
    config.data.pack = True
    config.steps = 100
    config.batch_size = 4
    config.optim.warmup = 10
    config.lora.rank = 16
    config.eval.every = 50
    config.eval.answers = 8
    config.eval.max_new = 80
    config.eval.batch_size = 63
    return config
