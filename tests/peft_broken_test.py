"""Files that do not fit, are broken or would run code are one clear line, and what is ignored is said."""

import json
import pickle
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from lora_jax.adapters import Axes
from lora_jax.interop import peft, peft_config
from lora_jax.interop import safetensors as reader
from lora_jax.interop.peft_layout import PREFIX
from lora_jax.methods import LoRA

Q = PREFIX + "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("base") / "model", tie_word_embeddings=False)
    return reader.load(folder, jnp.float32)


@pytest.fixture
def folder(tmp_path, model):
    """An adapter of rank 2 of q_proj and down_proj."""
    config, params = model
    rng = np.random.default_rng(0)

    def low_rank(inp, out, axes):
        return LoRA(*(jnp.array(rng.normal(size=(2, *n, 2)), jnp.float32) for n in (inp, out)), 2.0, Axes((0,), *axes))

    q, down = low_rank((32,), (2, 16), ((1,), (2, 3))), low_rank((48,), (32,), ((1,), (2,)))
    adapters = {"layers/q_proj/kernel": q, "layers/down_proj/kernel": down}
    peft.save(tmp_path, adapters, config, params)
    return tmp_path


def settings(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    values = safetensors.numpy.load_file(path)
    change(values)
    safetensors.numpy.save_file(values, path)


def test_as_it_is_written_it_loads(folder, model):
    assert set(peft.load(folder, *model)) == {"layers/q_proj/kernel", "layers/down_proj/kernel"}


def missing(values):
    del values[f"{Q}.lora_A.weight"]


def unexpected(values):
    values[f"{Q}.bias"] = np.zeros(32, np.float32)


def prefixed(values):
    for name in list(values):
        values[name.removeprefix(PREFIX)] = values.pop(name)


def named(values):
    for name in list(values):
        values[name.replace("lora_A.", "lora_A.default.")] = values.pop(name)


def transposed(values):
    values[f"{Q}.lora_A.weight"] = np.ascontiguousarray(values[f"{Q}.lora_A.weight"].T)


def infinite(values):
    values[f"{Q}.lora_B.weight"][3, 1] = np.nan


def integers(values):
    values[f"{Q}.lora_B.weight"] = values[f"{Q}.lora_B.weight"].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, rf"1 missing \({Q}.lora_A.weight\); the file"),
        (unexpected, rf"1 unexpected \({Q}.bias\)"),
        (prefixed, r"8 missing .* and 8 unexpected \(model.layers.*do not begin with 'base_model.model.'"),
        (named, r"4 missing .* and 4 unexpected \(.*lora_A.default.weight"),
        (transposed, r"q_proj.lora_A.weight has shape \[32, 2\] where the config and this model ask for \[2, 32\]"),
        (infinite, "q_proj.lora_B.weight is not finite everywhere"),
        (integers, "q_proj.lora_B.weight holds I8"),
    ],
)
def test_tensors(folder, model, change, message):
    tensors(folder, change)
    line(folder, model, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported; use one of: LORA"),
        ({"peft_type": None}, "peft_type 'None' is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported"),
        ({"lora_bias": True}, "lora_bias=True changes what the adapter computes"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "down_proj' of target_parameters is no parameter of this"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' belongs to a base that was changed"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"bias": "some"}, "bias='some' is not supported"),
        ({"target_modules": ["qproj"]}, r"\['qproj'\] matches no module of this model; nearest: 'model.layers"),
        ({"target_modules": None}, "target_modules is .*; name the modules"),
        ({"target_modules": "all-linear"}, "'all-linear' names no modules"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": {"q_proj": 1}}, "should be a list of names, or a pattern"),
        ({"layers_to_transform": "0"}, "should be a list of numbers"),
        ({"r": 4}, r"has shape \[2, 32\] where .* ask for \[4, 32\]"),
        ({"r": 10**9}, r"ask for \[1000000000, 32\]"),
        ({"r": "2"}, "r is '2', and should be a number, at least 1"),
        ({"r": 0}, "r is 0, and should be a number, at least 1"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern is 2.5"),
        ({"rank_pattern": [3]}, "should map patterns to numbers"),
        ({"layers_to_transform": [0]}, "4 unexpected"),
        ({"modules_to_save": ["lm_head"]}, "1 missing .*lm_head.weight"),
        ({"trainable_token_indices": [2, 10**6]}, "are not different rows below"),
        ({"use_dora": True}, "4 missing .*lora_magnitude_vector"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, r"1 missing \(prompt_embeddings\)"),
        ({"peft_type": "VERA", "save_projection": False}, "save_projection is false"),
    ],
)
def test_settings(folder, model, changes, message):
    settings(folder, **changes)
    line(folder, model, message)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def lying(folder):
    header = json.dumps({f"{Q}.lora_A.weight": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}})
    data = len(header).to_bytes(8, "little") + header.encode() + b"\0" * 64
    (folder / "adapter_model.safetensors").write_bytes(data)


def not_json(folder):
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(cut, "not a whole safetensors file"), (lying, "not a whole safetensors file"), (not_json, "not valid JSON")],
)
def test_broken_files(folder, model, spoil, message):
    spoil(folder)
    line(folder, model, message)


