"""The real training step of a tiny decoder, compiled for a mesh of eight devices, and what these exchange."""

import functools
import itertools
import math
import re
from typing import NamedTuple
from unittest import mock

import hlo
import jax
import jax.numpy as jnp
import optax

import lora_jax as lora
from lora_jax import sharding
from lora_jax.models import decoder, keys, partition
from lora_jax.models.config import DecoderConfig
from lora_jax.quantize import quantize
from train import hlo as forecast_hlo
from train import objective, update

DENSE = DecoderConfig("llama", 64, 256, 512, 2, 8, 8, 16, 64, tied=False)
MOE = DecoderConfig("mixtral", 64, 128, 256, 2, 4, 4, 16, 64, experts=4, active_experts=2)
# Rows, of a part and of a device too, are multiples of 5 and sizes of weights are not: neither passes for the other.
ROWS, LENGTH, LEARNED = 80, 11, 7
PARTS = {"accumulate": 2, "chunk": 40, "remat": "full"}
EXCHANGE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$")


class Compiled(NamedTuple):
    """A compiled step: what devices exchange, `{operation: [shapes of a result, ...]}`, and of what.

    `exchanged` counts the same, in loops as often as these run.
    """

    found: dict[str, list[list[tuple[int, ...]]]]
    params: dict
    specs: dict
    adapters: dict
    mesh: jax.sharding.Mesh
    computing: dict
    kept: dict
    exchanged: dict[str, forecast_hlo.Exchange]

    def base_shards(self):
        """How many elements a weight's arrays, or a layer's, have where its rows' axes of the mesh are gathered."""
        sizes = set()
        arrays = [
            (path, x) for path, leaf in lora.tree.leaves_by_path(self.params).items() for x in jax.tree.leaves(leaf)
        ]
        for path, leaf in arrays:
            parts = self.mesh.shape["tensor"] if "tensor" in self.specs[path] else 1
            size = math.prod(leaf.shape) // (leaf.shape[0] if path.startswith("layers/") else 1)
            sizes.add(size // parts)
            if leaf.ndim > 1:
                sizes.add(size // parts // (self.mesh.shape["fsdp"] if "expert" in self.specs[path] else 1))
        return sizes

    def largest(self, operation):
        """The most elements of a result of an operation."""
        return max((math.prod(shape) for shapes in self.found.get(operation, []) for shape in shapes), default=0)

    def total(self, operation):
        """The elements of all its results."""
        return sum(math.prod(shape) for shapes in self.found.get(operation, []) for shape in shapes)

    def of_rows(self):
        """The shapes of all results that are of a batch's rows, and not of weights."""
        every = itertools.chain.from_iterable(itertools.chain(*self.found.values()))
        return {shape for shape in every if math.prod(shape) % 5 == 0}

    def gathered(self):
        """The numbers of elements of what is gathered, but for adapters on their way to where they compute."""
        known = self.whole | self.halfway
        return {math.prod(shapes[-1]) for shapes in self.found.get("all-gather", []) if shapes[-1] not in known}

    def gathered_whole(self):
        """The elements of all that is gathered as adapters compute, with all layers: of each array, if each is once."""
        return sum(math.prod(shapes[-1]) for shapes in self.found.get("all-gather", []) if shapes[-1] in self.whole)

    @property
    def whole(self):
        """The shapes of a device's part of the adapters where they compute."""
        return {computing for computing, _ in self._parts()}

    @property
    def halfway(self):
        """Those of arrays that are divided along several axes, of which some are gathered and some are not."""
        return {shape for parts in self._parts() for shape in itertools.product(*zip(*parts, strict=True))} - self.whole

    def _parts(self):
        arrays, *places = map(jax.tree.leaves, (self.adapters, self.computing, self.kept))
        return {tuple(p.shard_shape(x.shape) for p in both) for x, *both in zip(arrays, *places, strict=True)}

    def adapter_sizes(self):
        """How many elements an array of the adapters, or one layer of it, has, whole or divided."""
        arrays = jax.tree.leaves(self.adapters)
        parts = {1, *self.mesh.shape.values()}
        return {math.prod(a.shape) // by // n for a in arrays for by in (1, a.shape[0]) for n in parts}


@functools.cache
def compiled(
    config,
    line,
    follow=sharding.FOLLOW,
    tpu=False,
    constrained=True,
    remat="none",
    chunk=0,
    accumulate=1,
    nf4=False,
    divide=True,
    stored=True,
    everywhere=(),
):
    """A step of Adam, as `train.sft` makes it; but every device has all of an activation of the shape `everywhere`."""
    devices = None
    if tpu:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = sharding.mesh(line, devices)
    params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), config, jnp.bfloat16 if tpu else jnp.float32))
    kinds = {name: jnp.int32 for name in ("tokens", "targets", "segments", "positions")} | {"weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype) for name, dtype in kinds.items()}
    sites = lora.trace(decoder.forward, params, batch["tokens"], config)
    if nf4:
        params = jax.eval_shape(lambda p: quantize(p, sites, {"all-linear": "nf4"}), params)
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(2), params, sites, lora.Spec(rank=3, alpha=6)))
    names = keys.axis_names(config)
    known = {name for own in names.values() for name in own.split()}
    specs = sharding.specs(params, names, [rule for rule in sharding.RULES if rule[0] in known], mesh)
    computing = sharding.adapter_places(adapters, specs, mesh, follow)
    own = sharding.divided(adapters, computing) if divide else computing
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = optax.adam(1e-3)
    moments = jax.eval_shape(tx.init, adapters)
    at = optax.tree_utils.tree_map_params(tx, lambda _, s: s, moments, own, transform_non_params=lambda _: whole)
    nll = functools.partial(objective.negative_log_likelihood, shape=config, learned=LEARNED, remat=remat, chunk=chunk)
    step = update.make_update(
        lora.lift(nll),
        lambda trained, base, key: lora.attach(base, trained),
        optax.adam(1e-3),
        accumulate,
        (own, at),
        functools.partial(jax.lax.with_sharding_constraint, shardings=computing),
    )

    def put(tree, places):
        return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, places)

    # As processes of several hosts give it; to be computed in parts, whole on every device, as NumPy's arrays are.
    divided = jax.tree.map(lambda _: sharding.rows(mesh) if accumulate == 1 else whole, batch)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    base = put(params, sharding.places(params, specs, mesh))
    args = (
        put(adapters, own),
        put(moments, at),
        sharding.gathered(base, specs) if stored else base,
        put(batch, divided),
        key,
    )
    context = mesh.abstract_mesh if constrained else jax.sharding.AbstractMesh((), ())
    rows = partition._divided

    def held(x, axis):
        return jax.lax.with_sharding_constraint(x, whole.spec) if x.shape == everywhere else rows(x, axis)

    with jax.sharding.use_abstract_mesh(context), mock.patch.object(partition, "_divided", held):
        text = step.lower(*args).compile().as_text()
    found = {}
    for instruction, _ in hlo.parse(text):
        if match := EXCHANGE.match(instruction.opcode):
            found.setdefault(match[1], []).append(list(instruction.shapes))
    exchanged = forecast_hlo.Program(text).collectives()
    return Compiled(found, params, specs, adapters, mesh, computing, own, exchanged)


def assert_lean(step):
    """Nothing is gathered but the base, and the adapters once; what is summed is their gradient, and a few numbers."""
    assert set(step.found) <= {"all-gather", "all-reduce"}
    assert step.gathered() <= step.base_shards() and not step.of_rows()
    # A layer's gradient at a time, within the loop over layers, or all at once behind it.
    layers = jax.tree.leaves(step.adapters)[0].shape[0]
    summed = lora.count(step.adapters)
    assert summed - 64 <= step.gathered_whole() <= summed  # a router's small factor stays whole
    assert summed // layers <= step.total("all-reduce") <= summed + 64
    assert summed < lora.count(step.params) / 5
