"""Meshes from a line, rules and their refusals; what is computed on eight devices is in `eight_devices_*.py`."""

import contextlib
import functools
import importlib.util
import itertools
import re
from types import SimpleNamespace

import eight
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import sharding
from lora_jax.models import decoder, partition
from lora_jax.models.config import DecoderConfig
from lora_jax.quantize import quantize
from train import config as settings
from train import sft, topology

NAMES = {"up": "L D F", "down": "L F D", "norm": "L D"}


def devices(n):
    return [object()] * n


def abstract(**sizes):
    auto = (AxisType.Auto,) * len(sharding.AXES)
    return AbstractMesh(tuple(sizes.get(name, 1) for name in sharding.AXES), sharding.AXES, axis_types=auto)


def params():
    return {"up": jnp.ones((2, 128, 512)), "down": jnp.ones((2, 512, 128)), "norm": jnp.ones((2, 128))}


def f(p, x):
    def body(x, w):
        return x + jnp.tanh(x * w["norm"] @ w["up"]) @ w["down"], None

    return jax.lax.scan(body, x, p)[0]


def test_one_line_makes_a_mesh():
    assert dict(sharding.mesh("").shape) == {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
    assert dict(sharding.mesh("tensor = -1, fsdp=1").shape) == dict(sharding.mesh("").shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdb=8", "mesh 'fsdb=8': no axis 'fsdb'; there are data, fsdp, tensor, expert"),
        ("fsdp=0", "the size of fsdp must be a positive number or -1, not '0'"),
        ("fsdp", "the size of fsdp must be a positive number or -1, not ''"),
        ("fsdp=3", "its sizes multiply to 3, and there are 8 devices; sizes that divide them are 1, 2, 4, 8, and -1"),
        ("fsdp=3,data=-1", "its sizes multiply to 3, and there are 8 devices"),
        ("fsdp=4", "its sizes multiply to 4, and there are 8 devices"),
        ("fsdp=-1,data=-1", "only one axis can be -1, not data and fsdp"),
        ("fsdp=2,fsdp=8", "mesh 'fsdp=2,fsdp=8': fsdp is given twice; give each axis one size"),
        ("data=8,data=1,fsdp=8", "data is given twice"),
    ],
)
def test_meshes_that_are_none(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.mesh(text, devices(8))


TOPOLOGIES = [f"{kind}:{shape}" for kind in ("v5e", "v5p", "v6e") for shape in topology.SHAPES[kind]]
# Slow: `make test` installs no compilers.
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu")


def every_line(n):
    """Every mesh of n devices, n a power of two."""
    twos = n.bit_length() - 1
    for bars in itertools.combinations(range(twos + 3), 3):
        sizes = [2 ** (stop - start - 1) for start, stop in itertools.pairwise((-1, *bars, twos + 3))]
        yield ",".join(f"{name}={size}" for name, size in zip(sharding.AXES, sizes, strict=True)), tuple(sizes)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_line_makes_a_mesh_of_every_topology(name):
    there = topology.get(name).devices
    torus = []
    for line, sizes in every_line(len(there)):
        laid = sharding.mesh(line, there).devices
        assert laid.shape == sizes and {*laid.flat} == {*there}
        if len(there) <= 64:
            with contextlib.suppress(NotImplementedError):
                torus.append(np.array_equal(laid, jax.make_mesh(sizes, sharding.AXES, devices=there).devices))
    assert all(torus)  # where JAX finds the torus's own order, it is that


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "line", "across"),
    [
        ("v5e:4x4", 2, "data=2,fsdp=16", {"data": 2}),
        ("v5e:4x4", 2, "data=4,fsdp=4,tensor=2", {"data": 2}),
        ("v5e:4x4", 2, "fsdp=-1", {"fsdp": 2}),
        ("v5p:4x4x4", 4, "fsdp=128,tensor=2", {"fsdp": 4}),
        ("v6e:2x4", 4, "data=2,fsdp=8,expert=2", {"data": 2, "fsdp": 2}),
    ],
)
def test_several_slices(name, slices, line, across):
    """What lies across slices is the outer part of `data`, or of `fsdp`; all else stays within one."""
    topology.get(name)  # loads the compiler
    there = topologies.get_topology_desc(name, platform="tpu", num_slices=slices).devices
    mesh = sharding.mesh(line, there)
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    outer = [across.get(name, 1) for name in sharding.AXES]
    expected = np.arange(slices).reshape(outer)
    for axis, count in enumerate(outer):
        expected = expected.repeat(mesh.devices.shape[axis] // count, axis)
    np.testing.assert_array_equal(index, expected)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("line", ["tensor=32", "fsdp=1,tensor=2,expert=-1"])
def test_what_cannot_be_laid_over_slices(line):
    topology.get("v5e:4x4")
    there = topologies.get_topology_desc("v5e:4x4", platform="tpu", num_slices=2).devices
    message = (
        f"mesh {line!r}: the devices are of 2 slices, across which only data and fsdp go; "
        "let these multiply to a multiple of 2, such as data=2"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.mesh(line, there)


def test_machines_of_gpus_are_slices_that_any_axis_crosses():
    there = [SimpleNamespace(id=n, slice_index=n // 8, platform="gpu", device_kind="NVIDIA H100") for n in range(16)]
    for line in ("data=2,fsdp=8", "fsdp=16", "tensor=16", "fsdp=2,tensor=2,expert=4"):
        sizes = dict(part.split("=") for part in line.split(","))
        laid = sharding._laid(line, [int(sizes.get(name, 1)) for name in sharding.AXES], there)
        assert [device.id for device in laid.flat] == [*range(16)]


def test_the_first_rule_whose_axis_is_free_counts():
    rules = (("F", "tensor"), ("D", "tensor"), ("D", "fsdp"))
    found = sharding.specs(params(), NAMES, rules, abstract(tensor=4, fsdp=2))
    assert found == {"up": P(None, "tensor", None), "down": P(None, "tensor", "fsdp"), "norm": P(None, "tensor")}
    found = sharding.specs(params(), NAMES, rules, abstract(fsdp=2))  # an axis of size 1 divides nothing
    assert found == {"up": P(None, "fsdp", None), "down": P(None, None, "fsdp"), "norm": P(None, "fsdp")}


@pytest.mark.parametrize(
    ("names", "rules", "message"),
    [
        ({"up": "L D F"}, (), "the axes of 'down' [2, 512, 128] have no names"),
        ({**NAMES, "norm": "D"}, (), "'norm' [2, 128] has 2 axes, its names are 'D'"),
        ({**NAMES, "nrom": "D"}, (), "no parameter matches 'nrom', which names axes; nearest: 'norm'"),
        (NAMES, (("F", "model"),), "rule 'F' -> 'model': the mesh has the axes data, fsdp, tensor, expert"),
        (
            NAMES,
            ("F", "tensor"),
            "sharding.rules: 'F' is no pair of a name and an axis of the mesh; give pairs, such as",
        ),
        (NAMES, (("F", "tensor", "fsdp"),), "sharding.rules: ('F', 'tensor', 'fsdp') is no pair"),
        (NAMES, (("G", "tensor"),), "rule 'G' -> 'tensor': no axis has this name; there are D, F, L"),
        (
            NAMES,
            (("L", "tensor"),),
            "'down' [2, 512, 128]: axis L of size 2 cannot be divided by tensor=3; choose tensor among 1, "
            "or leave the rule for L out",
        ),
    ],
)
def test_rules_that_do_not_fit(names, rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.specs(params(), names, rules, abstract(tensor=3))


@pytest.mark.parametrize(
    ("sizes", "devices", "would_do"),
    [
        ({"q": 576}, 256, "1, 2, 4, 8, 16, 32, 64"),  # 3 divides the weight, but no mesh of 256 devices
        ({"k": 3, "q": 9}, 8, "1"),
        ({"k": 4, "q": 40}, 16, "1, 2, 4"),  # 8 divides one, and not the other
    ],
)
def test_only_what_would_do_is_suggested(sizes, devices, would_do):
    weights = {name: jnp.ones((2, size)) for name, size in sizes.items()}
    mesh = abstract(fsdp=devices)
    with pytest.raises(ValueError, match=f"choose fsdp among {would_do}, or leave the rule for D out"):
        sharding.specs(weights, {".": "L D"}, (("D", "fsdp"),), mesh)
    largest = int(would_do.split()[-1])
    sharding.specs(weights, {".": "L D"}, (("D", "fsdp"),), abstract(fsdp=largest, data=devices // largest))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "ia3", "bottleneck", "full"])
def test_adapters_inherit_from_their_weights(key, method):
    """Every array is divided along the axes that follow the weight, by side or by axis of the mesh, and no other."""
    rank = {} if method in ("ia3", "full") else {"rank": 4}
    sites = lora.trace(f, params(), jnp.ones((3, 128)))
    adapters = lora.init(key, params(), sites, lora.Spec(method=method, target="up|down", **rank))
    mesh = abstract(data=2, tensor=4, fsdp=2)
    specs = {"up": P("data", "fsdp", "tensor"), "down": P("data", "tensor", "fsdp"), "norm": P()}
    everything = sharding.adapter_places(adapters, specs, mesh, ("stacked", "inp", "out"))
    stacked = sharding.adapter_places(adapters, specs, mesh, ("stacked",))
    usual = sharding.adapter_places(adapters, specs, mesh)
    assert jax.tree.structure(everything) == jax.tree.structure(adapters)
    sizes = {2: "data", 128: "fsdp", 512: "tensor", 4: None}
    for (path, array), place, less, most in zip(
        jax.tree_util.tree_leaves_with_path(adapters), *map(jax.tree.leaves, (everything, stacked, usual)), strict=True
    ):
        own = [None if path[0].key.startswith("/") else sizes[n] for n in array.shape]
        assert place.spec == P(*own)
        first = method == "full"  # a whole leaf has the weight's axes, each standing for itself
        assert less.spec == P(*(axis if axis == "data" or first else None for axis in own))
        assert most.spec == P(*(axis if axis in ("data", "tensor") or first else None for axis in own))


@pytest.mark.parametrize(
    ("shape", "spec", "sizes", "kept"),
    [
        ((16, 128, 4), P(), {"fsdp": 8}, P("fsdp", None, None)),
        ((2, 128, 4), P(None, "tensor"), {"tensor": 2, "data": 4}, P(None, ("tensor", "data"), None)),
        ((2, 64, 48, 4), P(), {"data": 2, "fsdp": 64, "tensor": 3}, P("data", "fsdp", "tensor", None)),
        ((8, 64, 4), P(), {"data": 2, "fsdp": 4}, P(("data", "fsdp"), None, None)),
        ((2, 64, 4), P(), {"data": 2, "fsdp": 4}, P(None, ("data", "fsdp"), None)),
        ((6, 128, 4), P("expert"), {"expert": 3, "data": 128}, P("expert", "data", None)),
        ((3, 5), P(), {"fsdp": 2}, P(None, None)),
        ((), P(), {"fsdp": 2}, P()),
    ],
)
def test_between_steps_every_axis_of_the_mesh_divides_what_it_can(shape, spec, sizes, kept):
    array, place = jax.ShapeDtypeStruct(shape, jnp.float32), jax.NamedSharding(abstract(**sizes), spec)
    assert sharding.divided({"a": array}, {"a": place}) == {"a": jax.NamedSharding(abstract(**sizes), kept)}


def test_a_word_that_is_no_side(key):
    message = "along 'stacked', 'inp', 'out', or along the axes data, fsdp, tensor, expert of the mesh, not 'in'"
    with pytest.raises(ValueError, match=message):
        sharding.adapter_places({}, {}, abstract(), ("in",))


def test_codes_are_divided_and_scales_where_they_can_be():
    sites = lora.trace(f, params(), jnp.ones((3, 128)))
    stored = quantize(params(), sites, {"up": "nf4"})  # of 128 inputs, two blocks of 64, two codes a byte

    def up(rule, size):
        mesh = abstract(fsdp=size)
        places = sharding.places(stored, sharding.specs(stored, NAMES, (rule,), mesh), mesh)["up"]
        return [place.spec for place in (places.codes, *jax.tree.leaves(places.scales))]

    assert up(("F", "fsdp"), 4) == [P(None, None, "fsdp"), P(None, None, "fsdp"), P(), P()]
    assert up(("D", "fsdp"), 2) == [P(None, "fsdp", None), P(None, "fsdp", None), P(), P()]
    assert up(("D", "fsdp"), 4) == [P(None, "fsdp", None), P(None, None, None), P(), P()]
    with pytest.raises(ValueError, match=r"'up' \[2, 128, 512\] is quantised, and its 64 codes .* by fsdp=128"):
        up(("D", "fsdp"), 128)


def test_the_decoder_holds_rows_where_there_is_a_mesh_and_only_there():
    config = DecoderConfig("llama", 64, 32, 64, 2, 4, 4, 8, 64, tied=True)
    params = jax.eval_shape(functools.partial(decoder.init, config=config), jax.random.key(0))

    def constraints(rows, **sizes):
        tokens = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
        with jax.sharding.use_abstract_mesh(abstract(**sizes)):
            return str(jax.make_jaxpr(lambda p, t: decoder.forward(p, t, config))(params, tokens)).count("constraint[")

    plain = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    assert "constraint" not in str(jax.make_jaxpr(lambda p, t: decoder.forward(p, t, config))(params, plain))
    assert constraints(8) == 0  # a mesh of one device
    assert constraints(8, fsdp=2, tensor=4) == 4  # table, its rows, what leaves a layer, and the last layer
    assert constraints(7, fsdp=2, tensor=4) == 1  # rows that cannot be divided are XLA's
    assert partition.ROWS == sharding.BATCH


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"batch_size": 12}, {"data": 2, "fsdp": 4}, "config.batch_size=12 rows cannot be divided over data=2, fsdp=4"),
        ({"batch_size": 12}, {"fsdp": 8, "tensor": 2}, "fsdp=8 (config.mesh='...'); take a multiple of 8"),
        (
            {"batch_size": 8, "accumulate": 2},
            {"fsdp": 8},
            "batch_size=8 rows cannot be divided over fsdp=8, accumulate=2 (config.mesh='...'); take a multiple of 16",
        ),
        ({"eval": {"batch_size": 6}}, {"expert": 4}, "config.eval.batch_size=6 rows cannot be divided over expert=4"),
    ],
)
def test_rows_that_cannot_be_divided(changes, sizes, message):
    config = settings.sft()
    config.data.source, config.mesh = "data.jsonl", "..."
    settings.check(config)
    config.update(changes)
    with jax.sharding.use_abstract_mesh(abstract(**sizes)), pytest.raises(ValueError, match=re.escape(message)):
        settings.check(config)


def test_a_mesh_that_does_not_fit_stops_a_run_before_anything_is_read(tmp_path):
    config = settings.sft()
    config.mesh = "fsdp=3"
    with pytest.raises(
        ValueError, match=f"mesh 'fsdp=3': its sizes multiply to 3, and there are {jax.device_count()} "
    ):
        sft.train(config, tmp_path / "run", "bad")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("file", ["eight_devices_sharding.py", "eight_devices_training.py", "eight_devices_plan.py"])
def test_on_eight_devices(file):
    eight.run(file)
