"""Whole runs on eight devices, and how bases get there: `sharding_test.py` runs this file in a process of its own."""

import functools
import math

import distill_test
import dpo_test
import jax
import jax.numpy as jnp
import mesh_steps
import numpy as np
import optax
import pytest
import rl_test
import sft_test
import tiny

import lora_jax as lora
from lora_jax import sharding
from lora_jax.data import packing
from lora_jax.interop import hf, peft, safetensors
from lora_jax.models import keys
from train import distill, dpo, loop, methods, objective, placing, rl, sft, update

SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"), vocab_size=320, **SHAPE)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    changes = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    return tiny.write(tmp_path_factory.mktemp("experts"), vocab_size=320, **SHAPE, **changes)


def on(line, rules=(), **changes):
    """A mesh in context, and settings of a run on it."""
    config = sft_test.settings.sft()
    config.mesh, config.sharding.rules = line, rules
    config.update(changes)
    return jax.set_mesh(sharding.mesh(line)), config


@pytest.mark.parametrize("compute", ["plain", "parts", "packed"])
def test_a_run_on_a_mesh_is_the_run_on_one_device(folder, tmp_path, compute, quick, monkeypatch, capsys):
    """Losses, gradient norms, held-out losses, answers and the trained adapters; other data gives others."""
    changes = {
        "plain": {"eval__answers": 8},
        "parts": {"accumulate": 2, "loss_chunk": 24, "remat": "full", "eval__answers": 0},
        "packed": {"data__pack": True, "eval__answers": 0, "data__length": 40},
    }[compute]
    rows = {"batch_size": 8, "eval__batch_size": 8, "steps": 4, **changes}
    # Adam divides a gradient by its own size, and makes as much of a rounding error where that is next to nothing.
    monkeypatch.setattr(optax, "adamw", functools.partial(optax.adamw, eps=1e-3))

    def trained(name, **more):
        config = sft_test.configured(folder, tmp_path, **rows, **more)
        sft.train(config, tmp_path / name, name)
        lines = loop.read(tmp_path / name / "metrics.jsonl")
        names = ("loss", "gradient_norm", "heldout_loss")
        numbers = [line[name] for line in lines for name in names if name in line]
        said = (tmp_path / name / "samples.jsonl").read_text() if compute == "plain" else ""
        return np.array(numbers), said, sft_test.final(tmp_path / name)

    numbers, said, final = trained("one")
    assert "one of 8 devices computes; --config.mesh=data=8 takes all" in capsys.readouterr().out
    there, also, other = trained("mesh", mesh="fsdp=2,data=2,tensor=2" if compute == "plain" else "fsdp=4,tensor=2")
    assert "devices computes" not in capsys.readouterr().out
    np.testing.assert_allclose(there, numbers, rtol=1e-5)
    assert also == said
    change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), other, final)
    assert float(optax.tree.norm(change)) < 1e-5 * float(optax.tree.norm(final))
    if compute == "plain":
        assert not np.allclose(trained("else", seed=1)[0], numbers, rtol=1e-3)


@pytest.mark.parametrize("trainer", [dpo_test, distill_test, rl_test])
def test_other_trainers_too(folder, tmp_path, trainer, quick, monkeypatch):
    (tmp_path / "tiny_rewards.py").write_text("def plain(answer, entry):\n    return float(len(answer))\n")
    monkeypatch.syspath_prepend(tmp_path)
    more = {
        dpo_test: {"steps": 2, "batch_size": 8},
        distill_test: {"steps": 2, "batch_size": 8, "on_policy": True},
        rl_test: {"steps": 1},
    }[trainer]
    train = {dpo_test: dpo.train, distill_test: distill.train, rl_test: rl.train}[trainer]

    def trained(name, **changes):
        train(trainer.configured(folder, tmp_path, **more, **changes), tmp_path / name, name)
        names = ("loss", "gradient_norm", "heldout_loss", "reward", "heldout_reward", "length")
        return [line[name] for line in loop.read(tmp_path / name / "metrics.jsonl") for name in names if name in line]

    numbers = trained("one")
    np.testing.assert_allclose(trained("mesh", mesh="fsdp=4,tensor=2"), numbers, rtol=1e-5, atol=1e-6)
    assert not np.allclose(trained("else", seed=1), numbers, rtol=1e-3)


