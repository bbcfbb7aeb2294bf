"""GGUF files of every family that llama.cpp names load as the folders they were made from."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.interop import gguf as reader
from lora_jax.interop import gguf_config, safetensors
from lora_jax.models import decoder

tiny_llama = pytest.importorskip("tiny_llama")
tiny_families = pytest.importorskip("tiny_families")
tiny_gguf = pytest.importorskip("tiny_gguf")
pytestmark = pytest.mark.usefixtures("quick")
# What no GGUF file says is as in the released models: the scale of scores, and which layers slide or do not rotate.
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 5, "num_hidden_layers": 7}
CASES = {
    "Llama 2": {},
    "Llama 3.1, 3.2": {},
    "Llama, biases, YaRN": {},
    "Mistral": {},
    "Qwen2, Qwen2.5": {},
    "Qwen3": {},
    "Gemma 1": {},
    "Gemma 2": GEMMA,
    "Gemma 3 text": GEMMA | {"sliding_window_pattern": 6},
    "Phi-3, Phi-4": {},
    "Phi-4-mini": {},
    "OLMo 2": {},
    "SmolLM3": {"no_rope_layer_interval": 4, "num_hidden_layers": 5},
    "Granite": {},
    "Mixtral": {},
    "Qwen3-MoE, weights that add up to 1": {},
}
# transformers reads these files itself, but some sizes it takes from the defaults of its configs.
WIDE = {"head_dim": 256, "query_pre_attn_scalar": 256}
READ_BY_TRANSFORMERS = {
    "Llama 2": {},
    "Qwen2, Qwen2.5": {},
    "Qwen3": {"head_dim": 128},
    "Gemma 2": WIDE,
    "Gemma 3 text": WIDE,
    "Phi-3, Phi-4": {"vocab_size": 32064},
    "Qwen3-MoE, weights that add up to 1": {"moe_intermediate_size": 768},
}


@pytest.fixture
def made(tmp_path):
    def make(case, kind=tiny_gguf.FLOAT32, **changes):
        tiny_families.make(case, **CASES[case] | changes).save_pretrained(tmp_path / "model")
        return tmp_path / "model", tiny_gguf.write(tmp_path / "model.gguf", tmp_path / "model", kind)

    return make


@pytest.mark.parametrize("case", CASES)
def test_equals_the_folder(made, case):
    folder, path = made(case)
    (config, params), (theirs, expected) = (
        reader.load(reader.File(path), jnp.float32),
        safetensors.load(folder, "float32"),
    )
    for field in dataclasses.fields(config):
        ours, value = getattr(config, field.name), getattr(theirs, field.name)
        if isinstance(value, float | tuple):  # the metadata is in float32
            np.testing.assert_allclose(ours, value, rtol=1e-6, err_msg=field.name)
        else:
            assert ours == value or field.name == "family", field.name
    # Gemma's norms have the offset added in the file, which rounds.
    atol = 3e-7 * theirs.norm_offset
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), params, expected)
    kernel = params["layers"]["k_proj"]["kernel"]
    assert np.abs(kernel - expected["layers"]["k_proj"]["kernel"][..., ::-1]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("case", READ_BY_TRANSFORMERS)
def test_logits_equal_transformers_reading_the_same_file(made, tmp_path, case):
    _, path = made(case, **READ_BY_TRANSFORMERS[case])
    model = tiny_llama.transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype="float32")
    config, params = reader.load(reader.File(path), jnp.float32)
    x = np.random.default_rng(0).integers(3, 61, (2, 11))
    theirs = tiny_llama.logits(model.eval(), x)
    np.testing.assert_allclose(decoder.forward(params, x, config), theirs, atol=1e-4)
    assert np.abs(decoder.forward(params, x[:, ::-1], config) - theirs).max() > 0.1


@pytest.mark.parametrize("case", ["Qwen3-MoE, weights that add up to 1", "Phi-3, Phi-4", "Gemma 1"])
def test_quantised(made, case):
    """Experts are blocks of their own, fused tensors are split after they are dequantised."""
    sizes = {"moe_intermediate_size": 32} if "MoE" in case else {"intermediate_size": 64}
    folder, path = made(case, gguf.GGMLQuantizationType.Q8_0, **sizes)
    ours, exact = reader.load(reader.File(path), jnp.float32)[1], safetensors.load(folder, jnp.float32)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2.0**-6 * np.abs(b).max()), ours, exact)
    kernels = (params["layers"]["down_proj"]["kernel"] for params in (ours, exact))
    assert not np.array_equal(*kernels)


METADATA = {"general.architecture": "gemma3", "gemma3.vocab_size": 9}
METADATA |= {f"gemma3.{name}": 64 for name in ("embedding_length", "feed_forward_length", "context_length")}
METADATA |= {"gemma3.attention.head_count": 4, "gemma3.attention.layer_norm_rms_epsilon": 1e-6}


@pytest.mark.parametrize(("layers", "squared"), [(34, 8), (62, 16)])
def test_scale_of_scores_of_the_largest_gemma(layers, squared):
    metadata = METADATA | {"gemma3.block_count": layers, "gemma3.attention.key_length": 8}
    assert gguf_config.read(metadata, (), {}, "file").attn_scale == squared**-0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; use one of: llama, qwen2"),
        ({"gemma3.rope.scaling.type": "dynamic", "gemma3.rope.scaling.factor": 2.0}, "type 'dynamic' is not supported"),
        ({"gemma3.feed_forward_length": [64, 32]}, r"intermediate_size differs from layer to layer \(\[64, 32\]\)"),
    ],
)
def test_refused(changes, message):
    metadata = METADATA | {"gemma3.block_count": 2}
    assert gguf_config.read(metadata, (), {}, "file").tied
    with pytest.raises(ValueError, match=f"file: .*{message}"):
        gguf_config.read(metadata | changes, (), {}, "file")


def test_experts_that_are_not_there(made):
    _, path = made("Mixtral")
    file = reader.File(path)
    assert file.tensor("blk.0.ffn_gate_exps.weight", 4).shape == (48, 32)
    with pytest.raises(ValueError, match=r"ffn_gate_exps.weight \[5, 48, 32\] has no part \[5\]") as caught:
        file.tensor("blk.0.ffn_gate_exps.weight", 5)
    assert str(path) in str(caught.value)
