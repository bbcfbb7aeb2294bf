"""docs/scale.md from benchmarks/results/scale.json."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from train.plan_table import markdown
from train.topology import GIB

Row = Mapping[str, Any]
TIERED = "llama-3.1-8b"  # at every tier of remat, and with more rows
HEAD = """# Large models on chips, before they are rented

What a training step takes of each chip, by the chip's own compiler: the step that `train/sft.py` runs, compiled on a
CPU for chips that are not there. `python -m benchmarks.scale` compiles what is missing in
`benchmarks/results/scale.json`, or has other settings by now, and writes this page. Rows are of {length:,} tokens,
packed, {rows}; LoRA is of rank 16 on all linear weights, or of 16 divided by a token's experts on each of them; its
factors are float32, Adam's mean of gradients bfloat16 (`optim.mu_dtype`; float32 over NF4 and for full fine-tuning),
that of squares float32, all divided over the mesh; the base is bfloat16, its weights divided over it too; remat is
"full" where nothing else is said. JAX {jax}, libtpu {libtpu}. A plan of your own run:
`python -m train.plan --config=configs/scale.py --topology=v5e:4x4`.

Compiling a program took {least} to {most} seconds of a processor, half of them {median} or less.

GiB on each chip. "Kept" is what the backward pass needs of the forward pass, "other" what else comes and goes.
"""
BETWEEN = """
## Between two steps

The base, the factors and their moments, against the base alone, as sampling has it: bytes on each chip, by
arithmetic. Factors and moments are divided over the mesh and gathered once in a step, or whole on every chip
(`sharding.divide=False`), or divided with both moments in float32 (`optim.mu_dtype=""`, the default). "In tiles" is
as the compiler counts: a TPU fills up two axes of every array to 8 and 128, as heads of 64 numbers of the 1B model.
"""
BESIDE = """
## Beside sampling and full fine-tuning

The peak of a step against that of sampling one token for as many rows, with a key/value cache of {length:,} tokens a
row, and against that of training all parameters, these and both moments in float32. In brackets, where activations
are sent to the host's memory (`remat="offload"`).
"""
TIERS = """
## Tiers of remat

Llama 3.1 8B, a row in a step, on one H100 and on each chip of a slice. The compiler that is there without a GPU has
no cuDNN: attention is computed in chunks. Full fine-tuning is with full remat. The least time to the host's memory
and back is that of the bus, one way after the other; what is computed meanwhile hides it or does not.
"""
WITHIN = """
## Only slightly larger than sampling?

The claim that LoRA's layout is only slightly larger than that of sampling, tested: Llama 3.1 8B, and as many rows
sampled as trained.
"""
EXCHANGED = """
## What chips exchange in a step

