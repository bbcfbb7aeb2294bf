"""A Hugging Face folder loads with the values that are in its files, or with one clear line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from lora_jax.interop import safetensors as reader
from lora_jax.models import config as configs
from lora_jax.models import keys


@pytest.fixture
def folder(tmp_path):
    return tiny.write(tmp_path / "model", num_key_value_heads=1, tie_word_embeddings=False)


def tensors(folder):
    return safetensors.numpy.load_file(folder / reader.WEIGHTS)


def rewrite(folder, change):
    values = tensors(folder)
    change(values)
    safetensors.numpy.save_file(values, folder / reader.WEIGHTS)


def test_values_are_those_of_the_file(folder):
    config, params = reader.load(folder, jnp.float32)
    files = tensors(folder)
    q = files["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["q_proj"]["kernel"][1].reshape(32, 32), q.T)
    np.testing.assert_array_equal(params["embed"]["embedding"], files["model.embed_tokens.weight"])
    o = files["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(params["layers"]["o_proj"]["kernel"][0].reshape(32, 32), o.T)
    assert not np.array_equal(params["layers"]["o_proj"]["kernel"][1].reshape(32, 32), o.T)
    assert params["layers"]["q_proj"]["kernel"].shape == (2, 32, config.heads, config.head_dim)


def test_written_back_every_tensor_is_bit_identical(folder):
    config, params = reader.load(folder, jnp.float32)
    files = tensors(folder)
    seen = set()
    for key in keys.table(config):
        leaf = params
        for part in key.path.split("/"):
            leaf = leaf[part]
        layers = np.asarray(leaf) if "{}" in key.hf else np.asarray(leaf)[None]
        for layer, x in enumerate(layers):
            seen.add(key.hf.format(layer))
            np.testing.assert_array_equal(keys.to_file(x, key, config), files[key.hf.format(layer)])
    assert seen == set(files)


class Asked:
    """A tensor that notes how much of it is asked for."""

    def __init__(self, x):
        self.x, self.size = x, 0

    def __getitem__(self, index):
        self.size += self.x[index].size
        return self.x[index]


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_a_part_of_a_parameter_is_cut_from_its_tensor_and_nothing_else_is_read(family):
    experts = {"experts": 4, "active_experts": 2} if family == "mixtral" else {}
    config = configs.DecoderConfig(family, 20, 24, 16, 2, 4, 2, 6, 64, tied=False, **experts)
    rng = np.random.default_rng(0)
    for key in keys.table(config):
        x = rng.normal(size=keys.file_shape(key, config))
        whole = keys.from_file(x, key, config)
        for axis, size in enumerate(whole.shape):
            index = [slice(None)] * whole.ndim
            index[axis] = slice(size // 2, size)
            asked = Asked(x)
            np.testing.assert_array_equal(keys.from_file(asked, key, config, tuple(index)), whole[tuple(index)])
            within = key.axes.split()[axis] == "h"  # of every head some: the heads are contiguous in the file
            assert asked.size == whole.size * (2 if within else 1) * (size - size // 2) // size


def test_dtype_is_the_one_asked_for(folder):
    _, exact = reader.load(folder, jnp.float32)
    _, half = reader.load(folder, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), exact, half)


def test_bfloat16_files_are_read_exactly(folder):
    rewrite(folder, lambda t: t.update({name: x.astype(jnp.bfloat16) for name, x in t.items()}))
    _, params = reader.load(folder, jnp.float32)
    file = tensors(folder)["model.embed_tokens.weight"]
    assert file.dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["embed"]["embedding"], file.astype(np.float32))


def shard(folder):
    values = tensors(folder)
    weight_map = {}
    for i, name in enumerate(sorted(values)):
        weight_map[name] = f"model-{i % 3 + 1:05}-of-00003.safetensors"
    for file in set(weight_map.values()):
        part = {name: values[name] for name, where in weight_map.items() if where == file}
        safetensors.numpy.save_file(part, folder / file)
    (folder / reader.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / reader.WEIGHTS).unlink()


def test_sharded_equals_single(folder):
    _, single = reader.load(folder, jnp.float32)
    shard(folder)
    _, sharded = reader.load(folder, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, single, sharded)


def remove_file(name):
    return lambda folder: (folder / name).unlink()


def write_file(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(folder):
    path = folder / reader.WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def drop(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def narrow(folder):
    def change(values):
        values["model.layers.1.mlp.up_proj.weight"] = np.zeros((40, 32), np.float32)

    rewrite(folder, change)


def spoil_a_value(value, dtype):
    def change(values):
        name = "model.layers.1.mlp.up_proj.weight"
        values[name] = values[name].astype(dtype)
        values[name][3, 5] = value

    return lambda folder: rewrite(folder, change)


def lose_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def wrong_shard(folder):
    shard(folder)
    index = json.loads((folder / reader.INDEX).read_text())
    moved = next(name for name, file in index["weight_map"].items() if file.startswith("model-00001"))
    index["weight_map"][moved] = "model-00002-of-00003.safetensors"
    (folder / reader.INDEX).write_text(json.dumps(index))


BROKEN = {
    "no config": (remove_file("config.json"), FileNotFoundError, "config.json: no such file; give the folder"),
    "broken config": (write_file("config.json", "{"), ValueError, "config.json: not valid JSON"),
    "list as config": (write_file("config.json", "[]"), ValueError, "holds a JSON list where an object"),
    "no weights": (remove_file(reader.WEIGHTS), FileNotFoundError, "model.safetensors: no such file; download"),
    "cut weights": (cut, ValueError, "model.safetensors: not a whole safetensors file .* download it again"),
    "empty weights": (write_file(reader.WEIGHTS, ""), ValueError, "not a whole safetensors file"),
    "tensor missing": (drop, ValueError, r"tensor model.layers.1.mlp.up_proj.weight \[48, 32\] is missing"),
    "wrong shape": (narrow, ValueError, r"up_proj.weight has shape \[40, 32\] where .* asks for \[48, 32\]"),
    "NaN": (spoil_a_value(np.nan, np.float32), ValueError, "up_proj.weight has values that are not finite"),
    "infinite": (spoil_a_value(-np.inf, jnp.bfloat16), ValueError, "up_proj.weight has values that are not finite"),
    "shard missing": (lose_shard, FileNotFoundError, "model-00002-of-00003.safetensors: no such file"),
    "wrong shard": (wrong_shard, ValueError, "00002-of-00003.safetensors: cannot read tensor .* download the file"),
    "empty index": (write_file(reader.INDEX, "{}"), ValueError, "index.json: has no weight_map"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_folder(folder, spoil, error, message):
    reader.load(folder, jnp.float32)
    spoil(folder)
    with pytest.raises(error, match=message) as caught:
        reader.load(folder, jnp.float32)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_large_values_are_finite(folder):
    def change(values):
        values["model.layers.1.mlp.up_proj.weight"][:2] = 3e38  # their sum is not

    rewrite(folder, change)
    assert reader.load(folder, jnp.float32)[1]["layers"]["up_proj"]["kernel"].max() == np.float32(3e38)


UNSUPPORTED = {
    "model_type": ({"model_type": "mamba"}, "config.json: model_type 'mamba' is not supported"),
    "activation": ({"hidden_act": "gelu"}, "activation 'gelu' is not supported, only silu or gelu_pytorch_tanh"),
    "both ways": ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
    "rope": ({"rope_scaling": {"rope_type": "none"}}, "rope type 'none' is not supported"),
    "few factors": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}, "head_dim": 8}
        | {"original_max_position_embeddings": 64},
        "1 rope_factors of rope type 'longrope' for 4 frequencies",
    ),
    "layer types": (
        {"sliding_window": 8, "layer_types": ["linear_attention", "full_attention"]},
        "layer_types linear_attention is not supported",
    ),
    "layers": ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, "4 layers are"),
    "heads": ({"num_key_value_heads": 3}, "2 query heads cannot share 3 key/value heads"),
    "no size": ({"intermediate_size": None}, "the model's hidden is None, and should be a whole number from 1 on"),
}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_config(changes, message):
    configs.from_hf(tiny.CONFIG | {"vocab_size": 9})
    with pytest.raises(ValueError, match=message):
        configs.from_hf(tiny.CONFIG | {"vocab_size": 9} | changes)


def test_missing_field_is_named():
    with pytest.raises(ValueError, match="the field 'vocab_size' is missing"):
        configs.from_hf(tiny.CONFIG)
