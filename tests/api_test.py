"""The public names and their signatures: what users may rely on."""

import inspect
import subprocess
import sys

import lora_jax as lora

SIGNATURES = {
    "attach": ["params", "adapters", "key"],
    "combine": ["trees"],
    "count": ["tree"],
    "init": ["key", "params", "sites", "spec"],
    "labels": ["adapters"],
    "lift": ["f", "materialise"],
    "lora_plus": ["make", "rate", "adapters", "ratio"],
    "merge": ["params", "adapters", "full_precision"],
    "merge_error": ["params", "adapters"],
    "nbytes": ["tree"],
    "optimizer": ["tx", "mask"],
    "replaced": ["params", "adapters"],
    "report": ["f", "params", "args", "spec", "materialise", "kwargs"],
    "select": ["sites", "spec"],
    "split": ["tree", "mask"],
    "trace": ["f", "params", "args", "kwargs"],
    "trainable_mask": ["tree"],
    "unmerge": ["merged", "adapters", "kept"],
}
# Classes that users make, with what they are made of.
MADE = {
    "AdaLoRA": ["a", "e", "b", "scale", "axes", "dropout"],
    "Attached": ["params", "adapters", "key"],
    "Axes": ["stacked", "inp", "out"],
    "Bottleneck": ["down", "up", "axes"],
    "DoRA": ["lora", "m"],
    "IA3": ["l", "axes", "side"],
    "Leaf": ["value"],
    "LoRA": ["a", "b", "scale", "axes", "dropout", "start", "frozen", "common"],
    "Rows": ["delta", "rows", "axes"],
    "Rule": [
        *("target", "rank", "alpha", "rslora", "dropout", "init", "method"),
        *("share", "active_experts", "rows", "side"),
    ],
    "Spec": ["rules", "exclude", "fields"],
    "VeRA": ["d", "e", "axes", "dropout"],
}
# What the library makes.
DATA = {"LiftError", "Report", "Site", "Sites", "Use"}


def test_names_and_signatures():
    assert sorted(lora.__all__) == sorted([*SIGNATURES, *MADE, *DATA])
    for name, parameters in (SIGNATURES | MADE).items():
        assert list(inspect.signature(getattr(lora, name)).parameters) == parameters, name


def test_every_public_name_is_documented():
    for name in lora.__all__:
        assert inspect.getdoc(getattr(lora, name)), name


def test_import_needs_jax_numpy_and_optax_alone():
    """Everything else is imported by the module that needs it."""
    heavy = ["flax", "orbax", "grain", "tokenizers", "gguf", "safetensors", "jinja2", "absl.flags", "ml_collections"]
    code = f"import sys, optax; had = set(sys.modules); import lora_jax; print(set({heavy}) & set(sys.modules) - had)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
