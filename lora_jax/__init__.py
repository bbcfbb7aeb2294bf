"""LoRA for any JAX function: low-rank adapters as pure transforms of parameter trees.

sites    = lora.trace(f, params, x)                          # how f uses each weight; nothing is computed
adapters = lora.init(key, params, sites, lora.Spec(rank=16)) # a tree of their own; the base is untouched
y        = lora.lift(f)(lora.attach(params, adapters), x)    # factored: x·W + γ (x·a)·b
params2  = lora.merge(params, adapters)                      # W + γ a b, plain parameters again
"""

from lora_jax import arithmetic as arithmetic
from lora_jax.adapters import Axes
from lora_jax.bottleneck import Bottleneck
from lora_jax.leaves import Leaf, Rows
from lora_jax.lift import Attached, LiftError, attach, lift
from lora_jax.merge import merge, merge_error, replaced, unmerge
from lora_jax.methods import IA3, AdaLoRA, DoRA, LoRA, VeRA
from lora_jax.optim import labels, lora_plus, optimizer, trainable_mask
from lora_jax.report import Report, report
from lora_jax.spec import Rule, Spec, select
from lora_jax.start import init
from lora_jax.trace import Site, Sites, Use, trace
from lora_jax.tree import combine, count, nbytes, split

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "AdaLoRA",
    "Attached",
    "Axes",
    "Bottleneck",
    "DoRA",
    "Leaf",
    "LiftError",
    "LoRA",
    "Report",
    "Rows",
    "Rule",
    "Site",
    "Sites",
    "Spec",
    "Use",
    "VeRA",
    "attach",
    "combine",
    "count",
    "init",
    "labels",
    "lift",
    "lora_plus",
    "merge",
    "merge_error",
    "nbytes",
    "optimizer",
    "replaced",
    "report",
    "select",
    "split",
    "trace",
    "trainable_mask",
    "unmerge",
]
