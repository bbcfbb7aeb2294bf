"""Reads adapters that PEFT, or `peft_save`, has written."""

import concurrent.futures
import functools
import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.fingerprint import fingerprint
from lora_jax.interop import card, peft_config, peft_experts, peft_leaves, peft_soft
from lora_jax.interop import peft_layout as layout
from lora_jax.interop.peft_file import File
from lora_jax.interop.peft_layout import PREFIX, Module, Part
from lora_jax.interop.peft_reader import Reader
from lora_jax.methods import IA3, PROJECTIONS, DoRA, LoRA, Projections, VeRA
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
from lora_jax.soft import Prefix, Prompt
from lora_jax.stored import is_stored
from lora_jax.tree import leaves_by_path


def load(
    folder: str | Path, config: DecoderConfig, params: Any, force: bool = False
) -> dict[str, Any] | Prompt | Prefix:
    """Reads a PEFT adapter: LoRA, rsLoRA, DoRA, VeRA, IA³, token rows, what is saved whole, prompts and prefixes.

    Of mixtures of experts it reads both layouts: every expert a module of its own, and all of them one parameter.

    Where only some layers of a weight are adapted, the others get factors of zeros (of IA³, ones): these compute, and
    as LoRA and VeRA train, as if they were not there. Where ranks or scales differ between layers, the smaller ranks
    are filled up with zeros and the scales go into `b`.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      config: of the decoder that it is for.
      params: the decoder's; a file that names the fingerprint of its base is read for that base alone.
      force: read it for another base all the same.

    Returns:
      `{path: adapter}`, float32; or a `Prompt` or `Prefix`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the config asks for what is not supported; a tensor is missing, unexpected, of another shape than
        the config's, or not finite; the weights are pickled; the base is another one.
    """
    return _load(Path(folder), config, leaves_by_path(params), functools.cache(lambda: fingerprint(params)), force)


def load_many(
    folders: Iterable[str | Path], config: DecoderConfig, params: Any, force: bool = False, threads: int = 8
) -> list[dict[str, Any] | Prompt | Prefix]:
    """Reads adapters of one base at the same time, as `load` does each.

    Args:
      folders: of the adapters.
      config: of the decoder that they are for.
      params: the decoder's.
      force: read them for another base all the same.
      threads: how many are read at a time.

    Returns:
      The adapters, in the order of the folders.

    Raises:
      FileNotFoundError, ValueError: as `load`, of the first that cannot be read.
    """
    lock, here = threading.Lock(), functools.cache(lambda: fingerprint(params))

    def fingerprinted() -> str:
        with lock:  # it is found once
            return here()

    leaves = leaves_by_path(params)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda f: _load(Path(f), config, leaves, fingerprinted, force), folders))


def _load(
    folder: Path,
    config: DecoderConfig,
    leaves: dict[str, Any],
    here: Callable[[], str],
    force: bool,
) -> dict[str, Any] | Prompt | Prefix:
    settings = peft_config.Settings(folder / peft_config.NAME)
    file = File(folder)
    saved = file.metadata.get(card.BASE)
    if saved is not None and not force and saved != here():
        raise ValueError(
            f"{file.path}: trained over a base with fingerprint {saved}, this one has {here()}; load that base, in the "
            "same dtype, or force it"
        )
    if settings.kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return peft_soft.read(settings, file, config)
    return _adapters(Reader(settings, file, config, leaves), force)


Maker = Callable[[], dict[str, Any]]


def _adapters(reader: Reader, force: bool) -> dict[str, Any]:
    """All that the config asks for is listed first, then checked, then read."""
    s, found, targets = reader.settings, {}, []
    if any(name.startswith(f"{PREFIX}lm_head.") for name in reader.file.names):
        reader.alone("lm_head")
    if s.kind == "TRAINABLE_TOKENS":
        makers = [peft_leaves.rows(reader, s.values.get("token_indices"), "")]
    else:
        fused = bool(s.parameters())
        if s.values.get("target_modules") or not fused:
            targets = s.targets([name for name, module in reader.modules.items() if module.matrix])
        makers = [
            peft_leaves.whole(reader, targets),
            {"LORA": _lora, "VERA": _vera, "IA3": _ia3}[s.kind](reader, targets),
        ]
        if fused:
            makers.append(peft_experts.fused(reader, functools.partial(_sizes, reader)))
        if rows := s.values.get("trainable_token_indices"):
            makers.append(peft_leaves.rows(reader, rows, "token_adapter."))
    copies = {f"{PREFIX}{name}.base_layer.weight": reader.modules[name] for name in targets}
    reader.file.check(reader.expected, copies)
    _check_copies(reader, copies, force)
    for make in makers:
        for path, adapter in make().items():
            if path in found:
                raise ValueError(f"{s.path}: {path!r} has two adapters; only one is supported")
            found[path] = adapter
    return found


def _sizes(reader: Reader, name: str) -> tuple[int, float, float]:
    """A module's rank, γ and dropout."""
    s = reader.settings
    rank = s.pattern("rank_pattern", name, s.number("r", 1))
    alpha = s.pattern("alpha_pattern", name, s.number("lora_alpha", -peft_config.LARGEST))
    scale = alpha / (math.sqrt(rank) if s.values.get("use_rslora") else rank)
    return rank, scale, float(s.number("lora_dropout", 0.0, 0.0))


