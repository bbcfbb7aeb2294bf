"""Plans: which machines there are, what a program takes of them, and what is said when it is too much."""

import copy
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import rich.console
import sft_test
from jax.sharding import AbstractMesh

import lora_jax as lora
from lora_jax import sharding
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from train import (
    advice,
    architectures,
    distill_settings,
    dpo_settings,
    forecast,
    methods,
    placing,
    plan,
    plan_table,
    programs,
    rl_settings,
    sft,
    topology,
    update,
)
from train import config as settings

TINY = DecoderConfig("llama", 512, 128, 256, 2, 4, 2, 32, 256)
# Billions of parameters, by the models' own cards.
SIZES = {
    "llama-3.2-1b": 1.24,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 406,
    "qwen3-8b": 8.19,
    "qwen3-30b-a3b": 30.5,
    "gemma-3-4b": 3.88,
    "gemma-3-12b": 11.8,
    "gemma-3-27b": 27.0,
}


def configured(**changes):
    config = settings.sft()
    with config.unlocked():
        config.update({"model": "llama-3.2-1b", "batch_size": 2, **changes})
        config.data.length = 64
    return config


def step_of_a_run(config, folder, monkeypatch):
    """What `train.sft` gives its step first, but for the key, and the step, lowered; nothing is trained."""
    found, make = [], update.make_update

    def run(*_, trainable, optimizer, update, batches, **__):
        batch = jax.device_put(next(batches), sharding.rows(jax.sharding.get_mesh()))
        update(trainable, optimizer, batch, jax.random.fold_in(jax.random.key(config.seed), 0))

    def recorded(*arguments):
        step = make(*arguments)

        def lower(*given):
            found.append((given[:-1], step.lower(*given)))

        return lower

    monkeypatch.setattr(sft, "make_update", recorded)
    monkeypatch.setattr(sft, "run", run)
    sft.train(config, folder / "run", "a run")
    return found[0]


def planned(config):
    """The step that is planned for all devices of this machine."""
    where = topology.get("here")
    rows, dtype = plan.read(config), plan.dtype_of(config, where)
    shape = plan.attending(config, rows.shape, where, dtype)
    return programs.training(config, shape, plan.mesh_of(config, where), dtype, rows.length, rows.learned)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(plan, "shape_of", lambda config: TINY)
    return topology.get("here")


def test_architectures_are_as_large_as_their_cards_say():
    assert set(architectures.ARCHITECTURES) == set(SIZES)
    for name, billions in SIZES.items():
        shape = architectures.decoder(name)
        params = jax.eval_shape(lambda shape=shape: decoder.init(jax.random.key(0), shape))
        assert lora.count(params) / 1e9 == pytest.approx(billions, rel=0.006), name


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e", "v9:2x2", "", "h100:3"])
def test_a_topology_that_does_not_exist(name):
    with pytest.raises(
        ValueError, match=f"^topology '{name}' does not exist; there are here, v5e:1x1, v5e:2x2, .* h100"
    ):
        topology.get(name)


@pytest.mark.parametrize(("name", "package"), [("v5e:4x4", "libtpu"), ("h100", f"jax-cuda12-pjrt=={jax.__version__}")])
def test_a_compiler_that_is_not_installed(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=re.escape("is not installed; run: pip install") + f".*{package}"):
        topology.get(name)


def test_target_descriptions(tmp_path):
    with pytest.raises(ValueError, match="'v5e:4x4' is none"):
        topology.get("v5e:4x4", "h200.txtpb")
    if importlib.util.find_spec("jax_cuda12_plugin"):
        with pytest.raises(FileNotFoundError, match=r"h200.txtpb: no such file; give XLA's description of a GPU"):
            topology.get("h100", str(tmp_path / "h200.txtpb"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"quantize": "nf4"}, {"method": "full"}, {"accumulate": 2}])
