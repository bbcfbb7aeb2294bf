"""A Llama decoder: the modules of `modules.py`, used as pure functions of a nested dict of arrays.

Shapes: B batch, T time, S cache slots, N tokens of a prefix, D model, H query heads, K key/value heads, h head
dim, V vocabulary, L layers. The layers' parameters are stacked on a leading axis L and run by one scan.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import attention, kernels, partition, rope, varying
from lora_jax.models.config import DecoderConfig
from lora_jax.models.modules import Decoder
from lora_jax.models.remat import REMAT

Params = Any
Cache = dict[str, jax.Array]
KeysValues = attention.KeysValues


@functools.cache
def _graph(config: DecoderConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[0]


def init(key: jax.Array, config: DecoderConfig, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random parameters: a nested dict of arrays, the layers' stacked [L, ...]."""
    params = nnx.to_pure_dict(nnx.split(Decoder(config, nnx.Rngs(key)))[1])
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _model(params: Params, config: DecoderConfig) -> Decoder:
    """The module of some parameters, the kernels of its stacked projections flattened to matrices.

    A kernel reshaped inside the scan would be saved, layer by layer, for the backward pass.
    """
    L, D = config.layers, config.dim
    layers = dict(params["layers"])
    into, out = (L, D, -1), (L, -1, D)
    for name, shape in {"q_proj": into, "k_proj": into, "v_proj": into, "o_proj": out}.items():
        layers[name] = {**layers[name], "kernel": layers[name]["kernel"].reshape(shape)}
    return nnx.merge(_graph(config), {**params, "layers": layers})


def hidden(
    params: Params,
    tokens_BT: jax.Array,
    config: DecoderConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    remat: str = "none",
    prefix: KeysValues | None = None,
) -> jax.Array:
    """The decoder up to its head.

    Args:
      params: nested dict of arrays as `init` makes it.
      tokens_BT: token ids.
      config: the decoder's shape.
      positions_BT: rotary positions; 0, 1, 2, ... in each row if None.
      segments_BT: tokens see earlier tokens of their own segment only; one segment per row if None.
      remat: "none" keeps what the backward pass needs, "full" recomputes each layer from its input,
        "dots" keeps the results of products only, "offload" keeps them and each layer's input in the host's memory.
      prefix: keys and values [L, N, K, h], as `keys_values` gives them, of N tokens before every segment of every
        row; `positions_BT` is counted from the end of the prefix.

    Returns:
      hidden_BTD, normalised, in the dtype of the embedding.

    Raises:
      ValueError: an unknown `remat`, or a prefix that does not fit the decoder or leaves too little of its context.
    """
    model = _model(params, config)
    _check(prefix, config, tokens_BT.shape[1] if positions_BT is None else 0)
    x_BTD = _looked_up(model, tokens_BT, config)
    x_BTD = _layers(model, x_BTD, config, positions_BT, segments_BT, remat, prefix)[0]
    return partition.rows(model.final_norm(x_BTD))


def _looked_up(model: Decoder, tokens_BT: jax.Array, config: DecoderConfig) -> jax.Array:
    return partition.rows(_embedded(partition.table(model.embed.embedding[...])[tokens_BT], config))


def _embedded(x: jax.Array, config: DecoderConfig) -> jax.Array:
    return x if config.embed_scale == 1 else config.embed_scale * x


def keys_values(params: Params, x_ND: jax.Array, config: DecoderConfig, remat: str = "none") -> KeysValues:
    """What later tokens see of N tokens: the rotated keys and the values of each layer.

    Args:
      params: nested dict of arrays as `init` makes it.
      x_ND: the tokens, as rows of the embedding or vectors in place of them, at positions 0 to N - 1.
      config: the decoder's shape.
      remat: as `hidden`.

    Returns:
      Keys and values, each [L, N, K, h], in the dtype of the embedding: a `prefix` for texts that begin with them.
    """
    model = _model(params, config)
    x_BTD = _embedded(x_ND[None].astype(model.embed.embedding[...].dtype), config)
    _, (k_LBNKh, v_LBNKh) = _layers(model, x_BTD, config, None, None, remat, None, keep=True)
    return k_LBNKh[:, 0], v_LBNKh[:, 0]


