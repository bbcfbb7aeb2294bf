"""Reads adapters that PEFT, or `peft_save`, has written."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.fingerprint import fingerprint
from lora_jax.interop import card, peft_config, peft_soft
from lora_jax.interop import peft_layout as layout
from lora_jax.interop.peft_file import File
from lora_jax.interop.peft_layout import PREFIX, Module, Part
from lora_jax.leaves import Leaf, Rows
from lora_jax.methods import IA3, PROJECTIONS, DoRA, LoRA, Projections, VeRA
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
from lora_jax.soft import Prefix, Prompt
from lora_jax.stored import is_stored
from lora_jax.tree import leaves_by_path


def load(
    folder: str | Path, config: DecoderConfig, params: Any, force: bool = False
) -> dict[str, Any] | Prompt | Prefix:
    """Reads a PEFT adapter: LoRA, rsLoRA, DoRA, VeRA, IA³, token rows, modules saved whole, prompts and prefixes.

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
    settings = peft_config.Settings(Path(folder) / peft_config.NAME)
    file = File(Path(folder))
    saved, here = file.metadata.get(card.BASE), fingerprint(params)
    if saved not in (None, here) and not force:
        raise ValueError(
            f"{file.path}: trained over a base with fingerprint {saved}, this one has {here}; load that base, in the "
            "same dtype, or force it"
        )
    if settings.kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return peft_soft.read(settings, file, config)
    return _Reader(settings, file, config, leaves_by_path(params), force).adapters()


