"""Adapters in PEFT's files, both ways: what PEFT has trained goes on here, and what is trained here goes on there.

adapters = peft.load("their-adapter", model.config, model.params)
peft.save("my-adapter", adapters, model.config, model.params, Card(base="HuggingFaceTB/SmolLM2-135M-Instruct"))
"""

from lora_jax.interop.card import Card as Card
from lora_jax.interop.peft_load import load as load
from lora_jax.interop.peft_load import load_many as load_many
from lora_jax.interop.peft_save import save as save
