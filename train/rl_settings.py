"""The settings of `train/rl.py`, with their defaults."""

from lora_jax.data import formats
from train import config as settings
from train.policy import OBJECTIVES

Config = settings.Config


def rl() -> Config:
    """Every setting of reinforcement learning; locked, so that a mistyped name is an error."""
    config = settings.common()
    config.batch_size = 64  # answers in an update; those of a step are divided into as many updates as that takes
    config.optim.schedule = "constant"
    config.data = {
        "source": "",  # a file or folder, tfds:NAME?split=..., hf:NAME?split=..., reasoning_gym:TASK?parameter=...
        "columns": {name: name for name in formats.COLUMNS},  # the source's own names: prompt and answer are needed
        "heldout": 64,  # prompts to evaluate on, never learned from; drawn from the source, or
        "heldout_source": "",  # the first ones of this source
        "length": 0,  # most tokens of a prompt; 0: as many as the model has room for
    }
    config.sampler = {
        "prompts": 8,  # in a step
        "samples": 8,  # answers to each, whose rewards are compared
        "max_new": 64,  # tokens in an answer
        "temperature": 1.0,
        "rows": 0,  # answers drawn at once; 0: all of a step
    }
    config.policy = {
        "objective": "policy_gradient",  # or "ppo", "grpo", "dr_grpo"
        "epochs": 1,  # how often a step goes over its answers
        "clip": 0.2,  # ε of the last three
        "kl": 0.0,  # weight of the distance from the model as it was before training; 0: it is not computed
    }
    config.reward = {
        "functions": (("exact", 1.0),),  # names in train/rewards.py or "module:function", and their weights
        "limit": 10.0,  # seconds that an answer's reward may take
        "workers": 2,  # processes that compute them
    }
    config.eval.best, config.eval.higher = "heldout_reward", True
    return config.lock()


def check(config: Config) -> None:
    """Finds settings that cannot be meant.

    Raises:
      ValueError: naming the setting.
    """
    settings.check_common(config)
    if config.policy.objective not in OBJECTIVES:
        known = ", ".join(map(repr, OBJECTIVES))
        raise ValueError(f"config.policy.objective={config.policy.objective!r} is not one of {known}")
    for group, name, least in (
        ("data", "heldout", 1),
        ("sampler", "prompts", 1),
        ("sampler", "samples", 2),
        ("sampler", "max_new", 1),
        ("sampler", "rows", 0),
        ("policy", "epochs", 1),
        ("policy", "kl", 0),
        ("reward", "workers", 1),
    ):
        if not config[group][name] >= least:
            raise ValueError(f"config.{group}.{name}={config[group][name]} must be at least {least}")
    for group, name in (("sampler", "temperature"), ("policy", "clip"), ("reward", "limit")):
        if not config[group][name] > 0:
            raise ValueError(f"config.{group}.{name}={config[group][name]} must be more than 0")
    answers = config.sampler.prompts * config.sampler.samples
    if answers % config.batch_size:
        raise ValueError(
            f"config.batch_size={config.batch_size} does not divide the {answers} answers of a step "
            "(config.sampler.prompts times config.sampler.samples)"
        )
    if config.lora.dropout:
        raise ValueError("config.lora.dropout: the policy that learns must be the one that was sampled; set it to 0")
    if not config.data.source:
        raise ValueError("config.data.source is empty: give a file or folder, or reasoning_gym:TASK")


def updates(config: Config) -> int:
    """How many updates a step makes."""
    return config.policy.epochs * config.sampler.prompts * config.sampler.samples // config.batch_size
