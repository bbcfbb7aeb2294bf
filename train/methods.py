"""The methods of fine-tuning by name: what each trains, with which settings of its own, and how it runs the model."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax import soft
from lora_jax.adalora import adalora
from lora_jax.eva import eva
from lora_jax.interop import hf
from lora_jax.loftq import loftq
from lora_jax.models import decoder, kernels
from lora_jax.models.config import DecoderConfig
from train import placing

Tree = Any
Config = Any  # of train/config.py, which needs the names below
OUTPUTS = "o_proj|down_proj"  # Houlsby's places: behind the attention and behind the MLP


class Method(NamedTuple):
    """How a method differs from LoRA.

    Attributes:
      rate: its learning rate as a multiple of LoRA's.
      rule: fields of `lora.Rule`.
      rank: where `config.lora.rank` is 0; for prompts and prefixes, the trained tokens.
    """

    rate: float = 1.0
    rule: Mapping[str, Any] = {}
    rank: int = 16


METHODS = {
    "lora": Method(),
    "rslora": Method(1 / 3, rule={"rslora": True}),
    "lora+": Method(1 / 27),
    "lora-fa": Method(rule={"method": "lora-fa"}),
    "dora": Method(rule={"method": "dora"}),
    "pissa": Method(1 / 9, rule={"init": "pissa"}),
    "olora": Method(1 / 27, rule={"init": "olora"}),
    "eva": Method(1 / 9),
    "loftq": Method(),
    "adalora": Method(27.0, rule={"method": "adalora"}),
    "vera": Method(81.0, {"method": "vera"}, 256),
    "ia3": Method(9.0, {"method": "ia3", "target": "k_proj|v_proj|up_proj"}),
    "bottleneck": Method(rule={"method": "bottleneck", "target": OUTPUTS}),
    "norms": Method(3.0, rule={"method": "full", "target": "norm/scale$"}),
    "prompt": Method(27.0, rank=20),
    "prefix": Method(27.0, rank=20),
    "full": Method(1 / 30),
}
SOFT = ("prompt", "prefix")


def rate(config: Config, dim: int) -> float:
    """The learning rate: the one that is set, or the method's share of LoRA's at this width, 5e-4 · (2000/D)^0.781.

    Source: "LoRA Without Regret", the rule for Llamas.
    """
    return config.optim.lr or METHODS[config.method].rate * 5e-4 * (2000 / dim) ** 0.781


def spec(config: Config) -> lora.Spec:
    """The rules of a config's method."""
    method = METHODS[config.method]
    fields = {**config.lora, **{name: value for name, value in method.rule.items() if not config.lora.get(name)}}
    fields["rank"] = fields["rank"] or method.rank
    exclude, whole = fields.pop("exclude"), [lora.Rule(pattern, method="full") for pattern in fields.pop("also")]
    # A field that is not set is left to the rule, which refuses those that a method has no use for.
    known = {field.name: field.default for field in dataclasses.fields(lora.Rule)}
    fields = {name: value for name, value in fields.items() if value != "" and value != known[name]}
    uses = lora.spec.METHODS[fields.get("method", "lora")].uses
    if not config.lora.rank and "rank" not in uses:
        fields.pop("rank", None)
    return lora.Spec(*whole, lora.Rule(**fields), exclude=exclude)


def load(config: Config, dtype: jnp.dtype) -> hf.Checkpoint:
    """The base of a config, its linear weights quantised where that is asked for, on the mesh in context."""
    return hf.load(config.model, dtype, quantize=quantised(config), places=placing.base(config))


def quantised(config: Config) -> dict[str, str] | None:
    """Which weights of a base are quantised as it is read; None for none.

    LoftQ quantises it itself, when it knows what the adapters begin with.
    """
    return {"all-linear": config.quantize} if config.quantize and config.method != "loftq" else None


def attending(config: Config, model: hf.Checkpoint) -> hf.Checkpoint:
    """The model, its attention computed by what `config.attention` and the platform say; prints what and why."""
    dtype = jax.tree.leaves(model.params["final_norm"])[0].dtype
    given = config.attention, jax.default_backend(), model.config, dtype, config.method in SOFT
    kind, why = kernels.choose(*given)
    print(f"attention: {kind} ({why})")
    return dataclasses.replace(model, config=dataclasses.replace(model.config, attention=kind))


def once(config: Config, trainable: Tree, shape: DecoderConfig) -> bool:
    """Whether chunks of logits are computed once, and not again for gradients; prints so.

    An adapter of the head is trained through the head's product, which is then computed again.
    """
    if not config.loss_chunk:
        return False
    adapted = head_adapted(trainable, shape)
    how = f"computed again for gradients: {head(shape)} has an adapter" if adapted else "computed once"
    print(f"loss: logits of {config.loss_chunk} tokens at a time, {how}")
    return not adapted


def head_adapted(trainable: Tree, shape: DecoderConfig) -> bool:
    """Whether what is trained has an adapter of the head."""
    return isinstance(trainable, Mapping) and head(shape) in trainable


