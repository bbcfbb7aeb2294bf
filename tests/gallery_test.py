"""Models written for nobody in particular: found, adapted, run factored and merged without a change to them."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora

pytestmark = pytest.mark.usefixtures("quick")

IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
X = jnp.cos(jnp.arange(2 * 4 * 8.0)).reshape(2, 4, 8)
IMAGE = jnp.sin(jnp.arange(2 * 8 * 8 * 3.0)).reshape(2, 8, 8, 3)


def nnx_scanned_and_rematerialised():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.down(jax.nn.gelu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.blocks = nnx.vmap(Block)(rngs.split(3))
            self.head = nnx.Linear(8, 11, rngs=rngs)

        def __call__(self, ids):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def run(x, block):
                return block(x)

            return self.head(run(self.embed(ids), self.blocks))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, ids: nnx.merge(graph, params, rest)(ids), params, IDS


def nnx_by_hand():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.sin(jnp.arange(96.0)).reshape(8, 12))
            self.v = nnx.Param(jnp.cos(jnp.arange(96.0)).reshape(8, 12))

        def __call__(self, x):
            return jnp.dot(jnp.tanh(x @ self.w[...]), self.v[...].T)

    graph, params = nnx.split(Model())
    return lambda params, x: nnx.merge(graph, params)(x), params, X


def linen_scanned_with_tied_head():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.SelfAttention(2, deterministic=True)(nn.RMSNorm()(x))
            return x + nn.Dense(8)(nn.silu(nn.Dense(16)(x))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(11, 8)
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return embed.attend(stack()(embed(ids), None)[0])

    model = Model()
    return model.apply, model.init(jax.random.key(0), IDS), IDS


def linen_convolutions():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(6, (3, 3), kernel_dilation=2)(x))
            x = nn.relu(nn.Conv(6, (3, 3), strides=2, feature_group_count=3)(x))
            return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))

    model = Model()
    return model.apply, model.init(jax.random.key(0), IMAGE), IMAGE


def linen_vision_transformer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, image):
            x = nn.Conv(8, (4, 4), strides=4)(image)
            x = x.reshape(x.shape[0], -1, 8)
            x = x + self.param("positions", nn.initializers.normal(), (1, *x.shape[1:]))
            x = x + nn.MultiHeadDotProductAttention(2, deterministic=True)(nn.LayerNorm()(x))
            return nn.Dense(5)(jnp.mean(x + nn.Dense(8)(nn.gelu(nn.Dense(16)(x))), axis=1))

    model = Model()
    return model.apply, model.init(jax.random.key(0), IMAGE), IMAGE


def equinox_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
    mlp = eqx.nn.MLP(8, 8, 16, 1, key=keys[1])
    head = eqx.nn.Linear(8, 5, key=keys[2])

    def f(model, x):
        attention, mlp, head = model
        x = jax.vmap(lambda row: row + attention(row, row, row))(x)
        return jax.vmap(jax.vmap(lambda token: head(token + mlp(token))))(x)

    return f, (attention, mlp, head), X


def haiku_transformer():
    def forward(x):
        x = x + hk.MultiHeadAttention(2, 4, model_size=8, w_init=hk.initializers.VarianceScaling())(x, x, x)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Linear(5)(x + hk.Linear(8)(jax.nn.relu(hk.Linear(16)(x))))

    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, model.init(jax.random.key(0), X), X


def experts_by_hand():
    key = jax.random.key(0)
    params = {
        "router": jax.random.normal(key, (8, 3)),
        "up": jax.random.normal(key, (3, 8, 16)) / 3,
        "down": jax.random.normal(key, (3, 16, 8)) / 4,
        "head": jax.random.normal(key, (8, 5)),
    }

    def f(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        up = jnp.tanh(jnp.einsum("btd,edf->btef", x, p["up"]))
        return jnp.einsum("bte,bted->btd", gates, jnp.einsum("btef,efd->bted", up, p["down"])) @ p["head"]

    return f, params, X


GALLERY = [
    nnx_scanned_and_rematerialised,
    nnx_by_hand,
    linen_scanned_with_tied_head,
    linen_convolutions,
    linen_vision_transformer,
    equinox_attention,
    haiku_transformer,
    experts_by_hand,
]


@pytest.mark.parametrize("make", GALLERY)
def test_a_model_it_has_never_seen(make):
    f, params, x = make()
    sites = lora.trace(f, params, x)
    targets = [path for path, site in sites.items() if site.adaptable]
    assert targets
    spec = lora.Spec(target="|".join(f"^{path}$" for path in targets), rank=2)
    fits = {path for path in targets if min(sites[path].dimensions()[1:]) >= 2}
    assert fits == set(targets)
    adapters = lora.init(jax.random.key(1), params, sites, spec)
    assert set(adapters) == set(targets)

    @jax.jit
    def run(adapters):
        return lora.lift(f)(lora.attach(params, adapters), x)

    base = f(params, x)
    np.testing.assert_array_equal(lora.lift(f)(lora.attach(params, adapters), x), base)  # operation by operation
    np.testing.assert_allclose(run(adapters), base, atol=1e-5 * float(jnp.abs(base).max()))  # XLA adds in its own order
    keys = iter(jax.random.split(jax.random.key(2), 2 * len(targets)))
    trained = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), adapters)
    merged = f(lora.merge(params, trained), x)
    np.testing.assert_allclose(run(trained), merged, atol=1e-4 * float(jnp.abs(merged).max()), rtol=1e-4)
    assert float(jnp.abs(merged - base).max()) > 1e-2
    gradient = jax.jit(jax.grad(lambda adapters: jnp.sum(jnp.sin(run(adapters)))))(trained)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert {path: (s.kind, s.axes) for path, s in lora.trace(eqx.filter_jit(f), params, x).items()} == {
        path: (s.kind, s.axes) for path, s in sites.items()
    }