def test_pickles_are_never_opened(folder, model, tmp_path):
    (folder / "adapter_model.safetensors").unlink()
    ran = tmp_path / "ran"
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Runs(str(ran))))
    line(folder, model, r"adapter_model.bin: pickled weights can run code and are never opened")
    assert not ran.exists()
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert ran.exists()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_spoilt_bytes_are_a_line_or_load(folder, model, name):
    path = folder / name
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        spoilt = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 1200), rng.integers(1, 4)):
            spoilt[place] = rng.integers(0, 256) if rng.random() < 0.5 else ord(rng.choice(list('0129{}[]",:-e.')))
        path.write_bytes(spoilt)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peft.load(folder, *model)
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error) and "\n" not in str(error)
    assert 100 < refused <= 300


VALUES = [
    None,
    True,
    -1,
    1.5,
    "x",
    "(",
    [],
    {},
    [-1],
    [1.5],
    ["x"],
    ["("],
    [None],
    [[1]],
    {"x": None},
    {"(": 2},
    10**400,
]


@pytest.mark.parametrize("kind", peft_config.UNDERSTOOD)
def test_any_value_of_any_setting_is_a_line_or_loads(folder, model, kind):
    path = folder / "adapter_config.json"
    good = json.loads(path.read_text()) | {"peft_type": kind, "token_indices": [1], "num_virtual_tokens": 2}
    for name in {*peft_config.UNDERSTOOD[kind], "peft_type", "task_type"}:
        for value in VALUES:
            path.write_text(json.dumps(good | {name: value}))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    peft.load(folder, *model)
                except ValueError as error:
                    assert "\n" not in str(error) and len(str(error)) < 2000


def test_nothing_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: no such file; give"):
        peft.load(tmp_path, *model)


def test_both_ends_of_one_matrix_are_refused(folder, tmp_path):
    tied = reader.load(tiny.write(tmp_path / "tied"), jnp.float32)
    settings(folder, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match="embed_tokens is adapted, but this model's head is the same matrix"):
        peft.load(folder, *tied, force=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_in_2030": 1}, "unknown settings are ignored: new_in_2030"),
        ({"target_modules": ["q_proj", "down_proj", "wq"]}, "'wq' of target_modules matches no module"),
        ({"rank_pattern": {"v_proj": 3}}, "'v_proj' of rank_pattern matches no module"),
    ],
)
def test_what_is_ignored_is_said(folder, model, changes, message):
    before = peft.load(folder, *model)
    settings(folder, **changes)
    with pytest.warns(UserWarning, match=message):
        after = peft.load(folder, *model)
    np.testing.assert_array_equal(after["layers/q_proj/kernel"].a, before["layers/q_proj/kernel"].a)


def line(folder, model, message):
    with pytest.raises(ValueError, match=message) as caught:
        peft.load(folder, *model)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
