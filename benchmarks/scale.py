"""What large models take of chips that are not there: steps of training and of sampling, by the chips' own compilers.

    .venv/bin/python -m benchmarks.scale      # needs the compilers: make test-slow installs them

Writes benchmarks/results/scale.json and docs/scale.md after each program, and goes on from what is there.
`configs/scale.py` has the settings that all rows share.
"""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import scale_page
from configs import scale
from lora_jax import sharding
from train import architectures, forecast, loop, plan, programs, topology
from train import config as defaults

RESULT = Path(__file__).parent / "results" / "scale.json"
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
LENGTH, CHUNK = 4096, 512  # tokens of a row, and those of a row whose logits are held at once


class Case(NamedTuple):
    """Programs of one model on one mesh; `rows` are those of a chip in a step."""

    model: str
    topology: str
    line: str = "fsdp=-1"
    kinds: tuple[str, ...] = ("lora",)
    remat: str = "full"
    rows: int = 1


# Every model on its chips; 256 divides no axis of heads.
SLICES = [
    ("llama-3.1-8b", "v5e:4x4", "fsdp=-1"),
    ("llama-3.1-70b", "v5p:4x4x4", "fsdp=-1"),
    ("llama-3.1-70b", "v5e:16x16", "fsdp=-1,tensor=2"),
    ("llama-3.1-405b", "v5p:4x4x8", "fsdp=-1"),
    ("qwen3-30b-a3b", "v5e:4x4", "expert=-1"),
    ("llama-3.2-1b", "v5e:2x2", "fsdp=-1"),
    ("qwen3-8b", "v6e:2x2", "fsdp=-1"),
    ("gemma-3-4b", "v6e:1x1", "fsdp=-1"),
    ("gemma-3-12b", "v6e:2x4", "fsdp=-1"),
    ("gemma-3-27b", "v5p:2x2x2", "fsdp=-1"),
]
CASES = [
    Case("llama-3.1-8b", "h100", kinds=("lora", "lora on nf4", "sampling", "full")),
    *(Case(*where, kinds=("lora", "sampling")) for where in SLICES),
    *(Case("llama-3.1-8b", "h100", kinds=("lora", "sampling"), rows=rows) for rows in (2, 4, 8)),
    *(Case("llama-3.1-8b", "h100", kinds=("lora",), remat="offload", rows=rows) for rows in (2, 4, 8)),
    *(
        Case("llama-3.1-8b", name, kinds=("lora",), remat=remat)
        for name in ("h100", "v5e:4x4")
        for remat in ("dots", "offload", "none")
    ),
    # Of 405B's activations a chip's share is more than its host's memory.
    *(Case(*where, kinds=("lora",), remat="offload") for where in SLICES[1:] if where[0] != "llama-3.1-405b"),
    Case("llama-3.1-8b", "v5e:4x4", kinds=("lora", "sampling"), rows=2),
    Case("llama-3.1-8b", "v5e:4x4", kinds=("lora",), remat="offload", rows=2),
    *(Case(*where, kinds=("full", "lora on nf4")) for where in SLICES),
]


# Of these, what stays between two steps.
MODELS = [case for case in CASES if case.kinds[0] == "lora" and case.rows == 1 and case.remat == "full"]


def main() -> None:
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"length": LENGTH, "rows": [], "between": []}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    each = [(case.model, case.topology, *between(case)) for case in MODELS]
    moe = [case for case in MODELS if architectures.decoder(case.model).experts]
    each += [(f"{case.model}, an expert's rank 16", case.topology, *between(case, active_experts=1)) for case in moe]
    result["between"] = each
    write(result)
    known = {_key(row): row for row in result["rows"]}
    result["rows"] = []
    for case, kind in [(one, kind) for one in CASES for kind in one.kinds]:
        row = {name: value for name, value in case._asdict().items() if name != "kinds"} | {"kind": kind}
        row["settings"] = own(settings(case, kind))
        found = known.get(_key(row), {})
        if found.get("settings") != row["settings"]:
            print(*row.values(), flush=True)
            found = row | dataclasses.asdict(compiled(case, kind)) | versions
        result["rows"].append(found)
        write(result)


def write(result: dict) -> None:
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(scale_page.text(json.loads(RESULT.read_text())))


def between(case: Case, **lora: int) -> tuple[str, ...]:
    """What stays on a chip between two steps, against the base.

    Args:
      case: of its model, topology and mesh.
      lora: settings of it to change.

    Returns:
      Factors and moments divided; whole on every chip; divided, with both moments in float32; divided, in the chip's
      tiles.
    """
    where = topology.get(case.topology)
    mesh, ratios = sharding.mesh(case.line, where.devices), []
    tiles = where.platform == "tpu"
    ways = (True, "bfloat16", False), (False, "bfloat16", False), (True, "", False), (True, "bfloat16", tiles)
    for divide, dtype, tiled in ways:
        config = settings(case)
        config.sharding.divide, config.optim.mu_dtype = divide, dtype
        config.lora.update(lora)
        parts = programs.state(config, architectures.decoder(case.model), mesh, jnp.bfloat16)
        base = programs.bytes_per_chip(parts["base"], tiled)
        ratios.append(f"{programs.bytes_per_chip(parts, tiled) / base:.3f}")
    return tuple(ratios)


def settings(case: Case, kind: str = "lora") -> ConfigDict:
    """A case's: an expert's rank is divided by a token's experts; LoRA alone keeps a mean of gradients in bfloat16."""
    config = scale.get_config()
    config.update({"model": case.model, "mesh": case.line, "remat": case.remat})
    config.lora.active_experts = max(1, architectures.decoder(case.model).active_experts)
    if kind != "lora":
        config.optim.mu_dtype = ""
    if kind == "full":
        config.method = "full"
    config.quantize = kind.removeprefix("lora on ") if kind.startswith("lora on ") else ""
    return config


def own(config: ConfigDict) -> dict[str, Any]:
    """What of a config is not the default."""
    usual = dict(loop.flat(defaults.sft().to_dict()))
    return {name: value for name, value in loop.flat(config.to_dict()) if value != usual[name]}


def compiled(case: Case, kind: str) -> forecast.Forecast:
    where = topology.get(case.topology)
    mesh = sharding.mesh(case.line, where.devices)
    rows = case.rows * programs.row_parts(mesh)
    config = settings(case, kind)
    config.batch_size = config.eval.batch_size = rows
    config.loss_chunk = rows * CHUNK
    shape = plan.attending(config, architectures.decoder(case.model), where, jnp.bfloat16)
    if kind == "sampling":
        program = programs.sampling(config, shape, mesh, jnp.bfloat16, LENGTH)
    else:
        program = programs.training(config, shape, mesh, jnp.bfloat16, LENGTH, LENGTH)
    return forecast.make(program, mesh, where)


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in ("model", "topology", "line", "kind", "remat", "rows"))


if __name__ == "__main__":
    main()