Bytes on each chip, collectives in loops as often as these run. XLA for TPU turns many gathers into permutes around
the ring, and for v5p into sums. Least times are those of the products at the chip's peak and of the exchanges over
all of its links; the compiler's own estimate is of everything but exchanges. Where a plan says how many tokens it
makes an hour, it takes the longest of them.
"""


def text(result: Mapping[str, Any]) -> str:
    """The page.

    Args:
      result: what the JSON holds.
    """
    rows = result["rows"]
    every = {_key(row): row for row in rows}
    alike = [row for row in rows if row["rows"] == 1 and row["remat"] == "full"]
    took = [round(row["compiled"]) for row in rows]
    said = {"length": result["length"], "rows": "one a chip in a step"}
    said |= {name: " and ".join(sorted({row[name] for row in rows})) for name in ("jax", "libtpu")}
    said |= {"least": min(took), "most": max(took), "median": round(statistics.median(took))}
    return "\n".join(
        [
            HEAD.format(**said),
            markdown(
                ("model", "chips", "", "base", "trained", "Adam", "cache", "kept", "other", "peak", "of", "fits"),
                [_sizes(row) for row in sorted(alike, key=lambda row: (row["model"], row["topology"]))],
            ),
            BETWEEN,
            markdown(
                ("model", "chips", "divided", "on every chip", "divided, float32", "divided, in tiles"),
                result["between"],
            ),
            BESIDE.format(**said),
            markdown(("model", "chips", "LoRA / sampling", "LoRA / full"), list(_beside(alike, every))),
            TIERS,
            markdown(
                (
                    "chips",
                    "remat",
                    "kept",
                    "other",
                    "peak",
                    "of the host",
                    "LoRA / sampling",
                    "LoRA / full",
                    "PFLOP",
                    "least s, host",
                ),
                list(_tiers(rows, every)),
            ),
            WITHIN,
            markdown(("chips", "remat", "rows", "sampling", "LoRA", "LoRA / sampling"), list(_within(rows, every))),
            _largest(rows, every),
            EXCHANGED,
            markdown(
                (
                    "model",
                    "chips",
                    "",
                    "exchanged, GiB",
                    "PFLOP",
                    "least s, products",
                    "least s, links",
                    "compiler's s",
                ),
                [_exchanged(row) for row in alike if row["chips"] > 1 and row["collectives"] is not None],
            ),
            "",
        ]
    )


def _sizes(row: Row) -> Sequence[str]:
    parts = row["bytes"]
    names = ("base", "adapters", "optimizer", "cache", "activations")
    other = parts["temporaries"] + parts["program"]
    numbers = [*(parts.get(name, 0) for name in names), other, row["peak"], row["room"]]
    fits = "yes" if row["peak"] <= row["room"] else "no"
    return [row["model"], row["topology"], row["kind"], *map(_gib, numbers), fits]


def _beside(rows: Sequence[Row], every: Mapping[tuple, Row]):
    for row in rows:
        if row["kind"] == "lora":
            away = every.get(_key(row | {"remat": "offload"}))
            others = [every.get(_key(row | {"kind": kind})) for kind in ("sampling", "full")]
            ratios = [_ratio(row, other) + (f" ({_ratio(away, other)})" if away and other else "") for other in others]
            yield [row["model"], row["topology"], *ratios]


def _tiers(rows: Sequence[Row], every: Mapping[tuple, Row]):
    for row in sorted(rows, key=lambda row: row["topology"]):
        if row["model"] == TIERED and row["kind"] == "lora" and row["rows"] == 1:
            parts = row["bytes"]
            sizes = (parts["activations"], parts["temporaries"], row["peak"], row["host"])
            # Neither sampling nor full fine-tuning was compiled with another tier.
            others = [every.get(_key(row | {"remat": "full", "kind": kind})) for kind in ("sampling", "full")]
            ratios = [_ratio(row, other) for other in others]
            host = f"{row['seconds']['host']:.2f}" if "host" in row["seconds"] else ""
            yield [row["topology"], row["remat"], *map(_gib, sizes), *ratios, f"{row['flops'] / 1e15:.3g}", host]


def _within(rows: Sequence[Row], every: Mapping[tuple, Row]):
    for row, sampling in _pairs(rows, every):
        ratio = row["peak"] / sampling["peak"]
        where = row["topology"], row["remat"], str(row["rows"])
        yield [*where, _gib(sampling["peak"]), _gib(row["peak"]), f"{ratio:.3f}"]


def _largest(rows: Sequence[Row], every: Mapping[tuple, Row]) -> str:
    largest: dict[tuple[str, str], int] = {}
    for row, sampling in _pairs(rows, every):
        where = row["topology"], row["remat"]
        within = row["rows"] if row["peak"] <= 1.25 * sampling["peak"] else 0
        largest[where] = max(largest.get(where, 0), within)
    said = [f"{n or 'none'} on {name} with {remat!r}" for (name, remat), n in largest.items()]
    return "\nThe most of these rows a chip within 1.25: " + ", ".join(said) + "."


def _pairs(rows: Sequence[Row], every: Mapping[tuple, Row]):
    for row in sorted(rows, key=lambda row: (row["topology"], row["remat"], row["rows"])):
        sampling = every.get(_key(row | {"remat": "full", "kind": "sampling"}))
        if row["model"] == TIERED and row["kind"] == "lora" and row["remat"] in ("full", "offload") and sampling:
            yield row, sampling


def _exchanged(row: Row) -> Sequence[str]:
    seconds = [
        f"{row['seconds'][name]:.3g}" if name in row["seconds"] else "" for name in ("compute", "links", "compiler")
    ]
    kinds = ", ".join(f"{kind} {_gib(size)}" for kind, (_, size) in row["collectives"].items() if size > GIB / 100)
    return [row["model"], row["topology"], row["kind"], kinds, f"{row['flops'] / 1e15:.3g}", *seconds]


def _ratio(row: Row, other: Row | None) -> str:
    return f"{row['peak'] / other['peak']:.2f}" if other else ""


def _key(row: Row) -> tuple:
    return row["model"], row["topology"], row["line"], row["remat"], row["rows"], row["kind"]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