class _Reader:
    """The adapters of one file: what the config asks for is listed first, then checked, then read."""

    def __init__(
        self,
        settings: peft_config.Settings,
        file: File,
        config: DecoderConfig,
        base: Mapping[str, Any],
        force: bool,
    ):
        self.settings, self.file, self.config, self.base, self.force = settings, file, config, base, force
        self.modules = layout.modules(config)
        self.expected: dict[str, list[int]] = {}
        self.copies: dict[str, Module] = {}  # of base weights, which PEFT saves beside adapters of embedding and head

    def adapters(self) -> dict[str, Any]:
        kind, found = self.settings.kind, {}
        matrices = [name for name, module in self.modules.items() if module.matrix]
        whole = self._whole()
        makers: list[Callable[[], dict[str, Any]]] = [whole]
        if kind == "TRAINABLE_TOKENS":
            makers.append(self._rows(self.settings.values.get("token_indices"), ""))
        else:
            targets = self.settings.targets(matrices)
            makers.append({"LORA": self._lora, "VERA": self._vera, "IA3": self._ia3}[kind](targets))
            if rows := self.settings.values.get("trainable_token_indices"):
                makers.append(self._rows(rows, "token_adapter."))
        self.file.check(self.expected, self.copies)
        self._check_copies()
        for make in makers:
            for path, adapter in make().items():
                if path in found:
                    raise ValueError(f"{self.settings.path}: {path!r} has two adapters; only one is supported")
                found[path] = adapter
        return found

    def _lora(self, targets: list[str]) -> Callable[[], dict[str, Any]]:
        s = self.settings
        s.check_patterns(targets)
        rank, alpha, dropout = (
            s.number("r", 1),
            s.number("lora_alpha", -peft_config.LARGEST),
            s.number("lora_dropout", 0.0, 0.0),
        )
        ranks: dict[str, int] = {name: s.pattern("rank_pattern", name, rank) for name in targets}
        alphas = {name: s.pattern("alpha_pattern", name, alpha) for name in targets}
        rooted = s.values.get("use_rslora")
        scales = {name: alphas[name] / (math.sqrt(r) if rooted else r) for name, r in ranks.items()}
        dora = bool(s.values.get("use_dora"))
        for name in targets:
            if layout.embedding(self.modules[name].key) or self.modules[name].key.path == "head/kernel":
                self._alone(name)
                self.copies[f"{PREFIX}{name}.base_layer.weight"] = self.modules[name]
        self._expect(targets, lambda key: self._parts(key, dora), ranks)

        def make() -> dict[str, Any]:
            found = {}
            for key, names in self._grouped(targets):
                if dora and len(names) < layout.layers(key, self.config):
                    missing = sorted(set(self._names(key)) - set(names))
                    raise ValueError(
                        f"{s.path}: DoRA of some layers alone is not supported: {missing[0]} has none, nor have "
                        f"{len(missing) - 1} others; merge it with PEFT"
                    )
                first = scales[names[0]]
                arrays = self._stacked(key, names, self._parts(key, dora), max(ranks[name] for name in names))
                if any(scales[name] != first for name in names):
                    top = max((scales[name] for name in names), key=abs)
                    ratio = np.array([scales.get(name, top) / top for name in self._names(key)], np.float32)
                    arrays["b"], first = arrays["b"] * ratio.reshape(-1, *[1] * (arrays["b"].ndim - 1)), top
                lora = LoRA(arrays["a"], arrays["b"], first, layout.axes(key), float(dropout))
                found[key.path] = DoRA(lora, arrays["m"]) if dora else lora
            return found

        return make

    def _parts(self, key: keys.Key, dora: bool) -> tuple[Part, ...]:
        if not layout.embedding(key):
            return layout.DORA if dora else layout.LORA
        if dora:
            raise ValueError(f"{self.settings.path}: DoRA of an embedding ({key.hf}) is not supported")
        return layout.EMBEDDING

    def _vera(self, targets: list[str]) -> Callable[[], dict[str, Any]]:
        s, sizes = self.settings, layout.sizes
        rank, dropout = int(s.number("r", 1)), float(s.number("vera_dropout", 0.0, 0.0))
        if not s.values.get("save_projection", True):
            raise ValueError(
                f"{s.path}: save_projection is false, and PEFT's random matrices cannot be made again here; save it "
                "with PEFT and save_projection=True"
            )
        table = [self.modules[name].key for name in targets]
        widest, tallest = (max(math.prod(sizes(key, self.config, side)) for key in table) for side in ("inp", "out"))
        self.expected |= {"base_model.vera_A": [rank, widest], "base_model.vera_B": [tallest, rank]}
        self._expect(targets, lambda key: layout.VERA, dict.fromkeys(targets, rank))

        def make() -> dict[str, Any]:
            found: dict[str, Any] = {
                key.path: VeRA(**self._stacked(key, names, layout.VERA, rank), axes=layout.axes(key), dropout=dropout)
                for key, names in self._grouped(targets)
            }
            a, b = (self.file.tensor(f"base_model.vera_{letter}") for letter in "AB")
            return {**found, PROJECTIONS: Projections(jnp.array(a.T), jnp.array(b))}

        return make

    def _ia3(self, targets: list[str]) -> Callable[[], dict[str, Any]]:
        forward = set(self.settings.ending("feedforward_modules", targets))
        sides = {name: "in" if name in forward else "out" for name in targets}
        for key, names in self._grouped(targets):
            if len({sides[name] for name in names}) > 1:
                raise ValueError(
                    f"{self.settings.path}: feedforward_modules means some layers of {key.hf} and not others; "
                    "that is not supported"
                )
            self._expect(names, lambda key, side=sides[names[0]]: layout.IA3[side], dict.fromkeys(names, 1))

        def make() -> dict[str, Any]:
            found = {}
            for key, names in self._grouped(targets):
                side = sides[names[0]]
                arrays = self._stacked(key, names, layout.IA3[side], 1, fill=1.0)
                found[key.path] = IA3(arrays["l"], layout.axes(key), side)
            return found

        return make

    def _whole(self) -> Callable[[], dict[str, Any]]:
        names = self.settings.ending("modules_to_save", list(self.modules))
        if self.settings.values.get("bias", "none") != "none":  # saved whole as well, where a model has any
            own = self.settings.kind.lower() + "_only"
            if self.settings.values["bias"] not in ("all", own):
                raise ValueError(f"{self.settings.path}: bias={self.settings.values['bias']!r} is not supported")
            names += [name for name in self.modules if name.endswith(".bias") and f"{PREFIX}{name}" in self.file.names]
        for name in names:
            key = self.modules[name].key
            if layout.embedding(key):
                self._alone(name)
            self.expected[self._leaf(name)] = list(keys.file_shape(key, self.config))

        def make() -> dict[str, Any]:
            found = {}
            for key, names_of_key in self._grouped(names):
                if missing := sorted(set(self._names(key)) - set(names_of_key)):
                    raise ValueError(
                        f"{self.settings.path}: modules_to_save of some layers alone is not supported: "
                        f"{missing[0]} is not among them"
                    )
                values = [keys.from_file(self.file.tensor(self._leaf(n)), key, self.config) for n in self._names(key)]
                found[key.path] = Leaf(jnp.array(np.stack(values) if "{}" in key.hf else values[0]))
            return found

        return make

    def _leaf(self, name: str) -> str:
        return f"{PREFIX}{self.modules[name].key.hf.format(self.modules[name].layer)}"

    def _rows(self, asked: Any, prefix: str) -> Callable[[], dict[str, Any]]:
        tables = [name for name, module in self.modules.items() if layout.embedding(module.key)]
        by_name = asked if isinstance(asked, dict) else {name: asked for name in tables}
        chosen: dict[str, tuple[int, ...]] = {}
        for ending, rows in by_name.items():
            named = [name for name in tables if name == ending or name.endswith(f".{ending}")]
            key = self.modules[named[0]].key if named else None
            if key is None or not isinstance(rows, list) or not rows:
                raise ValueError(f"{self.settings.path}: token rows {ending!r}: {rows!r} are not rows of an embedding")
            if not all(type(row) is int and 0 <= row < self.config.vocab for row in rows) or len({*rows}) < len(rows):
                raise ValueError(
                    f"{self.settings.path}: token rows {rows} are not different rows below {self.config.vocab}"
                )
            chosen[named[0]] = tuple(rows)
            self.expected[f"{PREFIX}{named[0]}.{prefix}trainable_tokens_delta"] = [len(rows), self.config.dim]

        def make() -> dict[str, Any]:
            found = {}
            for name, rows in chosen.items():
                key = self.modules[name].key
                values = self.file.tensor(f"{PREFIX}{name}.{prefix}trainable_tokens_delta")
                # The file holds the rows themselves, whatever its names say.
                base = layout.rows(self.base[key.path], rows)
                found[key.path] = Rows(jnp.array(values - base), rows, layout.axes(key))
            return found

        return make

    def _alone(self, name: str) -> None:
        if self.config.tied:
            raise ValueError(
                f"{self.settings.path}: {name} is adapted, but this model's head is the same matrix, which PEFT leaves "
                "as it was; save the model with a head of its own first (tie_word_embeddings false)"
            )

    def _names(self, key: keys.Key) -> list[str]:
        return [name for name, module in self.modules.items() if module.key == key]

    def _grouped(self, names: Iterable[str]) -> list[tuple[keys.Key, list[str]]]:
        chosen = set(names)
        table = dict.fromkeys(module.key for name, module in self.modules.items() if name in chosen)
        return [(key, [name for name in self._names(key) if name in chosen]) for key in table]

    def _expect(
        self, names: Iterable[str], parts: Callable[[keys.Key], tuple[Part, ...]], ranks: Mapping[str, int]
    ) -> None:
        for name in names:
            key = self.modules[name].key
            for part in parts(key):
                self.expected[f"{PREFIX}{name}.{part.suffix}"] = layout.shape(part, key, self.config, ranks[name])

    def _stacked(
        self, key: keys.Key, names: list[str], parts: tuple[Part, ...], rank: int, fill: float = 0.0
    ) -> dict[str, Any]:
        """The arrays of one weight, of all its layers, filled up where a layer has none or a smaller rank."""
        arrays = {}
        for part in parts:
            shape = layout.shape(part, key, self.config, rank)
            x = np.full((layout.layers(key, self.config), *shape), fill, np.float32)
            for name in names:
                one = self.file.tensor(f"{PREFIX}{name}.{part.suffix}")
                x[(self.modules[name].layer, *map(slice, one.shape))] = one
            arrays[part.field] = layout.from_file(x, part, key, self.config)
        return arrays

    def _check_copies(self) -> None:
        for name in sorted(self.file.names & self.copies.keys()):
            key = self.copies[name].key
            self.file.check({name: list(keys.file_shape(key, self.config))}, self.file.names)
            here = self.base[key.path]
            if self.force or is_stored(here):
                continue
            saved = keys.from_file(self.file.tensor(name), key, self.config).astype(here.dtype)
            if not np.array_equal(np.asarray(here), saved):
                raise ValueError(
                    f"{self.file.path}: {name} is not this base's weight; load the base that it was trained over, or "
                    "force it"
                )
