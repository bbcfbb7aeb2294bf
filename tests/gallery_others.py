"""Models in Equinox, Haiku and Keras and by hand, written for nobody in particular; see `gallery_flax.py`."""

import functools
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import haiku as hk
import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import keras
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

IDS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])  # 8 tokens
X = jnp.cos(jnp.arange(2 * 4 * 16.0)).reshape(2, 4, 16)


def equinox_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    attention = eqx.nn.MultiheadAttention(2, 16, key=keys[0])
    mlp = eqx.nn.MLP(16, 16, 32, 1, key=keys[1])
    head = eqx.nn.Linear(16, 5, key=keys[2])

    def f(model, x):
        attention, mlp, head = model
        x = jax.vmap(lambda row: row + attention(row, row, row))(x)
        return jax.vmap(jax.vmap(lambda token: head(token + mlp(token))))(x)

    return f, (attention, mlp, head), X, {"": 8}


def equinox_convolutions():
    """Kernels laid out as PyTorch has them, and a transposed one."""
    keys = jax.random.split(jax.random.key(0), 2)
    layers = (
        eqx.nn.Conv1d(8, 16, 3, dilation=2, groups=2, key=keys[0]),
        eqx.nn.ConvTranspose1d(16, 8, 4, 2, key=keys[1]),
    )

    def f(layers, x):
        return jax.vmap(lambda row: layers[1](jnp.tanh(layers[0](row))))(x)

    x = jnp.sin(jnp.arange(2 * 8 * 12.0)).reshape(2, 8, 12)
    return f, layers, x, {"^0": (2 * 2 * 8, 2 * 8), "^1": 2 * 18}


def haiku_transformer():
    def forward(x):
        x = x + hk.MultiHeadAttention(2, 8, model_size=16, w_init=hk.initializers.VarianceScaling())(x, x, x)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Linear(5)(x + hk.Linear(16)(jax.nn.relu(hk.Linear(32)(x))))

    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, model.init(jax.random.key(0), X), X, {"": 8}


def keras_transformer():
    ids = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(11, 16, name="embed")(ids)
    h = keras.layers.LayerNormalization()(x)
    x = x + keras.layers.MultiHeadAttention(2, 8, name="attention")(h, h)
    x = x + keras.layers.Dense(16, name="down")(keras.layers.Dense(32, activation="gelu", name="up")(x))
    model = keras.Model(ids, keras.layers.Dense(5, name="head")(x))
    frozen = [variable.value for variable in model.non_trainable_variables]

    def f(params, ids):
        return model.stateless_call([params[variable.path] for variable in model.trainable_variables], frozen, ids)[0]

    return f, {variable.path: variable.value for variable in model.trainable_variables}, IDS, {"": 8}


def fused_attention():
    """Queries, keys and values by one kernel, once as [D, 3, H, h] and once by an einsum of another layout."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "qkv": jax.random.normal(keys[0], (16, 3, 2, 8)) / 4,
        "qkv_SDNH": jax.random.normal(keys[1], (3, 16, 2, 8)) / 4,
        "out": jax.random.normal(keys[2], (2, 8, 16)) / 4,
    }

    def attend(p, q, k, v):
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        return jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), p["out"])

    def f(p, x):
        x = x + attend(p, *jnp.moveaxis(jax.lax.dot_general(x, p["qkv"], (((2,), (0,)), ((), ()))), 2, 0))
        return x + attend(p, *jnp.einsum("BTD,SDNH->SBTNH", x, p["qkv_SDNH"]))

    return f, params, X, {"": 8}


def _experts(key):
    keys = jax.random.split(key, 4)
    return {
        "router": jax.random.normal(keys[0], (16, 3)),
        "up": jax.random.normal(keys[1], (3, 16, 32)) / 4,
        "down": jax.random.normal(keys[2], (3, 32, 16)) / 6,
        "head": jax.random.normal(keys[3], (16, 5)) / 4,
    }


def experts_by_einsum():
    def f(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        up = jnp.tanh(jnp.einsum("btd,edf->btef", x, p["up"]))
        return jnp.einsum("bte,bted->btd", gates, jnp.einsum("btef,efd->bted", up, p["down"])) @ p["head"]

    return f, _experts(jax.random.key(0)), X, {"down": 3 * 8, "": 8}


def experts_by_ragged_dot():
    """Every token goes to its best two experts, sorted so that each expert's rows stand together."""

    def f(p, x):
        x_TD = x.reshape(-1, x.shape[-1])
        gates_TK, chosen_TK = jax.lax.top_k(jax.nn.softmax(x_TD @ p["router"]), 2)
        order = jnp.argsort(chosen_TK.reshape(-1))
        sizes_E = jnp.bincount(chosen_TK.reshape(-1), length=3)
        rows_MD = jnp.repeat(x_TD, 2, axis=0)[order]
        h_MF = jnp.tanh(jax.lax.ragged_dot(rows_MD, p["up"], sizes_E))
        y_MD = jax.lax.ragged_dot(h_MF, p["down"], sizes_E)[jnp.argsort(order)]
        return jnp.sum(y_MD.reshape(-1, 2, 16) * gates_TK[..., None], axis=1) @ p["head"]

    return f, _experts(jax.random.key(0)), X, {"up|down": 2 * 8, "": 8}


def _two_layers():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"up": jax.random.normal(keys[0], (16, 32)) / 4, "down": jax.random.normal(keys[1], (32, 16)) / 6}


def pallas_kernel_beside_the_weights():
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * jax.nn.sigmoid(x_ref[...])

    @jax.custom_vjp
    def silu(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

    silu.defvjp(lambda x: (silu(x), x), lambda x, g: (jax.vjp(jax.nn.silu, x)[1](g)[0],))
    return lambda p, x: silu(x @ p["up"]) @ p["down"], _two_layers(), X, {"": 8}


def custom_derivative_over_activations():
    """A gradient clipped on its way back."""

    @jax.custom_vjp
    def clipped(x, limit):
        return x

    clipped.defvjp(lambda x, limit: (x, limit), lambda limit, g: (jnp.clip(g, -limit, limit), None))
    return lambda p, x: clipped(jnp.tanh(x @ p["up"]), 0.1) @ p["down"], _two_layers(), X, {"": 8}


def under_shard_map():
    """Columns of one weight and rows of the next divided over devices (here it is one), in a scan of layers."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"up": jax.random.normal(keys[0], (3, 16, 32)) / 4, "down": jax.random.normal(keys[1], (3, 32, 16)) / 6}

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "model"), P("model"), P("data")), out_specs=P("data")
    )
    def block(up, down, x):
        return x + jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

    def f(p, x):
        return jax.lax.scan(lambda x, layer: (block(layer["up"], layer["down"], x), None), x, p)[0]

    return f, params, X, {"": 3 * 8}


MODELS = [
    equinox_attention,
    equinox_convolutions,
    haiku_transformer,
    keras_transformer,
    fused_attention,
    experts_by_einsum,
    experts_by_ragged_dot,
    pallas_kernel_beside_the_weights,
    custom_derivative_over_activations,
    under_shard_map,
]
