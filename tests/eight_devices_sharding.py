"""The decoder and its adapters on meshes of eight devices: `sharding_test.py` runs this file in its own process."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import sharding
from lora_jax.models import decoder, keys
from lora_jax.models.config import DecoderConfig
from lora_jax.quantize import quantize

DENSE = DecoderConfig("llama", 64, 256, 512, 2, 8, 8, 16, 64, tied=True)
MOE = DecoderConfig("mixtral", 64, 128, 256, 2, 4, 4, 16, 64, experts=4, active_experts=2)
MANY = dataclasses.replace(MOE, dim=64, hidden=64, layers=1, experts=8)
CONFIGS = {"moe": MOE, "nf4 moe": MOE, "crowded": MANY}
MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
EXPERTS = ("data=8", "fsdp=8", "fsdp=2,tensor=4", "expert=4,data=2", "expert=2,fsdp=2,tensor=2")
BLOCKS = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "data=2,fsdp=2,tensor=2",
)  # of 64: 256 inputs have four, which eight divide not
CASES = [
    *(("dense", mesh, ()) for mesh in MESHES),
    *(("moe", mesh, ()) for mesh in EXPERTS),
    *(("nf4", mesh, ()) for mesh in BLOCKS),
    *((kind, "data=2,fsdp=2,tensor=2", sides) for kind in ("dense", "nf4") for sides in (("out",), ("inp", "out"))),
    ("crowded", "expert=8", ()),
    ("crowded", "expert=4,fsdp=2", ()),
    ("nf4 moe", "expert=4,data=2", ()),
    *(("moe", "expert=2,fsdp=2,tensor=2", sides) for sides in (("out",), ("inp", "out"))),
]


@functools.cache
def case(kind):
    """A model, random adapters, a batch, and the loss and gradients on one device."""
    config = CONFIGS.get(kind, DENSE)
    params = decoder.init(jax.random.key(0), config)
    batch = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)
    if kind == "crowded":  # every token asks for the same two experts
        batch = jnp.full_like(batch, 7)
    sites = lora.trace(decoder.forward, params, batch, config)
    if kind.startswith("nf4"):
        params = quantize(params, sites, {"all-linear": "nf4"})
    adapters = random_adapters(params, sites)
    return config, params, adapters, batch, jax.jit(step(config))(adapters, params, batch)


def random_adapters(params, sites):
    adapters = lora.init(jax.random.key(2), params, sites, lora.Spec(rank=3, alpha=6))
    return jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(3), x.shape) / 20, adapters)


def step(config):
    def loss(adapters, params, batch):
        logits = lora.lift(decoder.forward)(lora.attach(params, adapters), batch[:, :-1], config)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))

    return jax.value_and_grad(loss)


def placed(kind, line, follow=sharding.FOLLOW):
    """The same on a mesh, and where each part of it is."""
    config, params, adapters, batch, _ = case(kind)
    mesh = sharding.mesh(line)
    names = keys.axis_names(config)
    every = {name for own in names.values() for name in own.split()}
    specs = sharding.specs(params, names, [rule for rule in sharding.RULES if rule[0] in every], mesh)
    where = (
        sharding.adapter_places(adapters, specs, mesh, follow),
        sharding.places(params, specs, mesh),
        sharding.rows(mesh),
    )
    args = [jax.device_put(x, place) for x, place in zip((adapters, params, batch), where, strict=True)]
    args[1] = sharding.gathered(args[1], specs)
    return config, args, where, mesh


def assert_same(got, expected):
    """Losses, and gradients against the largest number of all."""
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    for one, other in zip(*map(jax.tree.leaves, (got[1], expected[1])), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * largest)


@pytest.mark.parametrize(("kind", "line", "sides"), CASES)
def test_loss_and_gradients_are_those_of_one_device(kind, line, sides):
    loss, gradients = case(kind)[-1]
    config, args, where, mesh = placed(kind, line, (*sharding.FOLLOW, *sides))
    with jax.set_mesh(mesh):  # without it, rows are where XLA likes them
        got, found = jax.jit(step(config), out_shardings=(None, where[0]))(*args)
    assert_same((got, found), (loss, gradients))
    divided = [place for place in jax.tree.leaves(where[1]) if not place.is_fully_replicated]
    assert divided or line == "data=8"


def handwritten(params, x_BD):
    def layer(x_BD, w):
        return x_BD + jnp.tanh(x_BD @ w["up"]) @ w["down"], None

    x_BD, _ = jax.lax.scan(layer, x_BD, params["layers"])
    return x_BD @ params["out"]


def squares(adapters, params, x_BD):
    return jnp.mean(lora.lift(handwritten)(lora.attach(params, adapters), x_BD) ** 2)


@pytest.mark.parametrize("follow", [sharding.FOLLOW, sharding.SIDES], ids=["usual", "sides"])
@pytest.mark.parametrize("line", MESHES)
def test_any_lifted_function_takes_its_shardings(line, follow):
    """A model that knows nothing of meshes; the base alone gives another loss."""
    noise = functools.partial(jax.random.normal, jax.random.key(0))
    params = {"layers": {"up": noise((2, 64, 128)) / 8, "down": noise((2, 128, 64)) / 8}, "out": noise((64, 32)) / 8}
    x_BD = noise((16, 64))
    adapters = random_adapters(params, lora.trace(handwritten, params, x_BD))
    step, mesh = jax.value_and_grad(squares), sharding.mesh(line)
    one = jax.jit(step)(adapters, params, x_BD)
    names = {"up": "L D F", "down": "L F D", "out": "D V"}
    specs = sharding.specs(params, names, (("F", "tensor"), ("V", "tensor"), ("D", "fsdp")), mesh)
    where = sharding.adapter_places(adapters, specs, mesh, follow)
    args = jax.device_put((adapters, params, x_BD), (where, sharding.places(params, specs, mesh), sharding.rows(mesh)))
    found = jax.jit(step, out_shardings=(None, where))(*args)
    assert_same(found, one)
    assert jax.tree.map(lambda x: x.sharding, found[1]) == where
    assert abs(squares({}, params, x_BD) - one[0]) > 1e-3