@pytest.mark.parametrize(
    ("line", "quantize"),
    [("fsdp=8", ""), ("data=2,fsdp=2,tensor=2", ""), ("expert=4,data=2", ""), ("data=4,fsdp=2", "nf4")],
)
def test_padded_packed_and_accumulated_updates_are_the_plain_one(folder, experts, line, quantize, quick):
    model = experts if "expert" in line else folder
    rng = np.random.default_rng(0)
    lengths = [5, 12, 20, 7, 11, 3, 9, 16] * 2
    learned = [1 + n // 3 for n in lengths]
    examples = [
        packing.Tokens("x", rng.integers(0, 300, n + 1, np.int32), np.arange(n + 1) > n - k)
        for n, k in zip(lengths, learned, strict=True)
    ]

    def rows(length=24, pack=False):
        chosen = packing.rows(examples, length, pack)
        return packing.batch(chosen + [[]] * (-len(chosen) % 8), length)

    def moved(batch, line="", accumulate=1, **options):
        context, config = (
            on(line) if line else (jax.set_mesh(sharding.mesh("", jax.devices()[:1])), sft_test.settings.sft())
        )
        with context:
            config.model, config.quantize = str(model), quantize
            m = methods.load(config, jnp.dtype("float32"))
            config.lora.rank, tx = 4, optax.sgd(1.0)
            base, adapters, gather = placing.started(config, m.config, *methods.start(jax.random.key(0), config, m))
            adapters = jax.tree.map(lambda x: x + 0.01, adapters)
            before = jax.tree.map(np.array, adapters)
            nll = functools.partial(objective.negative_log_likelihood, shape=m.config, **{"learned": 9, **options})
            kept = placing.kept(adapters, tx.init(adapters))
            step = update.make_update(methods.applied(nll), methods.runner(config, m), tx, accumulate, kept, gather)
            new, _, numbers = step(adapters, tx.init(adapters), base, batch, jax.random.key(0))
            assert jax.tree.map(lambda x: x.sharding, new) == kept[0]
        return jax.tree.map(lambda old, new: old - np.asarray(new), before, new), float(numbers["loss"])

    def same(got, expected):
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)
        largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected[0]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), got[0], expected[0])

    plain = moved(rows())
    same(moved(rows(), line), plain)
    same(moved(rows(length=40), line), plain)
    same(moved(rows(), line, accumulate=2, chunk=20, remat="full"), plain)
    same(moved(rows(pack=True), line, packed=True, learned=24), plain)
    others = jax.tree.map(lambda x: x[:8], rows())
    assert abs(moved(others, line)[1] - plain[1]) > 1e-3


@pytest.mark.parametrize("line", ["fsdp=8", "data=2,fsdp=2,tensor=2", "expert=4,data=2"])
def test_each_device_keeps_its_part_of_what_is_trained(folder, experts, line):
    """The factors and Adam's two moments, in four bytes each; undivided, about twice as much or more."""
    held, places = {}, []
    for divide in (True, False):
        context, config = on(line, model=str(experts if "expert" in line else folder))
        config.sharding.divide, config.lora.rank = divide, 4
        with context:
            m = methods.load(config, jnp.dtype("float32"))
            _, adapters, gather = placing.started(config, m.config, *methods.start(jax.random.key(0), config, m))
            state = adapters, optax.adam(1e-3).init(adapters)
            held[divide] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
            places.append(jax.tree.map(lambda x: x.sharding, gather(adapters)))
            jax.tree.map(np.testing.assert_array_equal, gather(adapters), adapters)
    assert places[0] == places[1] == jax.tree.map(lambda x: x.sharding, adapters)
    assert held[True] == pytest.approx(3 * 4 * lora.count(adapters) / 8, rel=0.01)
    assert held[False] > 1.9 * held[True]  # experts' factors are where the experts are, on four devices


@pytest.mark.parametrize(
    ("line", "quantised"),
    [("fsdp=8", ""), ("fsdp=2,tensor=2,data=2", ""), ("fsdp=2,tensor=2,data=2", "nf4"), ("expert=4,tensor=2", "")],
)
def test_what_is_read_into_shards_is_what_the_files_hold(folder, experts, line, quantised):
    model = str(experts if "expert" in line else folder)
    config = sft_test.settings.sft()
    config.model, config.quantize = model, quantised
    whole = methods.load(config, jnp.dtype("float32")).params
    context, config = on(line, model=model, quantize=quantised)
    with context:
        there = methods.load(config, jnp.dtype("float32")).params
        wanted = placing.base(config)(hf.load(model, weights=False).config, there)
        assert jax.tree.map(lambda x: x.sharding, there) == wanted
    assert any(not place.is_fully_replicated for place in jax.tree.leaves(wanted))
    jax.tree.map(np.testing.assert_array_equal, there, whole)


def test_a_shard_is_read_once_and_nothing_else(folder, monkeypatch):
    """Every byte of the file once, though four devices have each, and at a time only what a device has of a tensor."""
    reads, whole = [], safetensors.Files.tensor

    def tensor(self, name, index=None):
        x = whole(self, name, index)
        reads.append((name, x.nbytes))
        return x

    monkeypatch.setattr(safetensors.Files, "tensor", tensor)
    size = lora.nbytes(hf.load(folder).params)
    assert sum(n for _, n in reads) == size
    reads.clear()
    context, config = on("data=4,fsdp=2", model=str(folder))
    with context:
        methods.load(config, jnp.dtype("float32"))
    assert sum(n for _, n in reads) == size
    shape = hf.load(folder, weights=False).config
    parts = {key.hf: 4 * np.prod(keys.file_shape(key, shape)) // 2 for key in keys.table(shape)}
    assert all(n == parts[re_hole(name)] for name, n in reads)


def re_hole(name):
    """The name in the table of a layer's tensor."""
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))


