"""Causal attention by kernels of the platform: splash attention on TPU, cuDNN's on GPU.

Neither keeps scores in memory. Shapes: B batch, T tokens, H query heads, K key/value heads, h head dim.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lora_jax.models.config import DecoderConfig

KINDS = ("chunked", "splash", "cudnn")
OF_PLATFORM = {"tpu": "splash", "gpu": "cudnn"}
LANES = 128  # splash works on multiples of these
LARGEST = 512  # tokens in a block of splash's
ROWS = ("data", "fsdp", "expert")  # axes of a mesh along which rows are divided


def choose(asked: str, platform: str, config: DecoderConfig, dtype: jnp.dtype, prefix: bool = False) -> tuple[str, str]:
    """What computes the attention.

    Args:
      asked: one of `KINDS`, or "auto": the platform's own kernel where it can, "chunked" elsewhere.
      platform: "cpu", "gpu" or "tpu".
      config: the decoder's shape.
      dtype: of the activations.
      prefix: whether keys and values come before the text.

    Returns:
      One of `KINDS`, and why.

    Raises:
      ValueError: what was asked for does not exist, or cannot be done here.
    """
    if asked not in ("auto", *KINDS):
        raise ValueError(f"attention={asked!r} is not one of: auto, {', '.join(KINDS)}")
    own = OF_PLATFORM.get(platform, "chunked")
    kind = own if asked == "auto" else asked
    if kind == "chunked":
        return kind, "as asked for" if asked == kind else f"there is no kernel for {platform}"
    why = f"there is no {kind} on {platform}" if kind != own else _refusal(kind, config, dtype, prefix)
    if not why:
        return kind, f"the kernel for {platform}"
    if asked != "auto":
        raise ValueError(f"attention={asked!r}: {why}; 'auto' and 'chunked' do without")
    return "chunked", f"not {kind}: {why}"


def _refusal(kind: str, config: DecoderConfig, dtype: jnp.dtype, prefix: bool) -> str:
    if prefix:
        return "a prompt or a prefix comes before the text"
    if config.sliding:
        return "layers differ in their window"
    if kind == "cudnn" and config.attn_cap is not None:
        return "cuDNN has no cap of scores"
    if kind == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        return f"cuDNN has no {jnp.dtype(dtype).name}"
    if kind == "cudnn" and (config.head_dim % 8 or config.head_dim > LANES):
        return f"cuDNN has no heads of {config.head_dim} numbers"
    return ""


def splash(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, with the arguments of `attention.causal`; blocks of scores that no token sees are left out.

    On a mesh in context every device has its rows, and its heads where "tensor" divides them.

    Args:
      q_BTHh, k_BTKh, v_BTKh: queries, keys and values.
      segments_BT: segment ids; None for one segment per row.
      window: the last tokens that a query sees, itself included; None for all.
      scale, cap: as `attention.masked`.
      interpret: runs the kernel as plain operations, for devices that are no TPU.

    Returns:
      [B, T, H, h] in the dtype of the queries.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # half a second, of use on TPU alone

    T, h = q_BTHh.shape[1], q_BTHh.shape[-1]
    q_BTHh = q_BTHh * (h**-0.5 if scale is None else scale)
    if segments_BT is None:
        segments_BT = jnp.zeros(q_BTHh.shape[:2], jnp.int32)
    fill = -T % LANES  # what fills the last block comes after every query: none sees it

    def filled(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))

    def attend(q_BTHh, k_BTKh, v_BTKh, segments_BT):
        tokens, heads = q_BTHh.shape[1:3]
        shape = (tokens, tokens)
        causal = splash_attention.CausalMask(shape)
        mask = causal if window is None else splash_attention.LocalMask(shape, (window - 1, 0), 0)
        n = next(size for size in range(min(LARGEST, tokens), 0, -LANES) if tokens % size == 0)
        blocks = splash_attention.BlockSizes(
            block_q=n, block_kv=n, block_q_dkv=n, block_kv_dkv=n, block_q_dq=n, block_kv_dq=n
        )
        kernel: Any = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            attn_logits_soft_cap=cap,
            residual_checkpoint_name="kept",
            interpret=interpret,
        )
        q_BHTh, k_BKTh, v_BKTh = (x.swapaxes(1, 2) for x in (q_BTHh, k_BTKh, v_BTKh))
        segments = splash_attention.SegmentIds(segments_BT, segments_BT)
        return jax.vmap(kernel)(q_BHTh, k_BKTh, v_BKTh, segments).swapaxes(1, 2)

    mixed_BTHh = _divided(attend, *map(filled, (q_BTHh, k_BTKh, v_BTKh, segments_BT)))
    return mixed_BTHh[:, :T].astype(q_BTHh.dtype)


def _divided(attend: Callable, *arrays: jax.Array) -> jax.Array:
    """`attend` on every device's part of the arrays: XLA cannot divide a kernel itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {name for name, kind in kinds if kind == AxisType.Auto}
    free = [name for name in mesh.axis_names if name in auto and mesh.shape[name] > 1]
    if not free:
        return attend(*arrays)
    rows = tuple(name for name in free if name in ROWS)
    if arrays[0].shape[0] % math.prod(mesh.shape[name] for name in rows):
        rows = ()
    heads = "tensor" if "tensor" in free and arrays[1].shape[2] % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(rows, None, heads)
    specs = (spec, spec, spec, PartitionSpec(rows))
    return jax.shard_map(attend, in_specs=specs, out_specs=spec, axis_names=auto, check_vma=False)(*arrays)


def cudnn(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segments_BT: jax.Array | None,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """cuDNN's flash attention, with the arguments of `attention.causal`.

    Segments are kept apart by a mask [B, 1, T, T], the same for all heads.

    Args:
      q_BTHh, k_BTKh, v_BTKh: queries, keys and values, of 16 bits a number.
      segments_BT: segment ids; None for one segment per row.
      window: the last tokens that a query sees, itself included; None for all.
      scale: in place of 1/√h.

    Returns:
      [B, T, H, h] in the dtype of the queries.
    """
    T = q_BTHh.shape[1]

    def even(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, T % 2)] + [(0, 0)] * (x.ndim - 2))  # what cuDNN wants; no query sees it

    mask = None
    if segments_BT is not None:
        segments_BT = even(segments_BT)
        mask = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    mixed_BTHh = jax.nn.dot_product_attention(
        *map(even, (q_BTHh, k_BTKh, v_BTKh)),
        mask=mask,
        is_causal=True,
        scale=scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed_BTHh[:, :T]
