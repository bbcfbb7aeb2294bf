"""Weights inside `jax.shard_map`, on eight devices: `shard_map_test.py` runs this file in a process that has them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import adapter, assert_lifts

import lora_jax as lora
from lora_jax import Axes
from lora_jax.cost import flops
from lora_jax.quantize import quantize

DENSE = Axes((), (0,), (1,))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def mlp(mesh, specs, body, **options):
    def f(p, x):
        run = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P("data"), **options)(body)
        return run(p["up"], p["down"], x)

    return f


def column_and_row_parallel(mesh):
    """The two products of a block divided over "model": the second one's sums are added up."""

    def body(up, down, x):
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

    return mlp(mesh, (P(None, "model"), P("model"), P("data")), body)


def unchecked(mesh):
    def body(up, down, x):
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

    return mlp(mesh, (P(None, "model"), P("model"), P("data")), body, check_vma=False)


def gathered_before_use(mesh):
    """Weights stored in shards (FSDP), one along its input, the other along its output."""

    def body(up, down, x):
        up = jax.lax.all_gather(up, "data", axis=0, tiled=True)
        down = jax.lax.all_gather(down, ("data", "model"), axis=1, tiled=True)
        return jax.lax.pmean(jnp.tanh(x @ up) @ down, "model")

    return mlp(mesh, (P("data"), P(None, ("data", "model")), P("data")), body)


def replicated(mesh):
    return mlp(mesh, (P(), P(), P("data")), lambda up, down, x: jnp.tanh(x @ up) @ down)


def along_one_axis_only(mesh):
    """The compiler divides the rest."""

    def f(p, x):
        def body(up, down, x):
            return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

        specs = (P(None, "model"), P("model"), P())
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"model"})(
            p["up"], p["down"], x
        )

    return f


MODELS = [column_and_row_parallel, unchecked, gathered_before_use, replicated, along_one_axis_only]


@pytest.fixture
def case(key):
    keys = jax.random.split(key, 5)
    params = {"up": jax.random.normal(keys[0], (8, 16)) / 3, "down": jax.random.normal(keys[1], (16, 32)) / 4}
    adapters = {"up": adapter(keys[2], (8, 16), DENSE), "down": adapter(keys[3], (16, 32), DENSE)}
    return params, adapters, jax.random.normal(keys[4], (4, 8))


@pytest.mark.parametrize("make", MODELS)
def test_values_and_gradients_are_the_dense_ones(mesh, case, make):
    params, adapters, x = case
    f = make(mesh)
    sites = lora.trace(f, params, x)
    assert {path: (site.kind, site.axes) for path, site in sites.items()} == dict.fromkeys(params, ("dense", DENSE))
    assert_lifts(f, params, adapters, x, eager=make is not along_one_axis_only)


def test_experts_one_on_each_device(mesh, key):
    """Each device has one expert: an axis of size 1 there, of 8 here."""
    params = {"w": jax.random.normal(key, (8, 6, 5))}
    adapters = {"w": adapter(key, (8, 6, 5), Axes((0,), (1,), (2,)))}

    def f(p, x):
        spec = P(("data", "model"))
        body = lambda w, x: jnp.einsum("etd,edf->etf", x, w)  # noqa: E731
        return jax.shard_map(body, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(p["w"], x)

    def together(p, x):
        def body(w, x):
            w = jax.lax.all_gather(w.transpose(0, 2, 1), ("data", "model"), axis=0, tiled=True)
            return jnp.einsum("etd,efd->etf", x, w)

        spec = P(("data", "model"))
        return jax.shard_map(body, mesh=mesh, in_specs=(spec, P()), out_specs=P(), check_vma=False)(p["w"], x)

    x = jax.random.normal(key, (8, 3, 6))
    assert_lifts(f, params, adapters, x)
    assert_lifts(together, params, adapters, x)


@st.composite
def divisions(draw):
    """Which mesh axes divide each axis of a weight, which of its axes is contracted, whether shards are gathered."""
    free = ["data", "model"]
    names = []
    for _ in range(2):
        chosen = draw(st.lists(st.sampled_from(free), unique=True)) if free else []
        free = [name for name in free if name not in chosen]
        names.append(tuple(chosen) or None)
    return names, draw(st.integers(0, 1)), draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(["io", "oi"]))


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(divisions())
def test_any_division(case):
    names, contracted, gathered, checked, roles = case
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"w": jax.random.normal(jax.random.key(0), (8, 16))}
    axes = Axes((), (roles.index("i"),), (roles.index("o"),))
    adapters = {"w": adapter(jax.random.key(1), (8, 16), axes)}
    x = jax.random.normal(jax.random.key(2), (3, params["w"].shape[contracted]))
    inner, outer = names[contracted], names[1 - contracted]

    def body(w, x):
        if gathered:
            for axis in (axis for axis in (0, 1) if names[axis]):
                w = jax.lax.all_gather(w, names[axis], axis=axis, tiled=True)
        y = jnp.tensordot(x, w, (1, contracted))
        return jax.lax.psum(y, inner) if inner and not gathered else y

    # What is gathered is the same everywhere, which cannot be checked.
    specs = (P(*names), P() if gathered else P(None, inner))
    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=P() if gathered else P(None, outer),
        check_vma=checked and not gathered,
    )
    assert_lifts(lambda p, x: run(p["w"], x), params, adapters, x, eager=False)


