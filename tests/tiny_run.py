"""Folders of runs as training leaves them, without the training."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import checkpoint
from train import config as settings
from train import loop, methods


def moved(tree, seed=3):
    """As training might leave it: what is trained is elsewhere, what is not is where it was."""
    mask = jax.tree.leaves(lora.trainable_mask(tree))
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    new = [
        jnp.array(x + 0.2 * rng.normal(size=x.shape), x.dtype) if m else x for x, m in zip(leaves, mask, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def write(folder, model, method="lora", rank=4, quantize="", **own):
    """A run of some steps; returns what it runs with: the base, what was trained, and the decoder's config."""
    config = settings.sft()
    config.model, config.method, config.data.source, config.quantize = str(model), method, "sums.jsonl", quantize
    config.lora.rank = rank
    config.lora.update(own)
    loaded = methods.load(config, jnp.dtype(loop.base_dtype()))
    base, start = methods.start(jax.random.key(config.seed), config, loaded)
    soft_or_full = method in (*methods.SOFT, "full")
    trained = jax.tree.map(lambda x: x + 0.1, start) if soft_or_full else moved(start)
    identity = {"base": checkpoint.fingerprint(loaded.params if base is None else base)}
    with checkpoint.Checkpoints(folder / "checkpoints", identity) as saved:
        saved.save(checkpoint.State(6, trained, {}, {}))
    loop.begin(folder, config.to_dict())
    lines = [{"step": 0, "heldout_loss": 3.5}, {"step": 6, "heldout_loss": 0.5}]
    (folder / loop.METRICS).write_text("".join(f"{line}\n".replace("'", '"') for line in lines))
    return base, trained, loaded.config
