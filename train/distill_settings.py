"""The settings of `train/distill.py`, with their defaults."""

from lora_jax.data import formats
from train import config as settings

Config = settings.Config


def distill() -> Config:
    """Every setting of distillation; locked, so that a mistyped name is an error."""
    config = settings.common()
    config.teacher = {  # at least one of these
        "model": "",  # as config.model; empty: the student's own base, of which there is one copy
        "adapter": "",  # folder of a run, or of an adapter in PEFT's files, over the teacher's model
        "system": "",  # what the teacher is told before every chat, and the student is not
    }
    config.update(
        {
            "on_policy": False,  # the student learns from what it says itself; the data needs no answers
        }
    )
    config.sampler = {  # of the student's own answers
        "max_new": 64,  # tokens in an answer
        "temperature": 1.0,  # of the distribution that tokens are drawn from
    }
    config.data = {
        "source": "",  # a file or folder, tfds:NAME?split=..., hf:NAME?split=..., reasoning_gym:TASK?parameter=...
        "prompt": "prompt",  # the source's name of this column
        "completion": "completion",  # the source's name of this column
        "columns": {name: name for name in formats.COLUMNS if name not in ("prompt", "completion")},  # and of these
        "heldout": 64,  # examples to evaluate on, never trained on
        "heldout_source": "",  # a source whose first examples these are; empty: they are drawn from the other
        "length": 0,  # tokens in a row, an answer included; 0: as many as the longest example has
    }
    return config.lock()


def check(config: Config) -> None:
    """Finds settings that cannot be meant.

    Raises:
      ValueError: naming the setting.
    """
    settings.check_common(config)
    if not any(config.teacher.values()):
        raise ValueError(
            "config.teacher is the student itself: give config.teacher.model, config.teacher.adapter or "
            "config.teacher.system"
        )
    if config.data.heldout < 1:
        raise ValueError(f"config.data.heldout={config.data.heldout} must be at least 1")
    if not config.data.source:
        raise ValueError("config.data.source is empty: give a file or folder, or reasoning_gym:TASK")
    if config.sampler.max_new < 1:
        raise ValueError(f"config.sampler.max_new={config.sampler.max_new} must be at least 1")
    if not config.sampler.temperature > 0:
        raise ValueError(f"config.sampler.temperature={config.sampler.temperature} must be more than 0")