def collectives(f, *args):
    """How often each collective runs, with the sizes of what it moves."""
    found = {}
    text = jax.jit(f).lower(*args).compile().as_text()
    for shape, name in re.findall(r"= \w+\[([\d,]*)\]\S* (all-reduce|all-gather|reduce-scatter|all-to-all)\(", text):
        found.setdefault(name, []).append(shape)
    return {name: sorted(shapes) for name, shapes in found.items()}


def test_the_collectives_are_those_of_the_base(mesh, case):
    params, adapters, x = case

    def lifted(make):
        return lambda adapters, x: lora.lift(make(mesh))(lora.attach(params, adapters), x)

    base = collectives(lambda p, x: column_and_row_parallel(mesh)(p, x), params, x)
    assert base and collectives(lifted(column_and_row_parallel), adapters, x) == base
    # Where shards of the base are gathered, so are those of the factors that have the axis, and nothing else.
    base, more = (
        collectives(gathered_before_use(mesh), params, x),
        collectives(lifted(gathered_before_use), adapters, x),
    )
    assert len(more["all-gather"]) == len(base["all-gather"]) + 2
    assert more["all-reduce"] == base["all-reduce"]


def plain(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "ia3"])
def test_every_method_is_what_it_is_outside(mesh, case, key, method):
    """DoRA's norms are those of whole columns, divided or not."""
    params, _, x = case
    spec = lora.Spec(method=method, target="up|down", **({} if method == "ia3" else {"rank": 2}))
    adapters = lora.init(key, params, lora.trace(plain, params, x), spec)
    adapters = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape) / 3, adapters)
    want = lora.lift(plain)(lora.attach(params, adapters), x)
    for make in (column_and_row_parallel, gathered_before_use):
        got = jax.jit(lora.lift(make(mesh)))(lora.attach(params, adapters), x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(want - plain(params, x)).max() > 1e-2


def test_a_bottleneck_after_a_divided_product_is_refused(mesh, case, key):
    params, _, x = case
    adapters = lora.init(key, params, lora.trace(plain, params, x), lora.Spec(method="bottleneck", target="up", rank=2))
    tree = lora.attach(params, adapters)
    with pytest.raises(
        lora.LiftError, match=r"'up' .* `shard_map` at .*eight_devices.py.*its adapter follows is divided"
    ):
        lora.lift(column_and_row_parallel(mesh))(tree, x)
    np.testing.assert_allclose(lora.lift(replicated(mesh))(tree, x), lora.lift(plain)(tree, x), rtol=1e-4, atol=1e-5)


def test_a_quantised_weight_is_not_divided(mesh, case):
    params, adapters, x = case
    stored = quantize(params, lora.trace(plain, params, x), {"up": "int8"})
    tree = lora.attach(stored, adapters)
    with pytest.raises(lora.LiftError, match=r"'up' .* `shard_map` at .*eight_devices.py.*stored in another form"):
        lora.lift(column_and_row_parallel(mesh))(tree, x)
    want = lora.lift(plain)(tree, x)
    np.testing.assert_allclose(lora.lift(replicated(mesh))(tree, x), want, rtol=1e-4, atol=1e-5)
    assert np.abs(want - lora.lift(plain)(lora.attach(params, adapters), x)).max() > 1e-4


def test_a_weight_that_is_no_weight_inside_is_named(mesh, case):
    params, adapters, x = case

    def f(p, x):
        run = jax.shard_map(
            lambda w, x: x @ jnp.sin(w), mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P(None, "model")
        )
        return run(p["up"], x)

    with pytest.raises(lora.LiftError, match=r"'up' \[8, 4\] reaches `sin` at .*eight_devices.py:\d+"):
        lora.lift(f)(lora.attach(params, {"up": adapters["up"]}), x)


def test_flops_are_those_of_all_devices(mesh, case):
    params, _, x = case
    alone = flops(plain, params, x)
    assert flops(column_and_row_parallel(mesh), params, x) == alone
    assert flops(replicated(mesh), params, x) == 4 * alone  # everything along "model" is done four times


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "ia3"])
def test_a_merged_weight_lies_where_its_weight_lay(mesh, case, key, method):
    params, _, x = case
    spec = lora.Spec(method=method, target="up|down", **({} if method == "ia3" else {"rank": 2}))
    adapters = lora.init(key, params, lora.trace(plain, params, x), spec)
    adapters = jax.tree.map(lambda leaf: leaf + jax.random.normal(key, leaf.shape) / 3, adapters)
    want = lora.merge(params, adapters)
    for up, down in ((P("data", "model"), P("model")), (P("model"), P(None, "data"))):
        places = {"up": NamedSharding(mesh, up), "down": NamedSharding(mesh, down)}
        placed = jax.device_put({name: params[name] for name in places}, places)
        merged = lora.merge(placed, adapters)
        assert {name: w.sharding for name, w in merged.items()} == places
        for name, w in merged.items():
            np.testing.assert_allclose(w, want[name], rtol=1e-5, atol=1e-6)
            assert np.abs(w - params[name]).max() > 1e-2
