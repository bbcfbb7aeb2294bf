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
    "lift": ["f", "materialise"],
    "merge": ["params", "adapters"],
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
DATA = {"Attached", "Axes", "LiftError", "LoRA", "Report", "Rule", "Site", "Sites", "Spec", "Use"}


def test_names_and_signatures():
    assert set(lora.__all__) == set(SIGNATURES) | DATA
    for name, parameters in SIGNATURES.items():
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
