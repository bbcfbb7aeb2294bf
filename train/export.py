"""Takes what was trained to where it is served: `python -m train.export --run=runs/x --format=peft --out=folder`.

    --format=peft       an adapter for PEFT (--for=peft), or in the one form that every server reads (the default), with
                        what vLLM or SGLang must be told (--for=vllm, --for=sglang)
    --format=merged     the whole model: weights, config, tokenizer, chat template, written a file at a time
    --format=gguf-lora  an adapter for llama.cpp

The source is a run's folder, or a PEFT adapter's (--run=adapter --base=model). What the format or the server has no
place for is converted, and what that costs is told; or nothing is written, and why is told.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from lora_jax.interop import folder as folders
from lora_jax.interop import gguf_adapter, merged, peft, portable
from lora_jax.soft import Prefix, Prompt
from train import launch, source

FORMAT = flags.DEFINE_enum("format", "peft", ("peft", "merged", "gguf-lora"), "what to write")
SERVER = flags.DEFINE_enum("for", "any", ("peft", *portable.SERVERS), "what will read an adapter")
OUT = flags.DEFINE_string("out", "", "folder to write, new or empty")
RANK = flags.DEFINE_integer("rank", 0, "most that an adapter's rank may be, by SVD; 0: what it takes", lower_bound=0)
FUSED = flags.DEFINE_bool("fused", False, "write a layer's experts as one parameter, where a mixture is for PEFT")
DTYPE = flags.DEFINE_enum("dtype", "", ("", "float32", "bfloat16", "float16"), "of a merged model; empty: its base's")
ADAPTER = "adapter.gguf"


def main(_: list[str]) -> None:
    """Reads the command line and exports."""
    if not source.RUN.value or not OUT.value:
        raise ValueError("give --run=FOLDER, what was trained, and --out=FOLDER, where to write")
    if FORMAT.value != "peft" and SERVER.value == "peft":
        raise ValueError(f"--for=peft is for --format=peft, not {FORMAT.value}")
    if FUSED.value and SERVER.value != "peft":
        raise ValueError(f"--fused is for --for=peft; --for={SERVER.value} takes a module for each expert")
    out = Path(OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; give --out a new folder")
    found = source.read(source.RUN.value, source.BASE.value, source.FORCE.value, one_sided=FORMAT.value == "merged")
    notes = {"merged": _merged, "peft": _peft, "gguf-lora": _gguf}[FORMAT.value](found, out)
    for line in [*found.notes, *notes]:
        print(line)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _merged(found: source.Source, out: Path) -> list[str]:
    """The model with its adapters added in."""
    if isinstance(found.adapters, Prompt | Prefix):
        raise ValueError(
            "a prompt or a prefix is no change of a weight: it cannot be merged; PEFT reads it (--for=peft)"
        )
    dtype = jnp.dtype(DTYPE.value or found.dtype or "float32")
    errors = merged.save(out, found.config, found.params, found.adapters or {}, dtype)
    folders.write(out, found.model, found.config, dtype)
    if not errors:
        return [f"every parameter was trained: written in {dtype.name}"]
    return [
        f"{len(errors)} weights merged in float32 and rounded to {dtype.name}",
        *_worst("‖merged − exact‖/‖Δ‖", errors),
    ]


def _peft(found: source.Source, out: Path) -> list[str]:
    """The adapter, as it is or in the form that servers read."""
    if SERVER.value == "peft":
        peft.save(out, _adapters(found), found.config, found.params, found.card, fused=FUSED.value)
        return []
    ready = _portable(found, SERVER.value)
    peft.save(out, ready.adapters, found.config, found.params, found.card, uniform=True)
    return [*ready.notes, *_worst("‖Δ' − Δ‖/‖Δ‖", ready.errors)]


def _gguf(found: source.Source, out: Path) -> list[str]:
    """The adapter for llama.cpp."""
    ready = _portable(found, "any")
    out.mkdir(parents=True, exist_ok=True)
    gguf_adapter.save(out / ADAPTER, ready.adapters, found.config)
    return [*ready.notes, *_worst("‖Δ' − Δ‖/‖Δ‖", ready.errors), f"llama-cli --lora {out / ADAPTER}"]


def _portable(found: source.Source, server: str) -> portable.Portable:
    return portable.convert(_adapters(found), found.config, found.params, server, RANK.value)


def _adapters(found: source.Source) -> Any:
    if found.adapters is None:
        raise ValueError("every parameter was trained, and there is no adapter: use --format=merged")
    return found.adapters


def _worst(measure: str, errors: dict[str, float]) -> list[str]:
    if not errors:
        return []
    path = max(errors, key=lambda path: errors[path])
    return [f"{measure}: at most {errors[path]:.2e} ({path})"]


if __name__ == "__main__":
    launch.run(main)
