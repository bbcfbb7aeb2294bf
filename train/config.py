"""The settings of trainers, with their defaults. A file in `configs/` changes what an experiment needs."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from ml_collections import ConfigDict

from lora_jax.data import formats
from lora_jax.models import decoder, kernels
from lora_jax.quant import FORMATS
from lora_jax.sharding import FOLLOW
from train import placing, profiling, trackers
from train.methods import METHODS

Config = Any  # a ConfigDict, whose attributes no type checker knows
SCHEDULES = {
    "linear": lambda lr, steps: optax.linear_schedule(lr, 0.0, steps),
    "cosine": lambda lr, steps: optax.cosine_decay_schedule(lr, steps),
    "constant": lambda lr, steps: optax.constant_schedule(lr),
}


def common() -> Config:
    """The settings that every trainer has; not locked yet."""
    config = ConfigDict(
        {
            "model": "smollm2",  # a folder with config.json and safetensors, a .gguf file, or "smollm2"
            "dtype": "",  # of the base; empty: float32 on CPU, bfloat16 elsewhere
            "run": "",  # folder of the run; empty: runs/<name of the config file>
            "seed": 0,  # of adapters, dropout, data order and what is held out
            "steps": 100,  # updates
            "batch_size": 16,  # rows in an update
            "accumulate": 1,  # parts that a batch is computed in, to save memory; the update is the same
            "remat": "none",  # what is computed again: "none"; "dots": not products; "offload": so, on the host; "full"
            "attention": "auto",  # what computes it: "chunked", "splash" (TPU), "cudnn" (GPU); "auto": by the platform
            "loss_chunk": 0,  # tokens whose logits are held at once; 0: all
            "profile": "",  # steps to trace for TensorBoard, such as "10:13"; empty: none
            "mesh": "",  # devices along the axes data, fsdp, tensor, expert: "fsdp=4,tensor=2"; empty: one device
            "method": "lora",  # train/methods.py lists them; "full" trains every parameter
            "quantize": "",  # of the base's linear weights: "nf4", "int8", "int4", "fp8"; empty: none
            "soft_text": "",  # what "prompt" and "prefix" start from; empty: random tokens
            "adapter": "",  # to go on with, in PEFT's files; it says what is trained, and of lora only dropout counts
            "force": False,  # go on with an adapter though it was trained over another base
        }
    )
    config.lora = {
        "target": "",  # "all-linear", "attention", "mlp" or a regular expression; empty: the method's own
        "exclude": (),  # regular expressions of weights to leave out
        "also": (),  # regular expressions of leaves that are trained whole: norms, biases, a head
        "rank": 0,  # of the factors; for "prompt" and "prefix", trained tokens; 0: the method's own
        "active_experts": 1,  # how many a token is sent to: an expert's factors have the rank divided by it
        "alpha": 32.0,  # the product of the factors is scaled by alpha / rank
        "dropout": 0.0,  # share of the factors' input that is dropped
        "init": "",  # "uniform", "normal", "orthogonal", "pissa", "olora"; empty: the method's own
    }
    config.sharding = {  # where on a mesh arrays are; lora_jax/sharding.py
        "rules": (),  # along which of its axes those of the base are divided: (("F", "tensor"), ...); empty: the usual
        "follow": FOLLOW,  # where adapters are divided as their weights: "stacked", "inp", "out", or axes of the mesh
        "divide": True,  # between steps, adapters and their moments along axes of rows too; gathered once in a step
    }
    config.optim = {  # Adam
        "lr": 0.0,  # the learning rate; 0: by the method and the model's width
        "schedule": "linear",  # how it falls to zero at the last step, or "cosine"; or "constant"
        "warmup": 0,  # steps in which it rises before that
        "clip": 1.0,  # global norm of the gradient; 0: none
        "weight_decay": 0.0,  # AdamW's, of factors and whole matrices; best left at 0 for factors
        "b1": 0.9,  # memory of the mean of gradients
        "b2": 0.999,  # memory of the mean of their squares
        "mu_dtype": "",  # the mean of gradients is kept in it, such as "bfloat16"; empty: as what is trained
    }
    config.eval = {
        "every": 0,  # steps between evaluations; 0: before and after only
        "best": "heldout_loss",  # what tells the best checkpoint; a number that evaluations print
        "higher": False,  # whether more of it is better
        "patience": 0,  # evaluations in a row without a better one that end the run; 0: it goes on
    }
    config.checkpoint = {
        "every": 50,  # steps between checkpoints
        "keep": 2,  # the newest; the best is kept besides
    }
    config.log = {  # besides the run's own files and TensorBoard
        "wandb": "",  # a project of Weights & Biases
        "mlflow": "",  # an experiment of MLflow
    }
    config.guard = {
        "spike": 0.0,  # a loss this many deviations above the running mean is a spike; 0: none is
        "then": "stop",  # what to do about a spike, or a loss that is not a number: "stop", or "skip" the step
    }
    return config


def sft() -> Config:
    """Every setting of supervised fine-tuning; locked, so that a mistyped name is an error."""
    config = common()
    config.data = {
        "source": "",  # a file or folder, tfds:NAME?split=..., hf:NAME?split=..., reasoning_gym:TASK?parameter=...
        "prompt": "prompt",  # the source's name of this column
        "completion": "completion",  # the source's name of this column
        "columns": {name: name for name in formats.COLUMNS if name not in ("prompt", "completion")},  # and of these
        "mixture": (),  # more sources: (("b.jsonl", 0.5), ...) takes half as many rows of it as of the first
        "stream": False,  # read and tokenise while training, for more than memory holds
        "heldout": 64,  # examples to evaluate on, never trained on
        "heldout_source": "",  # where they are the first ones; empty: they are drawn from the source
        "length": 0,  # tokens in a row; 0: as many as the longest example has
        "truncate": False,  # cut longer examples instead of leaving them out
        "pack": False,  # several examples in a row
    }
    config.eval.update(
        {
            "sets": (),  # more held-out sources, each with its name: (("dev", "dev.jsonl"), ...)
            "answers": 64,  # held-out questions answered and compared word for word; 0: loss only
            "max_new": 32,  # tokens in an answer
            "batch_size": 32,  # questions answered at once
        }
    )
    return config.lock()


def check(config: Config) -> None:
    """Finds settings of supervised fine-tuning that cannot be meant.

    Raises:
      ValueError: naming the setting.
    """
    check_common(config)
    for name in ("data.heldout", "eval.max_new", "eval.batch_size"):
        if _get(config, name) < 1:
            raise ValueError(f"config.{name}={_get(config, name)} must be at least 1")
    if not config.data.source:
        raise ValueError("config.data.source is empty: give a file or folder, or reasoning_gym:TASK")


def check_common(config: Config) -> None:
    """Finds settings that cannot be meant among those that every trainer has.

    Raises:
      ValueError: naming the setting.
    """
    choices = {"dtype": ("", "float32", "bfloat16"), "optim.schedule": tuple(SCHEDULES), "method": tuple(METHODS)}
    choices |= {"remat": tuple(decoder.REMAT), "attention": ("auto", *kernels.KINDS)}
    choices |= {"quantize": ("", *FORMATS), "guard.then": ("stop", "skip"), "optim.mu_dtype": choices["dtype"]}
    for name, allowed in choices.items():
        if _get(config, name) not in allowed:
            raise ValueError(f"config.{name}={_get(config, name)!r} is not one of {', '.join(map(repr, allowed))}")
    if config.quantize and config.method == "full":
        raise ValueError("config.method='full' trains every parameter: these cannot be quantised")
    for name in ("steps", "batch_size", "accumulate", "checkpoint.every", "checkpoint.keep"):
        if _get(config, name) < 1:
            raise ValueError(f"config.{name}={_get(config, name)} must be at least 1")
    for name in ("optim.lr", "optim.clip", "optim.weight_decay", "eval.every", "eval.patience", "guard.spike"):
        if not _get(config, name) >= 0:
            raise ValueError(f"config.{name}={_get(config, name)} must be 0 or more")
    for name in ("optim.b1", "optim.b2"):
        if not 0 <= _get(config, name) < 1:
            raise ValueError(f"config.{name}={_get(config, name)} must be at least 0 and less than 1")
    trackers.check(config.log)
    profiling.steps(config.profile)
    if not 0 <= config.optim.warmup < config.steps:
        raise ValueError(f"config.optim.warmup={config.optim.warmup} must be less than config.steps={config.steps}")
    if config.batch_size % config.accumulate:
        raise ValueError(f"config.accumulate={config.accumulate} does not divide batch_size={config.batch_size}")
    placing.check(config)


def schedule(config: Config, rate: float) -> Callable[[Any], Any]:
    """The learning rate as a function of the number of updates made.

    It rises to `rate` with the last of `config.optim.warmup` updates, and then does what the schedule says.
    """
    warmup = config.optim.warmup
    after = SCHEDULES[config.optim.schedule](rate, config.steps - warmup)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(rate / warmup, rate, warmup - 1), after], [warmup])


def _get(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)