def test_arguments_are_those_that_the_compiler_counts(quick, here, changes):
    config = configured(**changes)
    mesh = plan.mesh_of(config, here)
    found = forecast.make(programs.training(config, TINY, mesh, jnp.float32, 64, 64), mesh, here)
    parts = {name: found.bytes.get(name, 0) for name in ("base", "adapters", "optimizer", "batch")}
    assert found.arguments == pytest.approx(sum(parts.values()), rel=0.01)
    assert found.state == sum(parts.values()) - parts["batch"]
    weights = 4 * lora.count(jax.eval_shape(lambda: decoder.init(jax.random.key(0), TINY)))
    if config.method == "full":
        assert parts["base"] == 0 and parts["adapters"] == weights
    elif config.quantize:
        assert parts["base"] < 0.6 * weights
    else:
        assert parts["base"] == weights
    assert parts["optimizer"] == pytest.approx(2 * parts["adapters"], rel=1e-3)


@pytest.mark.slow
def test_a_plan_is_of_the_step_that_a_run_compiles(model, tmp_path, monkeypatch):
    """`eight_devices_plan.py` has meshes, and the places of every method's arrays."""
    changes = {"method": "lora+", "accumulate": 2, "loss_chunk": 24, "data__pack": True}
    config = sft_test.configured(model, tmp_path, mesh="data=1", **changes)
    _, lowered = step_of_a_run(config, tmp_path, monkeypatch)
    assert lowered.as_text() == planned(config).lowered.as_text()
    config.remat = "full"
    assert lowered.as_text() != planned(config).lowered.as_text()


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_can_be_planned(method):
    quantize = "nf4" if method != "full" else ""
    config = configured(method=method, quantize=quantize, soft_text="a text" if method in methods.SOFT else "")
    state = programs.state(config, TINY, sharding.mesh(""), jnp.float32)
    bytes_ = {name: programs.bytes_per_chip(part) for name, part in state.items()}
    assert 0 < bytes_["optimizer"] <= 4.1 * bytes_["adapters"]
    weights = 4 * lora.count(jax.eval_shape(lambda: decoder.init(jax.random.key(0), TINY)))
    assert 0 < bytes_["base"] < 0.6 * weights if quantize else bytes_["adapters"] == weights


def test_what_loftq_samples_from_is_quantised():
    config = configured(method="loftq")
    parts = programs.sampling(config, TINY, sharding.mesh(""), jnp.float32, 64).parts
    base = programs.state(config, TINY, sharding.mesh(""), jnp.float32)["base"]
    assert programs.bytes_per_chip(parts["base"]) == programs.bytes_per_chip(base)


def test_sampling_is_beside_it(quick, here):
    config = configured()
    mesh = plan.mesh_of(config, here)
    found = forecast.make(programs.sampling(config, TINY, mesh, jnp.float32, 64), mesh, here)
    cache = 2 * 4 * TINY.layers * 2 * 64 * TINY.kv_heads * TINY.head_dim
    assert cache <= found.bytes["cache"] < 1.01 * cache
    assert found.arguments == pytest.approx(found.bytes["base"] + found.bytes["cache"], rel=0.01)
    products = 2 * 2 * (found.bytes["base"] / 4 - TINY.vocab * TINY.dim)
    scores = 2 * 2 * 2 * 64 * TINY.heads * TINY.head_dim * TINY.layers
    assert found.flops == pytest.approx(products + scores, rel=0.01)


def test_less_is_kept_where_more_is_computed_again():
    kept = {}
    for remat in decoder.REMAT:
        kept[remat], host = programs.kept(configured(remat=remat), TINY, 64, 64, jnp.float32)
        assert (host > 0) == (remat == "offload")
    residual = 4 * TINY.layers * 64 * TINY.dim
    assert residual <= kept["full"] < kept["dots"] < kept["none"]
    assert kept["full"] < residual + 4 * 64 * (3 * TINY.vocab + 6 * TINY.dim)
    assert kept["offload"] < kept["full"] and kept["offload"] + host == kept["dots"]


