"""How a Hugging Face config scales rotary frequencies, as fields of `DecoderConfig`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

Fields = dict[str, Any]


def read(rope: Mapping[str, Any], base: float, dim: int, context: int, source: str) -> Fields:
    """The fields that a `rope_parameters` entry stands for.

    Args:
      rope: the entry.
      base: of the geometric series of frequencies.
      dim: rotated numbers of a head; it has dim/2 frequencies.
      context: `max_position_embeddings`.
      source: path named in error messages.

    Returns:
      Values of the fields `rope_*` of `DecoderConfig`, those that differ from no scaling.

    Raises:
      ValueError: an unknown kind of scaling, or factors that do not fit.
      KeyError: a missing field.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {}
    if "short_factor" in rope:  # older files call it su or yarn
        kind = "longrope"
    if kind not in KINDS:
        known = ", ".join(["default", *KINDS])
        raise ValueError(f"{source}: rope type {kind!r} is not supported; use one of: {known}")
    fields = KINDS[kind](rope, base, dim, context)
    for name in ("rope_factors", "rope_long_factors"):
        if name in fields and len(fields[name]) != dim // 2:
            raise ValueError(f"{source}: {len(fields[name])} {name} of rope type {kind!r} for {dim // 2} frequencies")
    return fields


def _linear(rope, base, dim, context) -> Fields:
    return {"rope_factors": (float(rope["factor"]),) * (dim // 2)}


def _dynamic(rope, base, dim, context) -> Fields:
    return {"rope_stretch": float(rope["factor"])}


def _llama3(rope, base, dim, context) -> Fields:
    # Frequencies that turn less than `low` times over the original context are slowed by `factor`,
    # those that turn more than `high` times are kept, and the ones between are interpolated.
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    factors = []
    for i in range(dim // 2):
        turns = rope["original_max_position_embeddings"] * base ** (-2 * i / dim) / (2 * math.pi)
        kept = min(max((turns - low) / ((high - low) or 1e-9), 0.0), 1.0)
        factors.append(1.0 / ((1 - kept) / factor + kept))
    return {"rope_factors": tuple(factors)}


def _yarn(rope, base, dim, context) -> Fields:
    # As llama3, but linear in the number of the frequency; what is rotated is made longer for sharper scores.
    original = rope.get("original_max_position_embeddings") or context
    factor = rope.get("factor") or context / original

    def number(turns: float) -> float:
        """The frequency that turns so often over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = number(rope.get("beta_fast") or 32), number(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    factors = []
    for i in range(dim // 2):
        slowed = min(max((i - first) / ((last - first) or 0.001), 0.0), 1.0)
        factors.append(1.0 / (slowed / factor + 1 - slowed))
    scale = rope.get("attention_factor")
    if scale is None:
        one, all_ = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = _longer(factor, one) / _longer(factor, all_) if one and all_ else _longer(factor, 1)
    return {"rope_factors": tuple(factors), "rope_scale": float(scale)}


def _longer(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope, base, dim, context) -> Fields:
    # One set of factors for texts of up to the original context, another for longer ones.
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or context / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "rope_factors": tuple(map(float, rope["short_factor"])),
        "rope_long_factors": tuple(map(float, rope["long_factor"])),
        "rope_original": original,
        "rope_scale": float(scale),
    }


KINDS: dict[str, Callable[..., Fields]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