def _layers(model, x_BTD, config, positions_BT, segments_BT, remat, prefix, keep=False) -> tuple[jax.Array, Any]:
    """The residual stream after the last layer and, to `keep`, the keys and values of every layer."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} is not one of: {', '.join(REMAT)}")
    B, T, _ = x_BTD.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    positions_BT = _shifted(positions_BT, prefix)
    angles = rope.rotary(positions_BT, config)
    layer_graph, layers = nnx.split(model.layers)

    def body(x_BTD, xs):
        layer, own, prefix_NKh = xs
        window = own.get("window", config.window)
        apart_BT = varying.segments(own, config, segments_BT, positions_BT)
        x_BTD = checkpoint_name(x_BTD, "layer")

        def attend(q, k, v):
            return _mixed(q, k, v, apart_BT, prefix_NKh, window, config), (k, v) if keep else None

        x_BTD, kept = nnx.merge(layer_graph, layer)(x_BTD, varying.angles(own, angles), attend)
        return partition.rows(x_BTD), kept

    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x_BTD, (layers, varying.numbers(config), prefix))


def _mixed(q_BTHh, k_BTKh, v_BTKh, segments_BT, prefix_NKh, window, config: DecoderConfig) -> jax.Array:
    """Attention [N, H·h], by what the config says; what the backward pass wants of it has the name "kept"."""
    if config.attention == "splash":  # whose kernel has named it
        given = q_BTHh, k_BTKh, v_BTKh, segments_BT, window, config.attn_scale, config.attn_cap
        return kernels.splash(*given).reshape(-1, config.heads * config.head_dim)
    if config.attention == "cudnn":
        mixed_BTHh = kernels.cudnn(q_BTHh, k_BTKh, v_BTKh, segments_BT, window, config.attn_scale)
    else:
        given = q_BTHh, k_BTKh, v_BTKh, segments_BT, prefix_NKh, window
        mixed_BTHh = attention.causal(*given, config.attn_scale, config.attn_cap)
    # As a matrix: a TPU fills a last axis up to 128.
    return checkpoint_name(mixed_BTHh.reshape(-1, config.heads * config.head_dim), "kept")


def _shifted(positions_BT: jax.Array, prefix: KeysValues | None) -> jax.Array:
    return positions_BT if prefix is None else positions_BT + prefix[0].shape[1]


def _check(prefix: KeysValues | None, config: DecoderConfig, room: int) -> None:
    if prefix is None:
        return
    shapes, N = [x.shape for x in prefix], prefix[0].shape[1]
    want = (config.layers, N, config.kv_heads, config.head_dim)
    if shapes != [want, want]:
        raise ValueError(f"prefix: keys {shapes[0]} and values {shapes[1]} do not fit this decoder: each is {want}")
    if N + room > config.context:
        raise ValueError(
            f"a prefix of {N} and {room} tokens of text are more than the {config.context} positions of this decoder"
        )


def head(params: Params, hidden_BTD: jax.Array, config: DecoderConfig) -> jax.Array:
    """Logits [..., V] of hidden states [..., D], float32."""
    if config.tied:
        kernel, axis = params["embed"]["embedding"], 1
    else:
        kernel, axis = params["head"]["kernel"], 0
    logits_BTV = jax.lax.dot_general(
        hidden_BTD,
        kernel.astype(hidden_BTD.dtype),
        (((hidden_BTD.ndim - 1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if config.logit_scale != 1:
        logits_BTV = config.logit_scale * logits_BTV
    return attention.capped(logits_BTV, config.logit_cap)


def forward(
    params: Params,
    tokens_BT: jax.Array,
    config: DecoderConfig,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    remat: str = "none",
    prefix: KeysValues | None = None,
) -> jax.Array:
    """logits_BTV, float32: `head(hidden(...))`, with the arguments of `hidden`."""
    return head(params, hidden(params, tokens_BT, config, positions_BT, segments_BT, remat, prefix), config)


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """An empty key/value cache of `slots` tokens per row."""
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "positions": jnp.full((batch, slots), -1, jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }


def forward_with_cache(
    params: Params,
    tokens_BT: jax.Array,
    config: DecoderConfig,
    positions_BT: jax.Array,
    cache: Cache,
    prefix: KeysValues | None = None,
) -> tuple[jax.Array, Cache]:
    """Appends tokens to a cache and predicts what follows each row's last one.

    Args:
      params: nested dict of arrays as `init` makes it.
      tokens_BT: the next T tokens of every row.
      config: the decoder's shape.
      positions_BT: their positions in the row's text; -1 marks padding, which no token sees.
      cache: from `init_cache` or the previous call; the caller sees to it that T slots are left.
      prefix: as `hidden`, the same in every call; it takes no slots.

    Returns:
      logits_BV, float32, for the token after the one with the largest position, and the new cache.

    Raises:
      ValueError: a prefix that does not fit the decoder, or with the slots is longer than its context.
    """
    T = tokens_BT.shape[1]
    model = _model(params, config)
    _check(prefix, config, cache["positions"].shape[1])
    angles = rope.rotary(_shifted(positions_BT, prefix), config)
    start = cache["length"]
    positions_BS = jax.lax.dynamic_update_slice(cache["positions"], positions_BT, (0, start))
    mask_BTS = (positions_BS >= 0)[:, None, :] & (positions_BS[:, None, :] <= positions_BT[:, :, None])
    layer_graph, layers = nnx.split(model.layers)

    def body(carry, xs):
        x_BTD, k_LBKSh, v_LBKSh = carry
        layer, index, own, prefix_NKh = xs
        window, chunk = own.get("window", config.window), own.get("chunk", config.chunk)
        seen_BTS = mask_BTS
        if window is not None:
            seen_BTS = seen_BTS & (positions_BT[:, :, None] - positions_BS[:, None, :] < window)
        if chunk is not None:
            piece_BT, piece_BS = (_shifted(x, prefix) // chunk for x in (positions_BT, positions_BS))
            seen_BTS = seen_BTS & (piece_BT[:, :, None] == piece_BS[:, None, :])

        def written(cache_LBKSh, x_BTKh):
            x_LBKTh = x_BTKh.swapaxes(1, 2)[None].astype(cache_LBKSh.dtype)
            return jax.lax.dynamic_update_slice(cache_LBKSh, x_LBKTh, (index, 0, 0, start, 0))

        def attend(q, k, v):
            # The whole cache is carried and written in place: as scanned outputs it would be copied.
            new_k, new_v = written(k_LBKSh, k), written(v_LBKSh, v)
            seen = new_k[index], new_v[index], seen_BTS, prefix_NKh
            return attention.masked(q, *seen, config.attn_scale, config.attn_cap), (new_k, new_v)

        x_BTD, (new_k, new_v) = nnx.merge(layer_graph, layer)(x_BTD, varying.angles(own, angles), attend)
        return (partition.rows(x_BTD), new_k, new_v), None

    carry = (_looked_up(model, tokens_BT, config), cache["k"], cache["v"])
    (x_BTD, k, v), _ = jax.lax.scan(body, carry, (layers, jnp.arange(config.layers), varying.numbers(config), prefix))
    last_B = jnp.argmax(positions_BT, axis=1)
    x_BD = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)[:, 0]
    logits_BV = head(params, model.final_norm(x_BD), config)
    return logits_BV, {"k": k, "v": v, "positions": positions_BS, "length": start + T}
