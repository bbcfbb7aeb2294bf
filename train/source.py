"""Opens what was trained, for the scripts that look at it or take it elsewhere: a run's folder, or a PEFT adapter's."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from lora_jax.fingerprint import fingerprint
from lora_jax.interop import card, hf, hub, merged, parts, peft, peft_config, peft_file
from lora_jax.models.config import DecoderConfig
from lora_jax.soft import Prefix, Prompt
from train import adapter, loop, methods, trained

RUN = flags.DEFINE_string("run", "", "folder of a run, such as runs/quickstart, or of a PEFT adapter")
BASE = flags.DEFINE_string(
    "base", "", "the model below it; empty: the one that the run, or the adapter's config, names"
)
FORCE = flags.DEFINE_boolean("force", False, "read a PEFT adapter over another base than its fingerprint's")


class Source(NamedTuple):
    """What was trained, over which base.

    Attributes:
      adapters: by path, or a prompt or prefix, or None where every parameter was trained.
      params: the base as it was trained over, or all parameters that were trained; what lies in safetensors is read
        when it is used.
      config: the decoder's.
      model: name or folder of the base.
      dtype: of the base's files; None where they are quantised.
      card: what is known of it.
      notes: what a reader should know.
    """

    adapters: Mapping[str, Any] | Prompt | Prefix | None
    params: Any
    config: DecoderConfig
    model: str
    dtype: Any
    card: peft.Card
    notes: list[str]


def read(folder: str | Path, base: str = "", force: bool = False, one_sided: bool = False) -> Source:
    """Opens a run, or a PEFT adapter.

    Args:
      folder: of either.
      base: the model below it; "" for the one that it names.
      force: read a PEFT adapter over another base than its fingerprint's.
      one_sided: give a base whose head is its embedding a head of its own, if a PEFT adapter is of one of the two.

    Raises:
      FileNotFoundError: it is neither, or has no checkpoint.
      ValueError: it cannot be read, or belongs to another base.
    """
    folder = Path(folder)
    if (folder / peft_config.NAME).is_file():
        return _peft(folder, base, force, one_sided)
    if (folder / loop.CONFIG).is_file():
        return _run(folder, base)
    raise FileNotFoundError(f"{folder}: neither a run (no {loop.CONFIG}) nor a PEFT adapter (no {peft_config.NAME})")


def _run(folder: Path, named: str) -> Source:
    run = loop.resolved(folder)
    name = named or run["model"]
    run |= {"model": _local(name)}
    config, notes = ConfigDict(run), []
    versions = json.loads((folder / loop.VERSIONS).read_text())
    dtype = jnp.dtype(run["dtype"] or ("float32" if versions["backend"] == "cpu" else "bfloat16"))
    if run["quantize"] or run["method"] == "loftq" or not _in_safetensors(run["model"]):
        model = methods.load(config, dtype)
    else:
        model = hf.load(run["model"], weights=False)
        model = dataclasses.replace(model, params=parts.load(run["model"], dtype)[1])
    found = trained.read(folder, run, model, notes.append)
    if run["quantize"] or run["method"] == "loftq":
        notes.append(f"trained over a base quantised to {run['quantize'] or 'nf4'}")
    whole, about = run["method"] == "full", adapter.card(folder, run, name, found.step)
    held = (None, found.trained) if whole else (found.trained, found.base)
    return Source(*held, model.config, run["model"], _file_dtype(run["model"]), about, notes)


def _peft(folder: Path, base: str, force: bool, one_sided: bool) -> Source:
    settings = peft_config.Settings(folder / peft_config.NAME)
    model = base or settings.values.get("base_model_name_or_path") or ""
    model = "smollm2" if model == adapter.PACKAGED and not base else model
    name, model = model, _local(model)
    if not model:
        raise ValueError(f"{settings.path}: names no base; give --base")
    saved, notes = _saved(folder), []
    if _in_safetensors(model):
        config, params = parts.load(model)
        for dtype in ("float32", "bfloat16"):  # what a base is trained in need not be what its files hold
            if saved and fingerprint(params) != saved:
                params = parts.load(model, dtype)[1]
    else:
        loaded = hf.load(model)
        config, params = loaded.config, loaded.params
    if one_sided and config.tied and _one_side(settings):
        if saved and not force and fingerprint(params) != saved:
            raise ValueError(f"{folder}: trained over a base with fingerprint {saved}, not this one; give --base")
        config, params = merged.untied(config, params)
        notes.append("the adapter is of one side of a tied embedding: the head becomes a matrix of its own")
        adapters = peft.load(folder, config, params, force=True)
    else:
        adapters = peft.load(folder, config, params, force)
    return Source(adapters, params, config, model, _file_dtype(model), peft.Card(adapter.name(name)), notes)


def _one_side(settings: peft_config.Settings) -> bool:
    named = str([settings.values.get(field) for field in ("target_modules", "modules_to_save")])
    return "embed_tokens" in named or "lm_head" in named


def _saved(folder: Path) -> str | None:
    path = folder / peft_file.WEIGHTS
    return peft_file.File(folder).metadata.get(card.BASE) if path.is_file() else None


def _local(model: str) -> str:
    """The folder of a model that is named as on the hub."""
    return model if Path(model).exists() or not hub.is_name(model) else str(hub.download(model))


def _in_safetensors(model: str) -> bool:
    return Path(model).is_dir()


def _file_dtype(model: str) -> Any:
    if not _in_safetensors(model):
        return None
    return jax.tree.leaves(parts.load(model)[1])[0].dtype
