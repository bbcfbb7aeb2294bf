"""config.json files of other years, and with fields left out, are read as transformers reads them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cost import flops
from lora_jax.models import config as configs
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LINEAR = {"type": "linear", "factor": 8.0}
# As in files of Llama 4: nothing is between the frequencies that are slowed and those that are not.
LLAMA3 = {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
FILES = {
    "llama": {"rope_theta": 5e5, "rope_scaling": LINEAR},
    "llama, yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
    "llama, yarn not cut": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 3}},
    "mistral": {},
    "mistral, no window": {"sliding_window": None, "head_dim": 32},
    "qwen2": {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 3},
    "qwen2, sliding": {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3},
    "qwen3": {},
    "gemma": {"hidden_act": "gelu"},
    "gemma2": {},
    "gemma2, no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": {},
    "gemma3_text, scaled": {"sliding_window_pattern": 3, "rope_theta": 9e5, "rope_local_base_freq": 5e3}
    | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 16},
    "phi3": {},
    "phi3, long": {"rope_scaling": {"type": "longrope", **LONG}, "partial_rotary_factor": 0.75}
    | {"original_max_position_embeddings": 32},
    "phi3, yarn": {"rope_scaling": {"type": "yarn", **LONG}, "original_max_position_embeddings": 32}
    | {"partial_rotary_factor": 0.75},
    "olmo2": {"rope_theta": 5e5},
    "smollm3": {},
    "smollm3, listed": {"no_rope_layers": [1, 1, 0, 1, 1, 0], "tie_word_embeddings": False},
    "smollm3, sliding": {"use_sliding_window": True, "sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 16, "norm_topk_prob": True},
    "qwen3_moe, sliding": {"use_sliding_window": True, "sliding_window": 16, "attention_bias": True},
    "qwen2_moe": {"num_experts": 16},
    "qwen2_moe, sliding": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe, shared as wide": {"shared_expert_intermediate_size": 1408, "qkv_bias": False, "norm_topk_prob": True},
    "llama4_text": {},
    "llama4_text, scaled": {"rope_scaling": {**LLAMA3, "rope_type": "llama3"}, "attention_bias": True},
    "llama4_text, listed": {"no_rope_layers": [1, 0, 1, 1, 0, 0], "attention_chunk_size": 16, "floor_scale": 4},
    "llama4_text, none of it": {"use_qk_norm": False, "attn_temperature_tuning": False, "attn_scale": 0.2}
    | {"layer_types": ["full_attention"] * 6, "num_experts_per_tok": 2},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "attention_multiplier": 0.01},
}


def written(name):
    """The config as its file has it."""
    return {"model_type": name.split(",")[0], **SIZES, **FILES[name]}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_transformers_reads_them(name):
    ours = configs.from_hf(written(name))
    values = written(name)
    theirs = transformers.AutoConfig.for_model(values.pop("model_type"), **values).to_dict()
    assert ours == configs.from_hf(theirs)
    assert ours != configs.from_hf({**theirs, "vocab_size": 65})


PROPERTIES = {
    "window": {"window": 3},
    "window of some layers": {"window": 3, "sliding": (True, False)},
    "unrotated": {"unrotated": (True, False)},
    "neighbours": {"rope_neighbours": True},
    "pieces": {"chunk": 3},
    "pieces in some layers": {"chunk": 3, "chunked": (True, False)},
    "norms after rotation": {"qk_norm": "rotated"},
    "norms of what is rotated": {"qk_norm": "rotated", "unrotated": (True, False)},
    "local rope": {"window": 99, "sliding": (True, False), "local_rope_base": 10.0},
    "partial rotation": {"rotary_dim": 4},
    "rope scale": {"rope_scale": 1.5},
    "rope factors": {"rope_factors": (1.0, 2.0, 3.0, 4.0)},
    "rope stretch": {"rope_stretch": 4.0},
    "long factors": {"rope_long_factors": (2.0, 2.0, 3.0, 4.0), "rope_factors": (1.0,) * 4, "rope_original": 6},
    "norm offset": {"norm_offset": 1.0},
    "activation": {"activation": "gelu_tanh"},
    "embedding scale": {"embed_scale": 3.0},
    "residual scale": {"residual_scale": 0.5},
    "logit scale": {"logit_scale": 0.5},
    "score scale": {"attn_scale": 0.1},
    "score cap": {"attn_cap": 0.5},
    "logit cap": {"logit_cap": 0.5},
}
PLAIN = DecoderConfig("llama", 61, 32, 48, 2, 4, 2, 8, context=8)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 3, decoder.init(jax.random.key(0), PLAIN))


@pytest.mark.parametrize("changes", PROPERTIES.values(), ids=PROPERTIES)
def test_every_property_matters(params, changes, quick):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))
    forward = jax.jit(decoder.forward, static_argnames="config")
    changed = forward(params, x, dataclasses.replace(PLAIN, **changes))
    assert np.abs(changed - forward(params, x, PLAIN)).max() > 1e-3
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hidden = functools.partial(decoder.hidden, config=dataclasses.replace(PLAIN, **changes))
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(hidden, half, x).dtype == jnp.bfloat16


def test_queries_grow_where_nothing_rotates(params, quick):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 12)))
    forward = jax.jit(decoder.forward, static_argnames="config")
    unrotated, growth = {"unrotated": (True, False)}, {"query_growth": (3, 0.5)}
    before = forward(params, x, dataclasses.replace(PLAIN, **unrotated))
    after = forward(params, x, dataclasses.replace(PLAIN, **unrotated, **growth))
    np.testing.assert_allclose(after[:, :2], before[:, :2], atol=1e-6)  # by log(1 + 0)
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_array_equal(forward(params, x, dataclasses.replace(PLAIN, **growth)), forward(params, x, PLAIN))


def test_texts_are_cut_where_they_begin(params, quick):
    """A piece computes what it computes alone, wherever it is in a row, and in the cache too."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 10)))
    forward = jax.jit(decoder.forward, static_argnames="config")
    config = dataclasses.replace(PLAIN, chunk=4)
    positions, segments = jnp.array([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6]]), jnp.array([[0] * 3 + [1] * 7])
    together = forward(params, x, config, positions, segments)
    for start, end in ((0, 3), (3, 7), (7, 10)):
        alone = forward(params, x[:, start:end], PLAIN, positions[:, start:end])
        np.testing.assert_allclose(together[:, start:end], alone, atol=1e-4)
    assert np.abs(together - forward(params, x, PLAIN, positions, segments)).max() > 1e-2
    cache, step = decoder.init_cache(config, 1, 7), jax.jit(decoder.forward_with_cache, static_argnames="config")
    for t in range(3, 10):
        logits, cache = step(params, x[:, t : t + 1], config, positions[:, t : t + 1], cache)
        np.testing.assert_allclose(logits, together[:, t], atol=1e-4)


def test_layers_that_differ_are_still_one_scan(params):
    """A program does not grow with the layers, nor its products with what differs between them."""
    many = {"window": 3, "sliding": (True, False) * 20, "local_rope_base": 10.0, "layers": 40}
    few = {"window": 3, "sliding": (True, False), "local_rope_base": 10.0}
    x = jax.ShapeDtypeStruct((2, 12), jnp.int32)

    def equations(**changes):
        config = dataclasses.replace(PLAIN, **changes)
        shapes = jax.eval_shape(functools.partial(decoder.init, config=config), jax.random.key(0))
        forward = functools.partial(decoder.forward, config=config)
        return str(jax.make_jaxpr(forward)(shapes, x)).count(" = "), flops(forward, shapes, x)

    assert equations(**many)[0] == equations(**few)[0] < 1.5 * equations()[0]
    assert equations(**few)[1] == equations()[1]


def test_blocks_leave_out_what_is_before_a_window_of_all_layers(params):
    x = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    cost = [
        flops(functools.partial(decoder.forward, config=dataclasses.replace(PLAIN, **changes)), params, x)
        for changes in ({"window": 128}, {"window": 128, "sliding": (True, False)})
    ]
    assert cost[0] < cost[1]
