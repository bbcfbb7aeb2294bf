"""Writes adapters for PEFT and for all that read its files."""

import collections
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax.adapters import Adapter, check
from lora_jax.fingerprint import fingerprint
from lora_jax.grouping import written_out
from lora_jax.interop import peft_config, peft_experts, peft_soft
from lora_jax.interop import peft_layout as layout
from lora_jax.interop.card import Card
from lora_jax.interop.peft_file import WEIGHTS
from lora_jax.interop.peft_layout import PREFIX, Part
from lora_jax.leaves import Leaf, Rows
from lora_jax.methods import IA3, PROJECTIONS, AdaLoRA, DoRA, LoRA, VeRA
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
from lora_jax.soft import Prefix, Prompt
from lora_jax.tree import leaves_by_path, nearest

KINDS = {LoRA: "LORA", AdaLoRA: "LORA", DoRA: "LORA", VeRA: "VERA", IA3: "IA3"}
CARD = "README.md"


def save(
    folder: str | Path,
    adapters: Mapping[str, Adapter] | Prompt | Prefix,
    config: DecoderConfig,
    params: Any,
    card: Card | None = None,
    uniform: bool = False,
    fused: bool = False,
) -> None:
    """Writes adapters as PEFT does, with the fingerprint of their base and a model card.

    The scale γ becomes `lora_alpha` = γR with `use_rslora` false, exactly. Adapters that start elsewhere than at zero
    (PiSSA, OLoRA) become ordinary ones of rank 2R; AdaLoRA's become LoRA's with their singular values in `b`. A layer
    whose factors are zero, as it may be after `load`, is left out where others of its weight are not.

    Args:
      folder: made if it is not there; gets adapter_model.safetensors (float32), adapter_config.json and README.md.
      adapters: `{path: adapter}`, or a prompt or prefix.
      config: of the decoder that they are for.
      params: the decoder's.
      card: what is known of them.
      uniform: write every layer at its full rank, those of zeros too: files without patterns, as servers ask for.
      fused: write the experts of a layer as one parameter (`target_parameters`), not as a module for each; what is
        one array in the model's files always is.

    Raises:
      ValueError: the adapters are not the decoder's, are not finite, or PEFT has nothing that computes the same.
    """
    card, folder = card or Card(), Path(folder)
    if isinstance(adapters, Prompt | Prefix):
        tensors, settings = peft_soft.write(adapters, config)
    else:
        writer = _Writer(adapters, config, leaves_by_path(params), uniform, fused)
        tensors, settings = writer.tensors, writer.settings()
    for name, x in tensors.items():
        if not np.isfinite(x).all():
            raise ValueError(f"{name} is not finite everywhere: it is not written")
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": card.base or None, "inference_mode": True}
    base = fingerprint(params)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata=card.metadata(base))
    (folder / peft_config.NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    count = sum(x.size for x in tensors.values())
    (folder / CARD).write_text(card.readme(base, settings["peft_type"], count), encoding="utf-8")


class _Writer:
    """Collects the tensors of adapters, and what the config has to say of them."""

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        config: DecoderConfig,
        base: Mapping[str, Any],
        uniform: bool,
        fused: bool,
    ):
        self.config, self.base, self.adapters, self.uniform = config, base, adapters, uniform
        self.table = {key.path: key for key in keys.table(config)}
        self.modules = layout.modules(config)
        self.tensors: dict[str, np.ndarray] = {}
        self.adapted: dict[str, tuple[int, float]] = {}  # rank and scale of every module
        self.dropouts: set[float] = set()
        self.whole: list[str] = []  # modules
        self.forward: list[str] = []  # modules whose input IA³ rescales
        self.biases: dict[str, np.ndarray] = {}  # that are trained
        self.rows: dict[str, list[int]] = {}
        self.experts = peft_experts.Written({}, {}, [])
        own = {path: adapter for path, adapter in adapters.items() if path != PROJECTIONS}
        if unknown := [path for path in own if path not in self.table]:
            raise ValueError(
                f"{unknown[0]!r} is no parameter of this decoder; nearest: {nearest(unknown[0], self.table)}"
            )
        if not own:
            raise ValueError("there are no adapters to write")
        methods = {type(x): path for path, x in own.items() if not isinstance(x, Leaf | Rows)}
        if other := [kind for kind in methods if kind not in KINDS]:
            raise ValueError(
                f"the adapter of {methods[other[0]]!r} is a {other[0].__name__}, which PEFT does not have for a decoder"
            )
        forms = {"DoRA" if kind is DoRA else KINDS[kind] for kind in methods}
        if len(forms) > 1:
            raise ValueError(
                f"a PEFT adapter has one method, but {', '.join(f'{p!r} has {k.__name__}' for k, p in methods.items())}"
            )
        self.dora, self.kind = DoRA in methods, next((KINDS[kind] for kind in methods), "TRAINABLE_TOKENS")
        if not methods and any(isinstance(x, Leaf) for x in own.values()):
            raise ValueError("PEFT saves whole parameters beside adapters only, and there are none: merge them instead")
        for path, adapter in own.items():
            check(adapter, path, base[path].shape)
        # With experts as one parameter, theirs are written together.
        experts = {path for path in own if self.table[path].array or (fused and keys.leading(self.table[path]) > 1)}
        for path, adapter in own.items():
            if path not in experts:
                self._add(self.table[path], path, adapter)
        if experts:
            self._fused({path: own[path] for path in experts})
        if self.kind == "VERA":
            self._projections()
        self.bias = self._biases() if self.biases else "none"

    def settings(self) -> dict[str, Any]:
        """The config."""
        if self.kind == "TRAINABLE_TOKENS":
            ((name, rows),) = self.rows.items()
            return {"peft_type": self.kind, "target_modules": [name], "token_indices": rows}
        shared = {
            "peft_type": self.kind,
            "target_modules": self._named(self.adapted),
            "modules_to_save": self._named(self.whole, "") or None,
        }
        if self.kind == "IA3":
            return {**shared, "feedforward_modules": self._named(self.forward), "fan_in_fan_out": False}
        if len(self.dropouts) > 1:
            warnings.warn(f"PEFT has one dropout: of {sorted(self.dropouts)} the largest is written", stacklevel=3)
        sizes = self.adapted | self.experts.sizes
        dropout, rank = max(self.dropouts), collections.Counter(r for r, _ in sizes.values()).most_common(1)[0][0]
        if self.kind == "VERA":
            return {**shared, "r": rank, "vera_dropout": dropout, "save_projection": True, "bias": self.bias}
        alphas = {name: _alpha(scale, r) for name, (r, scale) in sizes.items()}
        alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
        return {
            **shared,
            **{"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": self.bias},
            **{"use_rslora": False, "use_dora": self.dora, "fan_in_fan_out": False, "init_lora_weights": True},
            "rank_pattern": self._patterns({name: r for name, (r, _) in sizes.items() if r != rank}),
            "alpha_pattern": self._patterns({name: value for name, value in alphas.items() if value != alpha}),
            "trainable_token_indices": self.rows or None,
            **({"target_parameters": self.experts.targets} if self.experts.targets else {}),
        }

    def _add(self, key: keys.Key, path: str, adapter: Any) -> None:
        if layout.embedding(key) and self.config.tied and not isinstance(adapter, Rows):
            raise ValueError(
                f"{path!r} is this model's head too, which PEFT would leave as it was: merge the adapter instead"
            )
        names = [name for name, module in self.modules.items() if module.key == key]
        if not names:
            raise ValueError(f"{path!r} is a part of {key.hf}, for whose parts PEFT has one adapter: merge it instead")
        if isinstance(adapter, Leaf):
            values = np.asarray(adapter.value)
            if not key.hf.endswith(".weight"):
                self.biases[path] = values
                return
            for name, x in zip(names, values.reshape(-1, *keys.shape(key, self.config)), strict=True):
                self.tensors[f"{PREFIX}{name}.weight"] = np.ascontiguousarray(keys.to_file(x, key, self.config))
            self.whole += names
        elif isinstance(adapter, Rows):
            place = ".token_adapter" if self.kind != "TRAINABLE_TOKENS" else ""
            table = layout.rows(self.base[path], adapter.rows)
            self.tensors[f"{PREFIX}{names[0]}{place}.trainable_tokens_delta"] = table + np.asarray(adapter.delta)
            self.rows[names[0]] = list(adapter.rows)
        elif isinstance(adapter, VeRA):
            self._put(key, names, adapter, {"d": adapter.d, "e": adapter.e}, layout.VERA, (1.0, adapter.dropout))
        elif isinstance(adapter, IA3):
            self._put(key, names, adapter, {"l": adapter.l}, layout.IA3[adapter.side], (1.0, 0.0))
            self.forward += [name for name in names if adapter.side == "in" and name in self.adapted]
        else:
            self._low_rank(key, path, names, adapter)

    def _low_rank(self, key: keys.Key, path: str, names: list[str], adapter: Any) -> None:
        lora, parts = adapter, layout.EMBEDDING if layout.embedding(key) else layout.LORA
        if isinstance(adapter, DoRA):
            if layout.embedding(key):
                raise ValueError(f"PEFT's DoRA of an embedding computes something else: {path!r} is not written")
            lora, parts = adapter.lora, layout.DORA
        lora = _plain(path, lora)
        arrays = {"a": lora.a, "b": lora.b} | ({"m": adapter.m} if self.dora else {})
        self._put(key, names, lora, arrays, parts, (lora.scale, lora.dropout))

    def _fused(self, experts: Mapping[str, Any]) -> None:
        for path, adapter in experts.items():
            if not isinstance(adapter, LoRA | AdaLoRA) or adapter.dropout:
                what = type(adapter).__name__ if not isinstance(adapter, LoRA | AdaLoRA) else "dropout"
                raise ValueError(
                    f"PEFT has no {what} for fused experts such as {path!r}: write a module for each, or merge"
                )
        self.experts = peft_experts.write({path: _plain(path, x) for path, x in experts.items()}, self.config)
        self.tensors |= self.experts.tensors
        self.dropouts.add(0.0)

    def _put(
        self,
        key: keys.Key,
        names: list[str],
        adapter: Any,
        fields: Mapping[str, Any],
        parts: tuple[Part, ...],
        scale_dropout: tuple[float, float],
    ) -> None:
        """Writes the arrays of one weight, module by module, without what stands for an adapter that is not there."""
        arrays = {}
        for part in parts:
            own = getattr(adapter.axes, part.side) if part.side else ()
            arrays[part] = layout.to_file(fields[part.field], part, own, key, self.config)
        scale, dropout = scale_dropout
        self.dropouts.add(dropout)
        for layer, (name, rank) in enumerate(zip(names, _ranks(arrays, self.uniform), strict=True)):
            if not rank:
                continue
            self.adapted[name] = (rank, scale)
            for part, x in arrays.items():
                cut = tuple(slice(rank if letter == "R" else None) for letter in part.axes)
                self.tensors[f"{PREFIX}{name}.{part.suffix}"] = np.ascontiguousarray(x[layer][cut])

    def _biases(self) -> str:
        """Writes what is trained, and the base's own where PEFT's setting, which is returned, means more of them."""
        if self.kind == "IA3":
            raise ValueError(
                f"{next(iter(self.biases))!r} is a bias, which PEFT's IA³ does not train; merge it instead"
            )
        every = {name: module for name, module in self.modules.items() if name.endswith(".bias")}
        deeper = {f"{name}.bias": f"{name}.base_layer.bias" for name in self.adapted}
        only = all(name in deeper for name, module in every.items() if module.key.path in self.biases)
        for name, (key, place) in every.items():
            if only and name not in deeper:
                continue
            values = self.biases.get(key.path, self.base[key.path])
            x = np.asarray(values, np.float32).reshape(-1, *keys.shape(key, self.config))[place]
            tensor = f"{PREFIX}{deeper.get(name, name)}"
            self.tensors[tensor] = np.ascontiguousarray(keys.to_file(x, key, self.config))
        return f"{self.kind.lower()}_only" if only else "all"

    def _projections(self) -> None:
        shared: Any = self.adapters.get(PROJECTIONS)
        if shared is None:
            raise ValueError(f"the adapters are VeRA's, but {PROJECTIONS!r}, its matrices, is not among them")
        table = {self.modules[name].key for name in self.adapted}
        wide, tall = (max(math.prod(layout.sizes(key, self.config, side)) for key in table) for side in ("inp", "out"))
        self.tensors["base_model.vera_A"] = np.ascontiguousarray(np.asarray(shared.a, np.float32)[:wide].T)
        self.tensors["base_model.vera_B"] = np.ascontiguousarray(np.asarray(shared.b, np.float32)[:tall])

    def _named(self, names: Iterable[str], dot: str = ".") -> list[str]:
        """The shortest list that means these modules and no others, as PEFT matches endings (after a dot)."""
        chosen, found = set(names), []
        for key in dict.fromkeys(self.modules[name].key for name in names):
            own = {name for name, module in self.modules.items() if module.key == key}
            parts = min(own, key=len).split(".")
            endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
            means = [{name for name in self.modules if f".{name}".endswith(f"{dot}{e}")} for e in endings]
            fitting = [e for e, meant in zip(endings, means, strict=True) if meant == own]
            found += fitting[:1] if fitting and own <= chosen else sorted(own & chosen)
        return found

    def _patterns(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A pattern for each value, and for each module of a weight where its layers differ."""
        found = {name: value for name, value in values.items() if name in self.experts.sizes}
        for key in dict.fromkeys(self.modules[name].key for name in values if name in self.modules):
            own = [name for name in self.adapted if self.modules[name].key == key]
            if len({values.get(name) for name in own}) == 1:
                found |= dict.fromkeys(self._named(own), values[own[0]])
            else:
                found |= {name: values[name] for name in own if name in values}
        return found


def _plain(path: str, adapter: Any) -> LoRA:
    """The two factors of an adapter, with its singular values in `b`."""
    if isinstance(adapter, AdaLoRA):
        b = adapter.b * adapter.e.reshape(*adapter.e.shape[:-1], *[1] * len(adapter.axes.out), adapter.e.shape[-1])
        adapter = LoRA(adapter.a, b, adapter.scale, adapter.axes, adapter.dropout)
    return written_out(path, adapter)


def _ranks(arrays: Mapping[Part, np.ndarray], uniform: bool) -> list[int]:
    """What is needed of each layer's rank, 0 where its adapter does nothing; all of it unless some layer needs that."""
    ranks = [x.shape[1 + part.axes.index("R")] for part, x in arrays.items() if "R" in part.axes]
    rank, uses = max(ranks, default=1), []
    for part, x in arrays.items():
        busy = x != (1.0 if part.field == "l" else 0.0)
        if len(ranks) == len(arrays):
            busy = busy.swapaxes(1, 1 + part.axes.index("R")).reshape(len(x), rank, -1).any(-1)
            uses.append((busy * np.arange(1, rank + 1)).max(-1))
        else:  # vectors beside the rank: all of it or nothing
            uses.append(rank * busy.reshape(len(x), -1).any(-1))
    needed = np.max(uses, 0)
    return [int(n) for n in needed] if needed.max() == rank and not uniform else [rank] * len(needed)


def _alpha(scale: float, rank: int) -> float:
    """α, of which PEFT makes the scale again: to the last bit, where any number does."""
    alpha = scale * rank
    for near in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if near / rank == scale:
            return int(near) if near == int(near) else near
    return alpha
