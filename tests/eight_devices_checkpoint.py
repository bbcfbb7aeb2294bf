"""Checkpoints on meshes of eight devices: `checkpoint_test.py` runs this file in its own process."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lora_jax import checkpoint, sharding

SPECS = {"q": {"a": P("fsdp", None), "b": P("tensor", None)}, "o": {"a": P("tensor", None), "b": P("fsdp", None)}}
TX = optax.adam(1e-3)
LINES = ("kept data=4,fsdp=2", "fsdp=8", "fsdp=2,tensor=4", "data=8")


def on(line):
    """Where adapters are on a mesh, for "kept" before its line as runs keep them, or for "" on one device."""
    if not line:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[3]), SPECS)
    mesh = sharding.mesh(line.removeprefix("kept "))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    arrays = jax.tree.map(lambda _: jax.ShapeDtypeStruct((64, 4), jnp.float32), places)
    return sharding.divided(arrays, places) if line.startswith("kept ") else places


def state(step, line, seed):
    """Random adapters with moments of their own, which lie as the adapters."""
    keys = iter(jax.random.split(jax.random.key(seed), 12))

    def noise(place):
        return jax.device_put(jax.random.normal(next(keys), (64, 4)), place)

    first, *_ = TX.init(trainable := jax.tree.map(noise, on(line)))
    moments = first._replace(mu=jax.tree.map(noise, on(line)), nu=jax.tree.map(noise, on(line)))
    return checkpoint.State(step, trainable, (moments, *_), {"next": step})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    with checkpoint.Checkpoints(folder, {"base": "abc"}) as checkpoints:
        checkpoints.save(state(7, "kept data=4,fsdp=2", 0))
    return folder


@pytest.mark.parametrize("line", ["fsdp=8", "kept tensor=2,data=4", "fsdp=2,tensor=4", "data=8", ""])
def test_it_goes_on_where_the_new_state_is(saved, line):
    like, want = state(0, line, 1), state(7, "kept data=4,fsdp=2", 0)
    back = checkpoint.Checkpoints(saved, {"base": "abc"}).restore(like)
    assert (back.step, back.progress) == (7, {"next": 7})
    for got, place, value in zip(*map(jax.tree.leaves, (back[1:3], like[1:3], want[1:3])), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(value).tobytes()
        assert got.sharding == place.sharding and got.dtype == value.dtype
        assert not got.size > 1 or not np.array_equal(got, place)
    assert jax.tree.structure(back) == jax.tree.structure(like)


def test_it_was_divided_when_it_was_saved():
    """Partner of the above: eight devices had a part each, as two of the others have, one of them two."""

    def parts(line):
        return {shard.data.shape for shard in state(0, line, 0).trainable["q"]["a"].addressable_shards}

    assert [parts(line) for line in LINES] == [{(8, 4)}, {(8, 4)}, {(32, 4)}, {(64, 4)}]


def test_it_is_copied_before_the_next_step_takes_its_memory(tmp_path):
    kept = jax.tree.map(np.array, state(1, "fsdp=8", 0).trainable)
    now = state(1, "fsdp=8", 0)
    step = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, {"base": "abc"}) as checkpoints:
        checkpoints.save(now)
        trainable = now.trainable
        for _ in range(99):
            trainable = step(trainable)
        jax.block_until_ready(trainable)
    back = checkpoints.restore(state(0, "data=8", 1)).trainable
    jax.tree.map(np.testing.assert_array_equal, back, kept)
    jax.tree.map(lambda now, before: np.testing.assert_array_equal(now, -before), trainable, kept)
    assert jax.tree.leaves(now.trainable)[0].is_deleted()
