"""Prompts and prefixes in PEFT's files: one table, a row for each trained token."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.peft_config import Settings
from lora_jax.interop.peft_file import File
from lora_jax.models.config import DecoderConfig
from lora_jax.soft import Prefix, Prompt

TABLE = "prompt_embeddings"


def read(settings: Settings, file: File, config: DecoderConfig) -> Prompt | Prefix:
    """What a file of a prompt or a prefix holds.

    Raises:
      ValueError: it is not of the size that the config and this decoder ask for.
    """
    n = settings.number("num_virtual_tokens", 1)
    L, K, h = config.layers, config.kv_heads, config.head_dim
    prompt = settings.kind == "PROMPT_TUNING"
    file.check({TABLE: [n, config.dim if prompt else 2 * L * K * h]})
    table = file.tensor(TABLE)
    if prompt:
        return Prompt(jnp.array(table))
    k, v = table.reshape(n, L, 2, K, h).transpose(2, 1, 0, 3, 4)
    return Prefix(jnp.array(k), jnp.array(v))


def write(trained: Prompt | Prefix, config: DecoderConfig) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensor of a prompt or a prefix, and what the config says of it.

    Raises:
      ValueError: it does not fit the decoder.
    """
    L, K, h = config.layers, config.kv_heads, config.head_dim
    if isinstance(trained, Prompt):
        table, width = np.asarray(trained.vectors, np.float32), config.dim
        kind: dict[str, Any] = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": config.dim}
        kind |= {"num_attention_heads": config.heads}
    else:
        k_v = np.stack([np.asarray(x, np.float32) for x in (trained.k, trained.v)])
        table, width = k_v.transpose(2, 1, 0, 3, 4).reshape(k_v.shape[2], -1), 2 * L * K * h
        kind = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "token_dim": K * h}
        kind |= {"num_attention_heads": K, "encoder_hidden_size": K * h}
    if table.shape[1:] != (width,):
        raise ValueError(f"the prompt or prefix is {list(table.shape)} as a table, should be [N, {width}]")
    sizes = {"num_virtual_tokens": len(table), "num_layers": L, "num_transformer_submodules": 1}
    return {TABLE: np.ascontiguousarray(table)}, {**kind, **sizes}