@pytest.mark.slow
def test_what_is_printed_and_what_is_said_of_a_plan_that_does_not_fit(quick, here, tmp_path):
    config, console = configured(batch_size=32), rich.console.Console(record=True, width=160)
    small = here._replace(chip=here.chip._replace(bytes=2**25))
    with pytest.raises(ValueError, match=r"^does not fit: ") as error:
        plan.plan(config, small, console, "a run", picture=str(tmp_path / "plan.png"), tokens=10**6)
    text = console.export_text()
    for line in ("base", "optimizer", "activations", "temporaries", "peak", "to spare", "key/value cache"):
        assert re.search(rf"^ ?{line} +(too much by )?[\d.]+ [GM]iB", text, re.MULTILINE), line
    assert re.search(r"1,000,000 tokens .* about 1,000,000 bits; [\d,]+ trained .*: too few, take \d+ times", text)
    assert "the learning rate is 0.00428" in text  # 5e-4 · (2000 / 128)^0.781
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    said = re.search(
        r"[\d.]+ MiB a chip of 32.00 MiB; try config.remat='none' with config.batch_size=(\d+)", str(error.value)
    )
    config.batch_size = int(said[1])
    assert 0 < config.batch_size < 32  # and this does fit
    mesh = plan.mesh_of(config, small)
    assert forecast.make(programs.training(config, TINY, mesh, jnp.float32, 64, 64), mesh, small).fits


def test_what_adapters_can_hold():
    assert advice.capacity(100, 200).endswith("200 bits; 100 trained parameters hold about 200: enough")
    assert advice.capacity(100, 201).endswith("too few, take 2 times the rank")


def test_what_to_change_where_no_row_fits():
    config = configured(mesh="data=4")
    mesh = AbstractMesh((4, 4, 1, 1), sharding.AXES)
    bytes_ = {"base": 60 * 2**30, "program": 0}
    found = forecast.Forecast(
        "v5e:4x4", "TPU v5e", 16, {"data": 4}, bytes_, 0, 60 * 2**30, 61 * 2**30, 0, 2**34, {}, 1, {}, 1, 0.0
    )
    said = advice.changes(config, mesh, found, {"none": 0, "full": 0})
    assert said == (
        "config.mesh='fsdp=16', which divides the base or config.quantize='nf4', which leaves about 0.29 of the linear "
        "weights or --topology=v5e:8x16"
    )
    assert "config.method='lora'" in advice.changes(plan.fully(config), mesh, found, {"full": 0})
    assert not found.fits and plan_table.spare(found) == "too much by 45.00 GiB"
    assert dataclasses.replace(found, peak=2**33).fits


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_rows_that_are_advised_are_not_refused(accumulate):
    config, mesh = configured(accumulate=accumulate), AbstractMesh((1, 16, 1, 1), sharding.AXES)
    found = forecast.Forecast("v5e:4x4", "TPU v5e", 16, {}, {}, 0, 0, 2**35, 0, 2**34, {}, 1, {}, 1, 0.0)
    said = advice.changes(config, mesh, found, {"none": 0, "full": 3})
    assert said == f"config.remat='full' with config.batch_size={3 * 16 * accumulate}"
    config.batch_size = 3 * 16 * accumulate
    config.eval.batch_size = 16
    with jax.sharding.use_abstract_mesh(mesh):
        placing.check(config)


@pytest.mark.parametrize(
    ("trainer", "name"),
    [(dpo_settings.dpo, "beta"), (rl_settings.rl, "policy"), (distill_settings.distill, "on_policy")],
)
def test_other_trainers_configs_are_not_planned(here, trainer, name):
    with pytest.raises(ValueError, match=rf"^config.{name} is of another trainer, and plans are of train.sft's runs"):
        plan.plan(trainer(), here, rich.console.Console(), "a run")


def test_of_data_that_is_not_read_yet_tokens_are_asked_for(here):
    config = configured()
    config.data.source, config.data.stream = "many.jsonl", True
    with pytest.raises(ValueError, match=r"^config.data.stream=True: .* cannot be counted; give --tokens$"):
        plan.plan(config, here, rich.console.Console(), "a run")
    plan.check(config, tokens=1000)


