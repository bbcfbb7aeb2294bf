"""The settings of `train/dpo.py`, with their defaults."""

from lora_jax.data import formats
from train import config as settings
from train import preferences

Config = settings.Config


def dpo() -> Config:
    """Every setting of preference learning; locked, so that a mistyped name is an error."""
    config = settings.common()
    config.update(
        {
            "loss": "dpo",  # "dpo", "ipo", "kto", "orpo" or "simpo": train/preferences.py
            "beta": 0.0,  # how strongly the reference holds, or what else the loss has for it; 0: the loss's own
            "smoothing": 0.0,  # of "dpo": the share of pairs that may be the wrong way round
            "margin": 1.0,  # of "simpo": by how much the better answer's reward is to be larger
            "desirable": 1.0,  # of "kto": what good answers weigh
            "undesirable": 1.0,  # of "kto": what bad answers weigh
            "reference": "base",  # run in every step; or "precomputed", once, before the first
        }
    )
    config.data = {
        "source": "",  # pairs or judged answers: a file or folder, tfds:NAME, hf:NAME, gsm8k_solutions:FILE
        "prompt": "prompt",  # the source's name of this column
        "chosen": "chosen",  # the source's name of this column
        "rejected": "rejected",  # the source's name of this column
        "columns": {name: name for name in formats.COLUMNS if name not in ("prompt", "chosen", "rejected")},
        "heldout": 64,  # pairs to evaluate on, whose prompts are never trained on
        "heldout_source": "",  # a source whose first pairs these are; empty: they are drawn from the other
        "length": 0,  # tokens in a row; 0: as many as the longest answer has with its prompt
    }
    return config.lock()


def check(config: Config) -> None:
    """Finds settings that cannot be meant.

    Raises:
      ValueError: naming the setting.
    """
    settings.check_common(config)
    for name, allowed in {"loss": preferences.LOSSES, "reference": ("base", "precomputed")}.items():
        if config[name] not in allowed:
            raise ValueError(f"config.{name}={config[name]!r} is not one of {', '.join(map(repr, allowed))}")
    if config.beta < 0:
        raise ValueError(f"config.beta={config.beta} must be 0 or more")
    if not 0 <= config.smoothing < 0.5:
        raise ValueError(f"config.smoothing={config.smoothing} must be at least 0 and less than 0.5")
    if config.data.heldout < 1:
        raise ValueError(f"config.data.heldout={config.data.heldout} must be at least 1")
    if not config.data.source:
        raise ValueError("config.data.source is empty: give a file or folder of pairs, or gsm8k_solutions:FILE")
    if config.loss in preferences.UNPAIRED:
        together = f"config.loss={config.loss!r} compares the answers of a whole batch with each other: "
        if config.accumulate > 1 or config.batch_size < 2:
            raise ValueError(f"{together}config.accumulate must be 1, and config.batch_size at least 2")
        if config.reference == "precomputed":
            raise ValueError(f"{together}their reference cannot be precomputed; use config.reference='base'")
