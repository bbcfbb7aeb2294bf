"""What a decoder is made of, and how a Hugging Face `config.json` says it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.models import families, scaling


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; hashable, so that jitted functions can take it as a static argument.

    Attributes:
      family: name of its table in `keys.FAMILIES`.
      vocab, dim, hidden, layers, heads, kv_heads, head_dim: the sizes V, D, F, L, H, K, h.
      context: positions it was trained on.
      norm_eps: added to the mean square in the norms.
      rope_base: base of the geometric series of rotary frequencies.
      rope_neighbours: numbers (0, 1), (2, 3), ... of a head are rotary pairs; else those of its two halves.
      rope_factors: what each rotary frequency is divided by; None for no scaling.
      tied: the head is the transposed embedding.
      rotary_dim: how many of a head's numbers are rotated; None for all.
      rope_scale: multiplies what is rotated.
      rope_stretch: stretches the series of frequencies over texts longer than the context; None for no stretching.
      rope_long_factors, rope_original: the factors for texts longer than `rope_original`; None for the same ones.
      local_rope_base: base for the sliding layers, whose frequencies are not scaled; None for no difference.
      unrotated: for every layer whether it rotates nothing; () for none that does.
      window: the last tokens, itself included, that a token sees; None for all.
      sliding: for every layer whether it has the window; () for all.
      chunk: texts are cut after so many tokens each, and no token sees another piece; None for whole texts.
      chunked: for every layer whether it cuts them; () for all.
      query_growth: (n, s): what rotates nothing multiplies queries of position t by 1 + s·log(1 + ⌊(t+1)/n⌋), or None.
      qkv_bias, o_bias, mlp_bias: which projections add a bias.
      qk_norm: queries and keys are normalised: "head" each head by itself, "all" all heads as one, "rotated" each head
        by itself, without a scale, after it was rotated, where it is; None for not.
      pre_norm, post_norm: attention and MLP have a norm before, and after them.
      norm_offset: added to the scale of every norm.
      activation: of the MLP's gate, a name of `modules.ACTIVATIONS`.
      embed_scale, residual_scale, logit_scale: multiply the embedded tokens, what attention and MLP add to the
        residual stream, and the logits.
      attn_scale: multiplies the scores; None for 1/√h.
      attn_cap, logit_cap: c·tanh(x/c) of scores and logits; None for no cap.
      experts, active_experts: MLPs of a layer, and how many of them a token goes through; 0 for one MLP.
      normalised_experts: the weights of a token's experts add up to 1.
      router: what makes weights of its scores, a name of `moe.WEIGHTS`.
      weighted_inputs: weights multiply what experts are given; else what they give.
      shared_experts: as many more that every token goes through: one MLP, that many times as wide; 0 for none.
      shared_gate: what that gives is multiplied by the sigmoid of a score of the token's.
      attention: what computes it, of `kernels.KINDS`; no part of the model.
    """

    family: str
    vocab: int
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_neighbours: bool = False
    rope_factors: tuple[float, ...] | None = None
    tied: bool = False
    rotary_dim: int | None = None
    rope_scale: float = 1.0
    rope_stretch: float | None = None
    rope_long_factors: tuple[float, ...] | None = None
    rope_original: int | None = None
    local_rope_base: float | None = None
    unrotated: tuple[bool, ...] = ()
    window: int | None = None
    sliding: tuple[bool, ...] = ()
    chunk: int | None = None
    chunked: tuple[bool, ...] = ()
    query_growth: tuple[float, float] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attn_scale: float | None = None
    attn_cap: float | None = None
    logit_cap: float | None = None
    experts: int = 0
    active_experts: int = 0
    normalised_experts: bool = True
    router: str = "softmax"
    weighted_inputs: bool = False
    shared_experts: int = 0
    shared_gate: bool = False
    attention: str = "chunked"

    @property
    def untied(self) -> bool:
        """The head has a matrix of its own."""
        return not self.tied


