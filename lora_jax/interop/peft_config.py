"""PEFT's `adapter_config.json`: what it asks for, and whether it can be had here."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.interop.safetensors import read_json
from lora_jax.tree import nearest

NAME = "adapter_config.json"
LARGEST = 1e12  # no number of a config that means something is larger
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SOFT = (
    "num_virtual_tokens",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "num_transformer_submodules",
    "modules_to_save",
)
UNDERSTOOD = {
    "LORA": (
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights"),
        *(*_TARGETS, *_PATTERNS, "trainable_token_indices", "target_parameters"),
    ),
    "VERA": ("r", "vera_dropout", "save_projection", "bias", *_TARGETS),
    "IA3": ("feedforward_modules", *_TARGETS),
    "TRAINABLE_TOKENS": ("token_indices", "target_modules"),
    "PROMPT_TUNING": _SOFT,
    "PREFIX_TUNING": _SOFT,
}
# They say where a file comes from or how training began, not what it computes.
HARMLESS = (
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config", "d_initial", "projection_prng_key"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "init_weights", "init_ia3_weights"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    "encoder_hidden_size",
)
REFUSED = (
    *("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "fan_in_fan_out", "kasa_config"),
    *("layer_replication", "lora_bias", "megatron_config", "monteclora_config", "prefix_projection"),
    *("use_bdlora", "use_qalora", "velora_config"),
)
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class Settings:
    """A config that was read: its kind, its values, and which modules they mean.

    Args:
      path: of the file, for errors.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no config of an adapter, or asks for what is not supported here, named.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the folder of a PEFT adapter")
        self.path = path
        self.values = read_json(path)
        self.kind = str(self.values.get("peft_type"))
        if self.kind not in UNDERSTOOD:
            raise ValueError(f"{path}: peft_type {self.kind!r} is not supported; use one of: {', '.join(UNDERSTOOD)}")
        if self.values.get("task_type") not in ("CAUSAL_LM", None):
            raise ValueError(f"{path}: task_type {self.values['task_type']!r} is not supported, only 'CAUSAL_LM'")
        for name in REFUSED:
            if self.values.get(name):
                raise ValueError(
                    f"{path}: {name}={self.values[name]!r} changes what the adapter computes, and is not supported; "
                    "merge it with PEFT"
                )
        start = self.values.get("init_lora_weights")
        if not (start is None or isinstance(start, bool) or start in STARTS):
            raise ValueError(
                f"{path}: init_lora_weights={start!r} belongs to a base that was changed; save it with PEFT's "
                "path_initial_model_for_weight_conversion"
            )
        known = {*UNDERSTOOD[self.kind], *HARMLESS, *REFUSED}
        if unknown := sorted({*self.values} - known):
            warnings.warn(f"{path}: unknown settings are ignored: {', '.join(unknown)}", stacklevel=4)

    def number(self, name: str, least: float, default: float | None = None) -> Any:
        """A number of the config, at least `least`; an integer where that is one."""
        value = self.values.get(name, default)
        return self._number(name, value, least)

    def _number(self, name: str, value: Any, least: float) -> Any:
        kinds = int if isinstance(least, int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= LARGEST:
            raise ValueError(f"{self.path}: {name} is {value!r}, and should be a number, at least {least:g}")
        return value

    def targets(self, names: Sequence[str]) -> list[str]:
        """Which of the modules are adapted, as PEFT finds them.

        Args:
          names: of all matrices of the model.

        Raises:
          ValueError: it is none of them, or a pattern is no regular expression.
        """
        targets = self._names("target_modules")
        if targets == "all-linear":
            raise ValueError(f"{self.path}: target_modules 'all-linear' names no modules; list them, as PEFT does")
        if not targets:
            raise ValueError(f"{self.path}: target_modules is {targets!r}; name the modules, as PEFT does on saving")
        out = self._names("exclude_modules")
        whole = self._names("modules_to_save")
        whole = [whole] if isinstance(whole, str) else whole
        found = [
            name
            for name in names
            if self._means(targets, name)
            and not (out and self._means(out, name))
            and not any(self._match(rf"(^|.*\.){part}($|\..*)", name) for part in whole)
            and (isinstance(targets, str) or self._layer(name))
        ]
        if not found:
            raise ValueError(
                f"{self.path}: target_modules {targets!r} matches no module of this model; "
                f"nearest: {nearest(str(targets), names)}"
            )
        if not isinstance(targets, str):
            self._warn("target_modules", [t for t in targets if not any(self._means([t], n) for n in names)], names)
        return found

    def parameters(self) -> list[str]:
        """The entries of `target_parameters`: arrays of experts."""
        entries = self._names("target_parameters") if "target_parameters" in UNDERSTOOD[self.kind] else []
        return [entries] if isinstance(entries, str) else entries

    def ending(self, field: str, names: Sequence[str]) -> list[str]:
        """Which of the modules end in an entry of a field, as PEFT finds those that are saved whole or fed forward."""
        entries = self._names(field)
        if isinstance(entries, str):
            return [name for name in names if self._means(entries, name)]
        self._warn(field, [e for e in entries if not any(name.endswith(e) for name in names)], names)
        return [name for name in names if any(name.endswith(e) for e in entries)]

    def pattern(self, field: str, name: str, default: Any) -> Any:
        """A module's value: of the first pattern that matches its name, or the default."""
        least = 1 if field == "rank_pattern" else -LARGEST
        for pattern, value in self._patterns(field).items():
            if self._match(rf"(.*\.)?({pattern})$", name):
                return self._number(field, value, least)
        return default

    def check_patterns(self, names: Sequence[str]) -> None:
        """Warns of patterns that match none of the modules."""
        for field in _PATTERNS:
            idle = [p for p in self._patterns(field) if not any(self._match(rf"(.*\.)?({p})$", n) for n in names)]
            self._warn(field, idle, names)

    def _patterns(self, field: str) -> Mapping[str, Any]:
        value = self.values.get(field) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: {field} is {value!r}, and should map patterns to numbers")
        return value

    def _names(self, field: str) -> list[str] | str:
        value = self.values.get(field) or []
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise ValueError(f"{self.path}: {field} is {value!r}, and should be a list of names, or a pattern")
        return value

    def _means(self, entries: list[str] | str, name: str) -> bool:
        if isinstance(entries, str):
            return self._match(entries, name, re.fullmatch)
        return any(name == entry or name.endswith(f".{entry}") for entry in entries)

    def _layer(self, name: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self._names("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        layers = [layers] if isinstance(layers, int) else layers
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise ValueError(f"{self.path}: layers_to_transform is {layers!r}, and should be a list of numbers")
        return any(self._match(rf"(?:^|.*?\.){pattern}\.{layer}\.", name) for pattern in patterns for layer in layers)

    def _match(self, pattern: str, name: str, how: Callable = re.match) -> bool:
        try:
            return how(pattern, name) is not None
        except re.error as error:
            raise ValueError(f"{self.path}: {pattern!r} is not a regular expression ({error})") from None

    def _warn(self, field: str, idle: Iterable[str], names: Sequence[str]) -> None:
        for entry in idle:
            warnings.warn(
                f"{self.path}: {entry!r} of {field} matches no module of this model; nearest: {nearest(entry, names)}",
                stacklevel=5,
            )