@pytest.mark.parametrize(("mesh", "chips", "said"), [("", 4, True), ("fsdp=4", 4, False), ("", 1, False)])
def test_what_to_give_a_run_that_has_no_mesh(here, monkeypatch, mesh, chips, said):
    config, console = configured(mesh=mesh), rich.console.Console(record=True, width=160)
    found = forecast.Forecast("v5e:2x2", "TPU v5e", chips, {}, {}, 0, 1, 1, 1, 2**34, {}, 1, {"compute": 1.0}, 1, 0.0)
    for name, value in {"training": None, "sampling": None}.items():
        monkeypatch.setattr(programs, name, lambda *_, value=value: value)
    monkeypatch.setattr(forecast, "make", lambda *_: found)
    monkeypatch.setattr(plan, "mesh_of", lambda *_: AbstractMesh((1, chips, 1, 1), sharding.AXES))
    monkeypatch.setattr(advice, "rows_that_fit", lambda *_: {})
    monkeypatch.setattr(advice, "trained", lambda _: 1)
    monkeypatch.setattr(plan_table, "table", lambda _: "")
    plan.plan(config, here, console, "a run")
    assert ("give --config.mesh=fsdp=4: without it a run takes one device" in console.export_text()) == said


def test_where_there_is_no_data_a_length_is_needed():
    config = copy.deepcopy(configured())
    config.data.length = 0
    with pytest.raises(ValueError, match=r"config.data.length=0: say how many tokens a row has"):
        plan.read(config)
    config.model = "llama-9"
    config.data.length = 8
    with pytest.raises(FileNotFoundError, match=r"llama-9: no such folder .* to plan, also one of llama-3.2-1b, "):
        plan.read(config)


@pytest.mark.parametrize("active", [1, 2])
def test_an_experts_rank_is_divided_by_those_that_are_active(active):
    shape = dataclasses.replace(TINY, family="mixtral", experts=4, active_experts=2)
    config = configured(model="qwen3-30b-a3b")
    config.lora.rank, config.lora.active_experts = 4, active
    adapters = programs.state(config, shape, sharding.mesh(""), jnp.float32)["adapters"]
    assert adapters["layers/gate_proj/kernel"].a.shape[-1] == 4 // active
    assert adapters["layers/q_proj/kernel"].a.shape[-1] == 4


class Refusing:
    """What a compiler that refuses is asked to compile."""

    def __init__(self, said):
        self.said = said

    def compile(self, options):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.said}")


@pytest.mark.parametrize(
    ("said", "gib", "beside"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5, 0),
        ("the total memory required for HLO temporaries (54.22G) exceeds available HBM (15.75G)", 54.22, 4000),
    ],
    ids=["all", "temporaries"],
)
def test_a_compiler_that_refuses_says_what_a_program_would_take(here, said, gib, beside):
    mesh = sharding.mesh("", here.devices)
    parts = {"base": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=sharding.rows(mesh))}
    found = forecast.make(programs.Program(Refusing(said), parts, 1, 0, 0, 1), mesh, here)
    assert found.peak == pytest.approx(gib * 2**30 + beside, abs=1) and found.arguments is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        forecast.make(programs.Program(Refusing("something else"), parts, 1, 0, 0, 1), mesh, here)


def test_a_host_whose_memory_is_too_small(here):
    said = "Ran out of memory in memory space host. Used 167.34G of 128.00G host. Exceeded host capacity by 39.34G."
    mesh = sharding.mesh("", [jax.devices()[0]])
    with pytest.raises(ValueError, match=r"^does not fit: 167.34G of its host's memory for a chip, of 128.00G; try"):
        forecast.make(programs.Program(Refusing(said), {}, 1, 0, 0, 1), mesh, here)


def test_of_every_program_in_the_documents_the_compiler_counted_what_was_predicted():
    rows = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "scale.json").read_text())["rows"]
    counted = [row for row in rows if row["arguments"] is not None]
    assert counted and all(row["peak"] > row["room"] for row in rows if row not in counted)  # which were refused
    for row in counted:
        parts = sum(row["bytes"].get(part, 0) for part in ("base", "adapters", "optimizer", "cache", "batch"))
        assert row["arguments"] == pytest.approx(parts, rel=0.01), row["model"]