def from_hf(config: Mapping[str, Any], source: str = "config.json") -> DecoderConfig:
    """Reads the fields of a Hugging Face `config.json`.

    Args:
      config: the parsed JSON.
      source: path named in error messages.

    Returns:
      The decoder's shape.

    Raises:
      ValueError: a field is missing, or asks for something this decoder does not compute.
    """
    family = config.get("model_type")
    if family not in families.UNSAID:
        known = ", ".join(families.UNSAID)
        raise ValueError(f"{source}: model_type {family!r} is not supported; use one of: {known}")
    unsaid = families.UNSAID[family]
    config = {**unsaid.defaults, **config}
    try:
        heads, dim = config["num_attention_heads"], config["hidden_size"]
        read = DecoderConfig(
            family=family,
            vocab=config["vocab_size"],
            dim=dim,
            hidden=config.get("moe_intermediate_size") or config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or dim // heads,
            context=config["max_position_embeddings"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
            activation=_activation(config, unsaid.activations, source),
            **_rope(config, source),
            **_window(config, source),
            **_chunks(config, source),
            **_scales(config, unsaid.scaled_embedding),
            **(_biases(config) | _norms(config) | _experts(config, source) | unsaid.properties),
        )
    except KeyError as missing:
        raise ValueError(f"{source}: the field {missing} is missing; is this a model's config.json?") from None
    return checked(read, source)


def checked(config: DecoderConfig, source: str) -> DecoderConfig:
    """The config, if its sizes are whole numbers and fit together.

    Raises:
      ValueError: they do not.
    """
    for name in ("vocab", "dim", "hidden", "layers", "heads", "kv_heads", "head_dim"):
        if type(size := getattr(config, name)) is not int or size < 1:
            raise ValueError(f"{source}: the model's {name} is {size!r}, and should be a whole number from 1 on")
    if config.heads % config.kv_heads:
        raise ValueError(f"{source}: {config.heads} query heads cannot share {config.kv_heads} key/value heads")
    if config.active_experts > config.experts:
        raise ValueError(f"{source}: a token cannot go through {config.active_experts} of {config.experts} experts")
    for name in ("sliding", "chunked", "unrotated"):
        if len(getattr(config, name)) not in (0, config.layers):
            raise ValueError(f"{source}: {len(getattr(config, name))} layers are said to be {name} of {config.layers}")
    return config


def _activation(config: Mapping[str, Any], known: Mapping[str, str], source: str) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name not in known:
        raise ValueError(f"{source}: activation {name!r} is not supported, only {' or '.join(known)}")
    return known[name]


def _biases(config: Mapping[str, Any]) -> dict[str, Any]:
    attention = bool(config.get("attention_bias"))
    qkv = bool(config.get("qkv_bias", attention))
    return {"qkv_bias": qkv, "o_bias": attention, "mlp_bias": bool(config.get("mlp_bias"))}


def _norms(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": "rotated"} if config.get("use_qk_norm") else {}


def _experts(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    count = config.get("num_local_experts") or config.get("num_experts")
    if not count:
        return {}
    layers = range(config["num_hidden_layers"])
    every = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or 1
    dense, sparse = config.get("mlp_only_layers") or [], config.get("moe_layers")
    if sparse is None:
        sparse = [i for i in layers if i not in dense and (i + 1) % every == 0]
    dense = [i for i in layers if i not in sparse]
    if dense:
        raise ValueError(f"{source}: layers {dense} are without experts, which is not supported where others have them")
    hidden = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared = config.get("shared_expert_intermediate_size") or 0
    if shared % hidden:
        raise ValueError(f"{source}: shared_expert_intermediate_size {shared} is no multiple of the experts' {hidden}")
    return {
        "experts": count,
        "active_experts": config["num_experts_per_tok"],
        "normalised_experts": bool(config.get("norm_topk_prob", True)),
        "shared_experts": shared // hidden,
    }


def _scales(config: Mapping[str, Any], scaled_embedding: bool) -> dict[str, Any]:
    squared = config.get("query_pre_attn_scalar")
    growth = (config["floor_scale"], config["attn_scale"]) if config.get("attn_temperature_tuning") else None
    embed = config["hidden_size"] ** 0.5 if scaled_embedding else config.get("embedding_multiplier", 1.0)
    return {
        "embed_scale": float(embed),
        "residual_scale": float(config.get("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / config.get("logits_scaling", 1.0),
        "attn_scale": squared**-0.5 if squared else config.get("attention_multiplier"),
        "query_growth": growth,
        "attn_cap": config.get("attn_logit_softcapping"),
        "logit_cap": config.get("final_logit_softcapping"),
    }


def _rope(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local_base = config.get("rope_local_base_freq")
    if "full_attention" in rope:  # one entry for each kind of layer
        local, rope = rope.get("sliding_attention") or {}, rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"{source}: rope type {local['rope_type']!r} of sliding layers is not supported")
        local_base = local.get("rope_theta", local_base)
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    context = config["max_position_embeddings"]
    if config.get("original_max_position_embeddings"):
        rope = {**rope, "original_max_position_embeddings": config["original_max_position_embeddings"]}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * part)
    return {
        "rope_base": base,
        "rotary_dim": None if dim == head_dim else dim,
        "local_rope_base": local_base,
        "unrotated": _unrotated(config),
        **scaling.read(rope, base, dim, context, source),
    }


def _unrotated(config: Mapping[str, Any]) -> tuple[bool, ...]:
    layers, every = config["num_hidden_layers"], config.get("no_rope_layer_interval")
    rotated = config.get("no_rope_layers") or [not every or (i + 1) % every for i in range(layers)]
    return tuple(not r for r in rotated) if not all(rotated) else ()


def _chunks(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Which layers cut the text: those that rotate, unless it is said."""
    size, layers = config.get("attention_chunk_size"), config["num_hidden_layers"]
    if size is None:
        return {}
    if types := config.get("layer_types"):
        _check_types(types, "chunked_attention", source)
        chunked = tuple(kind == "chunked_attention" for kind in types)
    else:
        chunked = tuple(not unrotated for unrotated in _unrotated(config) or (False,) * layers)
    if not any(chunked):
        return {}
    return {"chunk": size, "chunked": () if all(chunked) else chunked}


def _check_types(types: Sequence[str], local: str, source: str) -> None:
    if unknown := set(types) - {local, "full_attention"}:
        raise ValueError(f"{source}: layer_types {', '.join(sorted(unknown))} is not supported")


def _window(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Which layers are sliding, by the most explicit of the fields that say so."""
    if config.get("use_bidirectional_attention"):
        raise ValueError(f"{source}: use_bidirectional_attention is not supported: tokens see earlier tokens only")
    width, layers = config.get("sliding_window"), config["num_hidden_layers"]
    if width is None or not config.get("use_sliding_window", True):
        return {}
    if types := config.get("layer_types"):
        _check_types(types, "sliding_attention", source)
        sliding = tuple(kind == "sliding_attention" for kind in types)
    elif every := config.get("sliding_window_pattern"):
        sliding = tuple((i + 1) % every != 0 and i < config.get("max_window_layers", layers) for i in range(layers))
    elif unrotated := _unrotated(config):
        sliding = unrotated
    else:
        sliding = tuple(i >= config.get("max_window_layers", 0) for i in range(layers))
    if not any(sliding):
        return {}
    return {"window": width, "sliding": () if all(sliding) else sliding}
