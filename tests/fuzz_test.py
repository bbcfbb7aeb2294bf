"""Real files, spoilt ten thousand ways, load or are one clear line: no crash, nothing slow or large, nothing run."""

import copy
import json
import pathlib
import resource
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_gguf

from lora_jax.adapters import Axes
from lora_jax.interop import hf, peft
from lora_jax.interop import safetensors as reader
from lora_jax.methods import LoRA

ODD = (None, True, -1, 0, 1.5, "x", "(", "../../x", [], {}, [1], ["x"], [[1]], {"x": None}, 10**9, 10**30, 1e308)
SIZES = (0, 1, 2**31, 10**9, 2**62, 2**64 - 1)
MEMORY, SECONDS = 2**30, 5.0  # more than a case may take


def texts(rng, whole, head=4096):
    """Bytes changed, cut, repeated or put in, mostly where a header is."""
    spoilt = bytearray(whole)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, min(len(spoilt), head) if rng.random() < 0.8 else len(spoilt)))
        kind = rng.integers(0, 7)
        if kind == 0:
            del spoilt[place:]
        elif kind == 1:
            del spoilt[place : place + int(rng.integers(1, 40))]
        elif kind == 2:
            spoilt[place:place] = spoilt[place : place + int(rng.integers(1, 80))]
        elif kind == 3:
            spoilt[place : place + 8] = SIZES[rng.integers(0, len(SIZES))].to_bytes(8, "little")
        elif kind == 4:
            spoilt[place : place + 4] = bytes([0, 0, 192, 127])  # NaN
        else:
            byte = rng.integers(0, 256) if kind == 5 else ord(rng.choice(list('0129{}[]",:-e.')))
            spoilt[place : place + 1] = bytes([byte])
        if not spoilt:
            break
    return bytes(spoilt)


def values(rng, whole):
    """A JSON object with some of its values, or a value within one, of another kind."""
    node = top = json.loads(whole)
    for _ in range(rng.integers(1, 3)):
        while isinstance(node, dict | list) and node and rng.random() < 0.9:
            name = list(node)[rng.integers(0, len(node))] if isinstance(node, dict) else int(rng.integers(0, len(node)))
            if isinstance(node[name], dict | list) and node[name] and rng.random() < 0.7:
                node = node[name]
            else:
                node[name] = copy.deepcopy(ODD[rng.integers(0, len(ODD))])
                break
        node = top
    return json.dumps(top).encode()


def sharded(folder):
    index = {"weight_map": dict.fromkeys(reader.Files(folder), reader.WEIGHTS)}
    (folder / reader.INDEX).write_text(json.dumps(index))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What is spoilt: its file, how, and how it is read."""
    root = tmp_path_factory.mktemp("fuzz")
    folder, shards = tiny.write(root / "model"), tiny.write(root / "shards")
    sharded(shards)
    config, params = reader.load(folder, jnp.float32)
    rng = np.random.default_rng(0)
    a, b = (jnp.array(rng.normal(size=(2, *n, 2)), jnp.float32) for n in ((32,), (2, 16)))
    peft.save(root / "adapter", {"layers/q_proj/kernel": LoRA(a, b, 2.0, Axes((0,), (1,), (2, 3)))}, config, params)
    file = tiny_gguf.write(root / "model.gguf", folder)
    model, adapter = (lambda: reader.load(folder, jnp.float32)), (lambda: peft.load(root / "adapter", config, params))
    return {
        "safetensors": (folder / reader.WEIGHTS, texts, model),
        "config": (folder / "config.json", values, model),
        "config bytes": (folder / "config.json", texts, model),
        "index": (shards / reader.INDEX, values, lambda: reader.load(shards, jnp.float32)),
        "tokenizer config": (folder / "tokenizer_config.json", values, lambda: hf.load(folder, weights=False)),
        "tokenizer": (folder / "tokenizer.json", texts, lambda: hf.load(folder, weights=False)),
        "adapter": (root / "adapter/adapter_model.safetensors", texts, adapter),
        "adapter config": (root / "adapter/adapter_config.json", values, adapter),
        "gguf": (file, texts, lambda: hf.load(file)),
    }


KINDS = ("safetensors", "config", "config bytes", "index", "tokenizer config", "tokenizer", "adapter", "adapter config")


def spoil(places, kind, cases, seed):
    """Reads what is spoilt; returns how often it was refused."""
    path, change, read = places[kind]
    whole, rng, refused = path.read_bytes(), np.random.default_rng(seed), 0
    read()  # what is whole loads, and is compiled
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
        for case in range(cases):
            path.write_bytes(change(rng, whole))
            begun = time.process_time()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read()
            except (ValueError, FileNotFoundError) as error:
                refused += 1
                text = str(error)
                assert str(path.parent) in text and "\n" not in text and len(text) < 2000, (case, text)
            assert time.process_time() - begun < SECONDS, case
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        (path.parent / f"{kind}.last").write_bytes(path.read_bytes())
        path.write_bytes(whole)
    return refused


@pytest.mark.parametrize("kind", [*KINDS, "gguf"])
def test_spoilt(places, kind):
    assert spoil(places, kind, 40, seed=1) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "gguf"])
def test_spoilt_ten_thousand_ways(places, kind):
    assert spoil(places, kind, 1120, seed=2) > 100  # nine kinds