@pytest.mark.parametrize("config", [mesh_steps.DENSE, mesh_steps.MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("options", [{}, mesh_steps.PARTS], ids=["plain", "parts"])
def test_only_base_shards_are_gathered_and_only_adapters_summed(config, options):
    step = mesh_steps.compiled(config, "fsdp=8", **options)
    mesh_steps.assert_lean(step)
    assert step.gathered()
    both = mesh_steps.compiled(config, "fsdp=4,tensor=2", **options)
    assert both.gathered() <= both.base_shards() and not both.gathered() & both.adapter_sizes()


@pytest.mark.parametrize(
    "shape",
    [
        (mesh_steps.ROWS, mesh_steps.LENGTH),
        (mesh_steps.ROWS, mesh_steps.LENGTH, mesh_steps.DENSE.dim),
        (1, mesh_steps.ROWS * mesh_steps.LEARNED, mesh_steps.DENSE.dim),
    ],
    ids=["tokens", "hidden", "learned"],
)
def test_activations_that_are_gathered_are_seen(shape):
    """Partner of the above."""
    step = mesh_steps.compiled(mesh_steps.DENSE, "fsdp=8", everywhere=shape)
    assert math.prod(shape) in step.gathered() - step.base_shards() and step.of_rows()
    with pytest.raises(AssertionError):
        mesh_steps.assert_lean(step)


def test_of_quantised_bases_it_is_codes_that_travel():
    """And not what they become, as XLA would have it."""
    config, line = mesh_steps.DENSE, "fsdp=4,data=2"
    step, left = (mesh_steps.compiled(config, line, nf4=True, stored=stored) for stored in (True, False))
    mesh_steps.assert_lean(step)
    assert not left.gathered() <= left.base_shards()
    assert step.exchanged["all-gather"].bytes < left.exchanged["all-gather"].bytes / 3


def test_each_policy_exchanges_what_it_says():
    """How many gathers run for adapters, and of how many elements: the numbers of docs/devices.md."""
    dense = functools.partial(mesh_steps.compiled, mesh_steps.DENSE, "fsdp=4,tensor=2", divide=False)
    usual = dense()
    assert usual.gathered() <= usual.base_shards()

    def more(step):
        assert step.gathered() - step.base_shards() <= step.adapter_sizes()
        now, before = (each.exchanged["all-gather"] for each in (step, usual))
        return now.count - before.count, (now.bytes - before.bytes) // 4

    assert more(dense(follow=("stacked",))) == (7, 12_288)
    assert more(dense(follow=("stacked", "inp", "out"))) == (28, 21_504)


def test_tokens_travel_to_experts_and_not_these_to_tokens():
    """Along "expert"; along "fsdp" they do."""
    config = mesh_steps.MOE
    there, here = (mesh_steps.compiled(config, f"{axis}=4,data=2") for axis in ("expert", "fsdp"))
    experts = {n * config.dim * config.hidden for n in (1, config.experts)}
    assert here.gathered() & experts and not there.gathered() & experts
    tokens = mesh_steps.ROWS * mesh_steps.LENGTH // 2  # of all devices along "expert"
    router = config.dim * config.experts
    assert there.gathered() == {tokens * config.dim, tokens * config.active_experts, router}
    assert not there.gathered() & there.adapter_sizes()


def test_adapters_are_gathered_once_where_they_are_divided():
    """In parts too; where they are not divided, nothing of them is gathered, and as much is summed."""
    divided, whole = (mesh_steps.compiled(mesh_steps.DENSE, "fsdp=8", accumulate=2, divide=x) for x in (True, False))
    mesh_steps.assert_lean(divided)
    assert whole.gathered_whole() == 0 and whole.gathered() == divided.gathered()
    assert whole.total("all-reduce") == pytest.approx(divided.total("all-reduce"), abs=32)


def test_without_the_decoders_constraints_xla_sums_activations():
    """Where they are divided as weights are; of these then no layer's is gathered."""
    config = mesh_steps.DENSE
    step = mesh_steps.compiled(config, "fsdp=8", constrained=False, divide=False)
    assert step.total("all-reduce") > 10 * lora.count(step.adapters)
    assert max(step.gathered()) <= config.vocab * config.dim < max(step.base_shards())


def test_a_quantised_run_goes_on_without_a_mesh(folder, tmp_path, quick, capsys):
    """Its base is the same, quantised weight by weight; so says its adapter's file. Another base is refused."""
    run, rows = tmp_path / "run", {"batch_size": 8, "eval__batch_size": 8, "eval__answers": 0, "quantize": "nf4"}
    for mesh, steps in (("data=4,fsdp=2", 2), ("", 4)):
        config = sft_test.configured(folder, tmp_path, **rows, mesh=mesh, steps=steps)
        sft.train(config, run, "run")
    assert "going on from step 2" in capsys.readouterr().out
    steps = [line["step"] for line in loop.read(run / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4]
    base = hf.load(folder, quantize={"all-linear": "nf4"})
    assert peft.load(run / "adapter", base.config, base.params)
    other = hf.load(folder, quantize={"all-linear": "int8"})
    with pytest.raises(ValueError, match="fingerprint"):
        peft.load(run / "adapter", other.config, other.params)
