"""Makes a small model for one task: `python -m train.fresh --config=configs/rl_base.py`.

Random weights and a tokenizer of the task's prompts, then supervised fine-tuning of every parameter. A share of the
answers that it is taught are in quotation marks, which the task does not want: it can do the task, but mostly not in
the form that is asked, a beginning for reinforcement learning. What comes out is a folder as `transformers` has them,
`RUN/model`. The same command, run again, goes on where it stopped.
"""

import itertools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from ml_collections import ConfigDict

from lora_jax import checkpoint
from lora_jax.data import kinds, sources
from lora_jax.interop import hf, safetensors
from lora_jax.models import config as configs
from lora_jax.models import decoder
from train import config as settings
from train import launch, loop, sft

END = "<|endoftext|>"
TAUGHT = "taught.jsonl"
_BYTES = {name: i for i, name in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}


def main(_: list[str]) -> None:
    """Reads the command line and makes the model."""
    config, name = launch.settings(sft.CONFIG)
    make(config, Path(config.run or f"runs/{name}"), name)


def make(config: settings.Config, folder: Path, name: str) -> Path:
    """Makes the model, as far as it is not made yet.

    Args:
      config: `model`, arguments of `write`; `sft`, settings of supervised fine-tuning; `quoted`, the share of answers
        that are taught in quotation marks.
      folder: of the run.
      name: of the experiment, for the report.

    Returns:
      The folder of the model.

    Raises:
      ValueError, OSError, ArithmeticError: with one line that says what to change.
    """
    fresh, model = folder / "fresh", folder / "model"
    if (model / "config.json").is_file():
        print(f"{model}: is there already")
        return model
    if not (fresh / "config.json").is_file():
        tasks = sources.load(config.sft.data.source, config.sft.data.columns, kinds.Task)
        fresh.mkdir(parents=True, exist_ok=True)
        loop.write(fresh / TAUGHT, "".join(map(_line, lessons(tasks, config.quoted, config.sft.seed))))
        write(fresh, [task.messages[-1]["content"] for task in tasks], **config.model)
    one = ConfigDict({**config.sft.to_dict(), "model": str(fresh), "method": "full"})
    one.data.source = str(fresh / TAUGHT)
    sft.train(one, folder, name)
    start = hf.load(fresh)
    params = checkpoint.load(folder / "checkpoints", start.params, checkpoint.fingerprint(start.params))
    safetensors.save(model, start.config, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params))
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):  # with the last one the folder is a model
        shutil.copyfile(fresh / file, model / file)
    print(f"{model}: written")
    return model


def lessons(tasks: Sequence[kinds.Task], quoted: float, seed: int) -> list[dict[str, str]]:
    """Prompts and completions, of which a share, drawn by the seed, is in quotation marks."""
    drawn = random.Random(seed)
    marks = ['"' if drawn.random() < quoted else "" for _ in tasks]
    return [
        {"prompt": task.messages[-1]["content"], "completion": f"{mark}{task.answer}{mark}"}
        for task, mark in zip(tasks, marks, strict=True)
    ]


def _line(lesson: dict[str, str]) -> str:
    return json.dumps(lesson) + "\n"


def tokenizer(prompts: Sequence[str]) -> tokenizers.Tokenizer:
    """Every byte a token, and what all prompts begin with, their instruction, one more."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=_BYTES, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END])
    first, last = min(prompts), max(prompts)  # all prompts begin with what these two have in common
    pairs = zip(first, last, strict=False)
    if instruction := "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)):
        made.add_tokens([instruction])
    return made


def write(
    folder: Path,
    prompts: Sequence[str],
    *,
    dim: int,
    layers: int,
    heads: int,
    context: int = 128,
    seed: int = 0,
) -> None:
    """Writes a random Llama and its tokenizer as a Hugging Face folder, without a chat template.

    Args:
      folder: made if it is missing.
      prompts: for the tokenizer.
      dim, layers, heads: D, L, H; D/H to a head, and 3 D in the MLP.
      context: positions.
      seed: of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer(prompts)
    made.save(str(folder / "tokenizer.json"))
    values = {
        "model_type": "llama",
        "vocab_size": made.get_vocab_size(),
        "hidden_size": dim,
        "intermediate_size": 3 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    config = configs.from_hf(values)
    safetensors.save(folder, config, decoder.init(jax.random.key(seed), config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (folder / "config.json").write_text(json.dumps(values, indent=1))  # last: with it the folder is a model


if __name__ == "__main__":
    launch.run(main)