def head(shape: DecoderConfig) -> str:
    """The path of a decoder's head."""
    return "embed/embedding" if shape.tied else "head/kernel"


def start(
    key: jax.Array, config: Config, model: hf.Checkpoint, nll: Callable | None = None, batch: Tree = None
) -> tuple[Tree, Tree]:
    """What is trained, before it is.

    Args:
      key: a PRNG key.
      config: of the run.
      model: the base.
      nll: a function of parameters and a batch, for EVA; without it, and only if the values do not matter, EVA's
        adapters are as large as the spec's ranks.
      batch: what it calibrates on.

    Returns:
      The base (that of the model, but for LoftQ), and adapters, a prompt, a prefix, or all parameters in float32.
    """
    if config.method == "full":
        # A copy: what is trained is donated, and the base may be a teacher or a reference yet.
        return None, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), model.params)
    if config.method in SOFT:
        text = model.tokenizer.encode(config.soft_text, add_special_tokens=False).ids if config.soft_text else None
        given = key, model.params, model.config, tokens(config), text
        if config.method == "prompt":
            return model.params, soft.init_prompt(*given)
        return model.params, soft.init_prefix(*given, keys_values=lora.lift(decoder.keys_values))
    if config.method == "loftq":
        rules = {"all-linear": config.quantize or "nf4"}
        return loftq(key, model.params, sites(model), spec(config), rules)
    if config.method == "eva" and nll is not None:
        return model.params, eva(nll, model.params, batch, sites=sites(model), spec=spec(config))
    return model.params, lora.init(key, model.params, sites(model), spec(config))


def sites(model: hf.Checkpoint) -> lora.Sites:
    """How the decoder uses its weights."""
    return lora.trace(decoder.forward, model.params, *traced(model))


def traced(model: hf.Checkpoint) -> tuple[np.ndarray, DecoderConfig]:
    """What `decoder.forward` is traced with, besides parameters."""
    return np.zeros((1, 8), np.int32), model.config


def tokens(config: Config) -> int:
    """How many tokens a prompt or a prefix trains."""
    return config.lora.rank or METHODS[config.method].rank


def runner(config: Config, model: hf.Checkpoint) -> Callable[[Tree, Tree, jax.Array | None], Tree]:
    """Makes `tree(trainable, base, key)`: what a function that was `applied` takes as its parameters.

    The key, where there is one, turns dropout on.
    """
    if config.method == "full":
        dtype = jax.tree.leaves(model.params)[0].dtype
        return lambda trainable, base, key=None: jax.tree.map(lambda x: x.astype(dtype), trainable)
    if config.method in SOFT:
        lifted = lora.lift(decoder.keys_values)  # the base may be quantised
        return lambda trainable, base, key=None: soft.attach(base, trainable, model.config, config.remat, lifted)
    dropout = config.lora.dropout
    return lambda trainable, base, key=None: lora.attach(base, trainable, key if dropout else None)


def room(config: Config, shape: DecoderConfig) -> int:
    """Positions left for a text: a prompt and a prefix take some."""
    if config.method not in SOFT:
        return shape.context
    n = tokens(config)
    if n >= shape.context:
        raise ValueError(
            f"config.lora.rank={n}: that many trained tokens leave no room for a text in the {shape.context} "
            "positions that the model knows"
        )
    return shape.context - n


def applied(f: Callable) -> Callable:
    """A function of the decoder's parameters as one of what `runner` makes."""
    return soft.applied(lora.lift(f))


def optimizer(config: Config, trainable: Tree, rate: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Adam after clipping, or what a method makes of it; without state for what a method keeps frozen.

    Args:
      config: of the run.
      trainable: from `start`.
      rate: the learning rate as a function of the step.

    Returns:
      An optax transformation.
    """
    settings = config.optim
    adam = functools.partial(
        optax.adamw,
        b1=settings.b1,
        b2=settings.b2,
        mu_dtype=settings.mu_dtype or None,
        weight_decay=settings.weight_decay,
        mask=_decayed,
    )
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    return optax.chain(clip, _own(config, trainable, adam, rate))


def _own(config: Config, trainable: Tree, adam: Callable, rate: Callable[[Any], Any]) -> optax.GradientTransformation:
    if config.method == "full" or config.method in SOFT:
        return adam(rate)
    if config.method == "lora+":
        return lora.lora_plus(adam, rate, trainable)
    if config.method == "adalora":
        rank = max(1, 2 * (config.lora.rank or METHODS["adalora"].rank) // 3)
        begin = config.steps // 10
        return adalora(adam(rate), rank, begin, max(begin + 1, 7 * config.steps // 10))
    return lora.optimizer(adam(rate), lora.trainable_mask(trainable))


def _decayed(tree: Tree) -> Tree:
    """Marks what weight decay is for: factors and matrices, but not norms, biases, magnitudes and gains."""
    spared = re.compile(r"(scale|bias)\W*(\.value)?$|\.[mdel]$")
    return jax.tree_util.tree_map_with_path(lambda path, _: not spared.search(jax.tree_util.keystr(path)), tree)
