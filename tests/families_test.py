"""Every family computes what transformers computes, comes back from files as it went, and takes adapters."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lora
from lora_jax.interop import peft
from lora_jax.interop import safetensors as reader
from lora_jax.models import decoder, generate, keys

tiny_llama = pytest.importorskip("tiny_llama")
tiny_families = pytest.importorskip("tiny_families")
tiny_peft = pytest.importorskip("tiny_peft")
families_matrix = pytest.importorskip("families_matrix")
LENGTHS, NEW = [3, 9, 6], 12
forward = jax.jit(decoder.forward, static_argnames="config")
pytestmark = pytest.mark.usefixtures("quick")


def tokens(batch=2, length=20, seed=0):
    return np.random.default_rng(seed).integers(3, 61, (batch, length))


def rows(texts, length):
    """Positions and segments of two rows of as many texts."""
    return np.tile(np.arange(length), (2, texts)), np.tile(np.repeat(np.arange(texts), length), (2, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp("model")
        tiny_families.make(case).save_pretrained(folder)
        return folder, *reader.load(folder, jnp.float32)

    return make


every_case = pytest.mark.parametrize("case", tiny_families.CASES)
# What has most of the properties stands for all but in the slow tests.
QUICK = ("Gemma 3 text", "Phi-4-mini")
case_by_case = pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in tiny_families.CASES]
)


@every_case
def test_logits(made, case):
    _, config, params = made(case)
    x = tokens()
    ours = forward(params, x, config, *rows(1, 20))
    np.testing.assert_allclose(ours, tiny_families.logits(case, x), atol=1e-4)
    assert np.abs(ours - np.array(tiny_families.logits(case, x[:, ::-1]))).max() > 0.1


@case_by_case
def test_padding(made, case):
    _, config, params = made(case)
    x, real = tokens(), np.ones((2, 20), int)
    real[1, :7] = 0
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    theirs = np.concatenate(tiny_families.logits(case, [x[0], x[1, 7:]]))
    np.testing.assert_allclose(forward(params, x, config, positions, real)[real == 1], theirs, atol=1e-4)
    leaking = forward(params, x, config, positions, np.ones_like(x))[real == 1]
    assert np.abs(leaking - theirs).max() > 1e-3


@case_by_case
def test_packing(made, case):
    _, config, params = made(case)
    x = tokens()
    positions, segments = rows(2, 10)
    theirs = np.reshape(tiny_families.logits(case, x.reshape(4, 10)), (2, 20, -1))
    np.testing.assert_allclose(forward(params, x, config, positions, segments), theirs, atol=1e-4)
    assert np.abs(forward(params, x, config, positions, np.ones_like(x)) - theirs).max() > 1e-3


@case_by_case
def test_generation(made, case):
    _, config, params = made(case)
    prompts = tokens(3, 9)
    ours, _ = generate.generate(params, config, prompts, LENGTHS, NEW, eos_ids=())
    for row, prompt, length in zip(ours, prompts, LENGTHS, strict=True):
        prompt = tiny_llama.torch.tensor(prompt[None, :length])
        theirs = tiny_families.make(case).generate(prompt, do_sample=False, max_new_tokens=NEW, eos_token_id=-1)
        np.testing.assert_array_equal(row, theirs[0, length:])
    assert not np.array_equal(ours[0], ours[1])


@every_case
@pytest.mark.parametrize("shard_bytes", [2**30, 30_000], ids=["one file", "shards"])
def test_load_and_export(made, tmp_path, case, shard_bytes):
    folder, config, params = made(case)
    reader.save(tmp_path, config, params, shard_bytes)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    theirs = safetensors.numpy.load_file(folder / reader.WEIGHTS)
    files = reader.Files(tmp_path)
    assert set(files) == set(theirs)
    for name, x in theirs.items():
        np.testing.assert_array_equal(files.tensor(name), x, err_msg=name)
    again, loaded = reader.load(tmp_path, jnp.float32)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert (tmp_path / reader.INDEX).is_file() == (shard_bytes < 2**30)


@case_by_case
def test_adapters(made, case):
    """Trace, init, lift, gradients and merge."""
    _, config, params = made(case)
    f = functools.partial(decoder.forward, config=config)
    x = tokens(2, 8)
    sites = lora.trace(f, params, x)
    adapters = lora.init(jax.random.key(0), params, sites, lora.Spec(rank=2))
    projections = {f"layers/{name}_proj/kernel" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    if config.experts:
        projections.add("layers/router/kernel")
    if config.shared_experts:
        projections |= {f"layers/shared/{name}_proj/kernel" for name in ("gate", "up", "down")}
    assert set(adapters) == projections
    leaves, tree = jax.tree.flatten(adapters)
    rngs = jax.random.split(jax.random.key(1), len(leaves))
    adapters = tree.unflatten([0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(rngs, leaves, strict=True)])

    @jax.jit
    def lifted(adapters):
        y = lora.lift(f)(lora.attach(params, adapters), x)
        return jnp.mean(jax.nn.log_softmax(y)[..., 7]), y

    (_, y), gradients = jax.value_and_grad(lifted, has_aux=True)(adapters)
    merged = jax.jit(f)(lora.merge(params, adapters), x)
    np.testing.assert_allclose(y, merged, atol=1e-3 * float(jnp.abs(merged).max()))
    assert np.abs(y - jax.jit(f)(params, x)).max() > 1e-2
    for leaf in jax.tree.leaves(gradients):
        assert float(jnp.abs(leaf).max()) > 1e-7 and bool(jnp.all(jnp.isfinite(leaf)))


@case_by_case
def test_peft_round_trip(made, case, tmp_path):
    """PEFT computes with our files what we compute, and they are read as what was written."""
    _, config, params = made(case)
    x = tokens(2, 8)
    sites = lora.trace(functools.partial(decoder.forward, config=config), params, x)
    # Where there is a shared expert, PEFT adapts the experts' arrays as they are, and no router.
    arrays = bool(config.shared_experts)
    lacking = [key.path for key in keys.table(config) if "|" in key.file_axes and not key.array]
    if arrays:
        lacking.append("layers/router/kernel")
    adapters = lora.init(jax.random.key(0), params, sites, lora.Spec(rank=2, alpha=3, exclude=lacking))
    leaves, tree = jax.tree.flatten(adapters)
    rngs = jax.random.split(jax.random.key(1), len(leaves))
    adapters = tree.unflatten([0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(rngs, leaves, strict=True)])
    gate, up = (f"layers/{name}_proj/kernel" for name in ("gate", "up"))
    if arrays:  # gate and up have one `a` there
        adapters[up] = dataclasses.replace(adapters[up], a=adapters[gate].a)
    ours = lora.lift(decoder.forward)(lora.attach(params, adapters), x, config)
    peft.save(tmp_path, adapters, config, params, fused=arrays)
    tiny_peft.same(peft.load(tmp_path, config, params), adapters)
    theirs = tiny_llama.logits(tiny_peft.peft.PeftModel.from_pretrained(tiny_families.make(case), tmp_path).eval(), x)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, float(jnp.abs(ours).max())))
    assert np.abs(theirs - np.array(tiny_families.logits(case, x))).max() > 0.05


def test_docs_have_the_cases_and_tests():
    """docs/models.md has the table that families_matrix.py prints, but for the measured numbers."""
    text = (Path(__file__).parent.parent / "docs/models.md").read_text(encoding="utf-8")
    header, *lines = text[text.index("| tiny random model") :].split("\n\n")[0].split("\n")
    assert [header, lines.pop(0)] == families_matrix.HEADER.split("\n")
    assert [line.split(" | ")[0].strip("| ") for line in lines] == list(tiny_families.CASES)
    for line in lines:
        case, family, error = line.strip("| ").split(" | ")[:3]
        assert line == families_matrix.row(case, error, family) and float(error) < 1e-4
    for test in families_matrix.COLUMNS.values():
        assert any(cases.mark in globals()[test].pytestmark for cases in (every_case, case_by_case))