def _lora(reader: Reader, targets: list[str]) -> Callable[[], dict[str, Any]]:
    s = reader.settings
    s.check_patterns([*targets, *peft_experts.names(reader.config)] if s.parameters() else targets)
    sizes = {name: _sizes(reader, name) for name in targets}
    ranks, scales = {name: size[0] for name, size in sizes.items()}, {name: size[1] for name, size in sizes.items()}
    dora = bool(s.values.get("use_dora"))
    for name in _ends(reader, targets):
        reader.alone(name)
    reader.expect(targets, lambda key: _parts(reader, key, dora), ranks)

    def make() -> dict[str, Any]:
        found = {}
        for key, names in reader.grouped(targets):
            if dora and len(names) < layout.count(key, reader.config):
                missing = sorted(set(reader.names(key)) - set(names))
                raise ValueError(
                    f"{s.path}: DoRA of some layers alone is not supported: {missing[0]} has none, nor have "
                    f"{len(missing) - 1} others; merge it with PEFT"
                )
            first = scales[names[0]]
            arrays = reader.stacked(key, names, _parts(reader, key, dora), max(ranks[name] for name in names))
            if any(scales[name] != first for name in names):
                top = max((scales[name] for name in names), key=abs)
                stack = keys.stack(key, reader.config)
                ratio = np.array([scales.get(name, top) / top for name in reader.names(key)], np.float32)
                arrays["b"], first = arrays["b"] * ratio.reshape(stack + (1,) * (arrays["b"].ndim - len(stack))), top
            lora = LoRA(arrays["a"], arrays["b"], first, layout.axes(key), sizes[names[0]][2])
            found[key.path] = DoRA(lora, arrays["m"]) if dora else lora
        return found

    return make


def _parts(reader: Reader, key: keys.Key, dora: bool) -> tuple[Part, ...]:
    if not layout.embedding(key):
        return layout.DORA if dora else layout.LORA
    if dora:
        raise ValueError(f"{reader.settings.path}: DoRA of an embedding ({key.hf}) is not supported")
    return layout.EMBEDDING


def _vera(reader: Reader, targets: list[str]) -> Callable[[], dict[str, Any]]:
    s, sizes = reader.settings, layout.sizes
    rank, dropout = int(s.number("r", 1)), float(s.number("vera_dropout", 0.0, 0.0))
    if not s.values.get("save_projection", True):
        raise ValueError(
            f"{s.path}: save_projection is false, and PEFT's random matrices cannot be made again here; save it "
            "with PEFT and save_projection=True"
        )
    table = [reader.modules[name].key for name in targets]
    widest, tallest = (max(math.prod(sizes(key, reader.config, side)) for key in table) for side in ("inp", "out"))
    reader.expected |= {"base_model.vera_A": [rank, widest], "base_model.vera_B": [tallest, rank]}
    reader.expect(targets, lambda key: layout.VERA, dict.fromkeys(targets, rank))

    def make() -> dict[str, Any]:
        found: dict[str, Any] = {
            key.path: VeRA(**reader.stacked(key, names, layout.VERA, rank), axes=layout.axes(key), dropout=dropout)
            for key, names in reader.grouped(targets)
        }
        a, b = (reader.file.tensor(f"base_model.vera_{letter}") for letter in "AB")
        return {**found, PROJECTIONS: Projections(jnp.array(a.T), jnp.array(b))}

    return make


def _ia3(reader: Reader, targets: list[str]) -> Callable[[], dict[str, Any]]:
    forward = set(reader.settings.ending("feedforward_modules", targets))
    sides = {name: "in" if name in forward else "out" for name in targets}
    for key, names in reader.grouped(targets):
        if len({sides[name] for name in names}) > 1:
            raise ValueError(
                f"{reader.settings.path}: feedforward_modules means some layers of {key.hf} and not others; "
                "that is not supported"
            )
        reader.expect(names, lambda key, side=sides[names[0]]: layout.IA3[side], dict.fromkeys(names, 1))

    def make() -> dict[str, Any]:
        found = {}
        for key, names in reader.grouped(targets):
            side = sides[names[0]]
            arrays = reader.stacked(key, names, layout.IA3[side], 1, fill=1.0)
            found[key.path] = IA3(arrays["l"], layout.axes(key), side)
        return found

    return make


def _ends(reader: Reader, names: list[str]) -> list[str]:
    """Those of the modules that are the embedding or the head."""
    return [name for name in names if reader.modules[name].key.path in ("embed/embedding", "head/kernel")]


def _check_copies(reader: Reader, copies: dict[str, Module], force: bool) -> None:
    """Of base weights, which PEFT saves beside some adapters; they are compared, and not read."""
    for name in sorted(reader.file.names & copies.keys()):
        module = copies[name]
        key, here = module.key, reader.base[module.key.path]
        reader.file.check({name: list(keys.file_shape(key, reader.config))}, reader.file.names)
        if force or is_stored(here):
            continue
        saved = keys.from_file(reader.file.tensor(name), key, reader.config).astype(here.dtype)
        place = np.unravel_index(module.place, keys.stack(key, reader.config))
        if not np.array_equal(np.asarray(here[tuple(map(int, place))]), saved):
            raise ValueError(
                f"{reader.file.path}: {name} is not this base's weight; load the base that it was trained over, or "
                "force it"
            )
