"""What an adapter's file says about itself: its base, how it was trained, and a model card of no more than that."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import lora_jax
from lora_jax.spec import Spec

BASE, VERSION, SPEC, TRAINING = "base_fingerprint", "lora_jax_version", "spec", "training"


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of an adapter; what is not given is not written.

    Attributes:
      base: name or folder of the base, as PEFT's `base_model_name_or_path`.
      spec: the rules that it was made by.
      data: what it was trained on.
      steps: updates made.
      losses: by name, such as `{"held-out loss before": 3.01, "held-out loss after": 0.36}`.
      command: that trained it.
      began: the adapter that training went on with; "" for one of its own.
    """

    base: str = ""
    spec: Spec | None = None
    data: str = ""
    steps: int | None = None
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    command: str = ""
    began: str = ""

    def metadata(self, fingerprint: str) -> dict[str, str]:
        """For a safetensors file, whose metadata are strings; `format` is what transformers asks for."""
        values: dict[str, Any] = {BASE: fingerprint, VERSION: lora_jax.__version__}
        if self.spec is not None:
            rules = [dataclasses.asdict(rule) for rule in self.spec.rules]
            values[SPEC] = json.dumps({"rules": rules, "exclude": self.spec.exclude})
        told = {"data": self.data, "steps": self.steps, "losses": dict(self.losses), "command": self.command}
        told["began"] = self.began
        if told := {name: value for name, value in told.items() if value not in ("", None, {})}:
            values[TRAINING] = json.dumps(told)
        return {"format": "pt", **values}

    def readme(self, fingerprint: str, kind: str, parameters: int) -> str:
        """The model card, Markdown with the metadata that model hubs read.

        Args:
          fingerprint: of the base.
          kind: PEFT's name of the method.
          parameters: how many numbers the file holds.

        Returns:
          The text of README.md.
        """
        front = {"base_model": self.base} if self.base else {}
        head = [f"{name}: {json.dumps(value)}" for name, value in {**front, "library_name": "peft"}.items()]
        facts = {
            "Base": f"{self.base or 'not named'}, fingerprint {fingerprint}",
            "Adapter": f"{kind}, {parameters:,} parameters",
            "Went on with": self.began,
            "Data": self.data,
            "Steps": "" if self.steps is None else f"{self.steps:,}",
            **{name[:1].upper() + name[1:]: f"{value:.4f}" for name, value in self.losses.items()},
            "Written by": f"lora_jax {lora_jax.__version__}",
        }
        rows = [f"- {name}: {' '.join(value.split())}" for name, value in facts.items() if value]
        lines = ["---", *head, "---", "", "# Adapter", "", *rows, ""]
        if self.command:
            lines += ["Trained with:", "", *(f"    {line}" for line in self.command.splitlines()), ""]
        lines += ["Nothing else is known here of how it was trained or of what it does well or badly.", ""]
        return "\n".join(lines)
