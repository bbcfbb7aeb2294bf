"""Every rule against the dense computation, over random shapes, dimension numbers and dtypes."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from oracle import adapter, assert_lifts, dense_params

import lora_jax as lora
from lora_jax import Axes

pytestmark = pytest.mark.usefixtures("strict")
settings.register_profile("lora", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("lora")


@st.composite
def products(draw):
    """A weight whose axes are batched, contracted or kept, factored along any split of them; and its data."""
    names = string.ascii_lowercase
    kinds = [draw(st.sampled_from("bck")) for _ in range(draw(st.integers(2, 4)))]
    kinds[:2] = ["c", "k"]
    order = draw(st.permutations(range(len(kinds))))
    weight = "".join(names[i] for i in order)
    sizes = {name: draw(st.integers(1, 5)) for name in weight}
    shared = [names[i] for i, kind in enumerate(kinds) if kind in "bc"]
    data = "".join(draw(st.permutations([*shared, "z"])))
    out = "".join(draw(st.permutations(["z", *(names[i] for i, kind in enumerate(kinds) if kind in "bk")])))
    sizes["z"] = 3
    # The factors need not be divided as this product contracts them (a tied embedding is used both ways).
    roles = {"b": "s", "c": draw(st.sampled_from("iis")), "k": draw(st.sampled_from("oos"))}
    division = {names[i]: roles[kind] if i > 1 else {"c": "i", "k": "o"}[kind] for i, kind in enumerate(kinds)}
    if draw(st.booleans()):
        division = {name: {"i": "o", "o": "i", "s": "s"}[role] for name, role in division.items()}
    axes = Axes(*(tuple(i for i, name in enumerate(weight) if division[name] == role) for role in "sio"))
    left = draw(st.booleans())
    equation = f"{weight},{data}->{out}" if left else f"{data},{weight}->{out}"
    return equation, left, [sizes[name] for name in weight], [sizes[name] for name in data], axes


@pytest.mark.slow  # moves_test.py has products with moves before them
@given(products(), st.integers(0, 100))
def test_any_product(case, seed):
    equation, left, weight_shape, data_shape, axes = case
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"w": jax.random.normal(keys[0], weight_shape)}
    adapters = {"w": adapter(keys[1], weight_shape, axes)}
    x = jax.random.normal(keys[2], data_shape)

    def f(params, x):
        return jnp.einsum(equation, params["w"], x) if left else jnp.einsum(equation, x, params["w"])

    assert_lifts(f, params, adapters, x, tolerance=2e-4, eager=False)


@given(st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32]), st.sampled_from([None, jnp.float32]))
def test_dtypes(dtype, preferred):
    keys = jax.random.split(jax.random.key(1), 3)
    params = {"w": jax.random.normal(keys[0], (24, 16)).astype(dtype)}
    adapters = {"w": adapter(keys[1], (24, 16), Axes((), (0,), (1,)))}
    x = jax.random.normal(keys[2], (5, 24)).astype(dtype)

    def f(params, x):
        return jax.lax.dot_general(x, params["w"], (((1,), (0,)), ((), ())), preferred_element_type=preferred)

    y = lora.lift(f)(lora.attach(params, adapters), x)
    assert y.dtype == f(params, x).dtype
    exact = np.asarray(x, np.float64) @ np.asarray(dense_params({"w": params["w"].astype(jnp.float32)}, adapters)["w"])
    epsilon = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=8 * epsilon * np.abs(exact).max())


@pytest.mark.slow  # and convolutions
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.sampled_from(["SAME", "VALID"]), st.integers(0, 9))
def test_convolution(groups, stride, dilation, padding, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (3, 2, 4, 2 * groups)  # height, width, in / groups, out
    params = {"kernel": jax.random.normal(keys[0], shape)}
    adapters = {"kernel": adapter(keys[1], shape, Axes((), (0, 1, 2), (3,)))}
    x = jax.random.normal(keys[2], (2, 9, 8, 4 * groups))

    def f(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (stride, 1),
            padding,
            rhs_dilation=(1, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    assert_lifts(f, params, adapters, x, tolerance=2e-4, eager=False)


def test_convolution_in_another_layout(key):
    keys = jax.random.split(key, 3)
    params = {"kernel": jax.random.normal(keys[0], (6, 4, 3))}
    adapters = {"kernel": adapter(keys[1], (6, 4, 3), Axes((), (1, 2), (0,)))}
    x = jax.random.normal(keys[2], (2, 4, 9))

    def f(params, x):
        return jax.lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"))

    assert_lifts(f, params, adapters, x)


@pytest.mark.parametrize("axes", [Axes((), (0,), (1,)), Axes((), (1,), (0,))])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_embedding(key, axes, shape):
    params = {"table": jax.random.normal(key, (11, 7))}
    adapters = {"table": adapter(key, (11, 7), axes)}
    ids = jax.random.randint(key, shape, 0, 11)
    assert_lifts(lambda params, ids: params["table"][ids], params, adapters, ids)
    assert_lifts(lambda params, ids: jnp.take(params["table"], ids, axis=0), params, adapters, ids)


def test_tied_embedding_is_used_both_ways(key):
    params = {"table": jax.random.normal(key, (11, 7))}
    adapters = {"table": adapter(key, (11, 7), Axes((), (0,), (1,)))}
    ids = jnp.array([[1, 4, 4], [0, 10, 2]])
    assert_lifts(lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T, params, adapters, ids)


def test_batched_lookup_of_experts(key):
    params = {"tables": jax.random.normal(key, (3, 11, 7))}
    adapters = {"tables": adapter(key, (3, 11, 7), Axes((0,), (1,), (2,)))}
    ids = jnp.array([[1, 4], [0, 10], [2, 2]])
    assert_lifts(lambda p, ids: jax.vmap(lambda t, i: t[i])(p["tables"], ids), params, adapters, ids)


MOVES = {
    "transpose": lambda w: w.T.T,
    "flatten heads": lambda w: w.reshape(6, 4, 2).reshape(6, 8),
    "add and drop an axis": lambda w: jnp.squeeze(w[:, None, :], 1),
    "reverse": lambda w: w[::-1],
    "scale": lambda w: -(2 * w) / 3.0,
    "fused columns": lambda w: jnp.split(w, 2, axis=1)[1],
    "columns": lambda w: w[:, 2:7:2],
    "window": lambda w: jax.lax.dynamic_slice(w, (0, 3), (6, 4)),
    "name": lambda w: checkpoint_name(w, "w"),
    "barrier": lambda w: jax.lax.optimization_barrier(w),
}


@pytest.mark.parametrize("move", MOVES)
def test_layout_changes_keep_the_factors(key, move):
    params = {"w": jax.random.normal(key, (6, 8))}
    adapters = {"w": adapter(key, (6, 8), Axes((), (0,), (1,)))}
    x = jax.random.normal(key, (5, 6))
    assert_lifts(lambda p, x: x @ MOVES[move](p["w"]), params, adapters, x)


PICKS = {
    "static": lambda w: w[1],
    "dynamic": lambda w: w[jnp.argmax(jnp.array([0, 3, 1]))],
    "index in dim": lambda w: jax.lax.dynamic_index_in_dim(w, 2, keepdims=False),
    "take": lambda w: jnp.take(w, jnp.int32(1), axis=0),
    "split": lambda w: jnp.split(w, 3)[2][0],
    "restacked": lambda w: jnp.stack([w[2], w[0]])[1],
}


@pytest.mark.parametrize("pick", PICKS)
def test_a_layer_picked_from_a_stack_keeps_its_factors(key, pick):
    params = {"w": jax.random.normal(key, (3, 6, 8))}
    adapters = {"w": adapter(key, (3, 6, 8), Axes((0,), (1,), (2,)))}
    x = jax.random.normal(key, (5, 6))
    assert_lifts(lambda p, x: x @ PICKS[pick](p["w"]), params, adapters, x)


def test_several_in_and_out_axes(key):
    params = {"out": jax.random.normal(key, (4, 3, 6)), "in": jax.random.normal(key, (6, 4, 3))}
    adapters = {
        "out": adapter(key, (4, 3, 6), Axes((), (0, 1), (2,))),
        "in": adapter(key, (6, 4, 3), Axes((), (0,), (1, 2))),
    }
    x = jax.random.normal(key, (2, 5, 6))
    assert_lifts(
        lambda p, x: jnp.einsum("btnh,nhd->btd", jnp.tanh(jnp.einsum("btd,dnh->btnh", x, p["in"])), p["out"]),
        params,
        adapters,
        x,
    )


def test_experts_by_einsum_by_ragged_dot_and_by_number(key):
    params = {"w": jax.random.normal(key, (3, 6, 4))}
    adapters = {"w": adapter(key, (3, 6, 4), Axes((0,), (1,), (2,)))}
    x = jax.random.normal(key, (5, 6))
    sizes = jnp.array([2, 0, 3], jnp.int32)
    assert_lifts(lambda p, x: jnp.einsum("td,edf->tef", x, p["w"]), params, adapters, x)
    assert_lifts(
        lambda p, x: jnp.einsum("tef,edf->td", jnp.tanh(x[:, None, :4] * jnp.ones((5, 3, 1))), p["w"]),
        params,
        adapters,
        x,
    )
    assert_lifts(lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes), params, adapters, x)
    numbers = jnp.array([2, 0, 0, 2, 1])
    assert_lifts(lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][numbers]), params, adapters, x)


def test_stop_gradient_stops_the_adapter_too(key):
    params = {"w": jax.random.normal(key, (6, 8))}
    adapters = {"w": adapter(key, (6, 8), Axes((), (0,), (1,)))}
    x = jax.random.normal(key, (5, 6))

    def loss(adapters, stop):
        def f(params, x):
            return jnp.sum(x @ (jax.lax.stop_gradient(params["w"]) if stop else params["w"]))

        return lora.lift(f)(lora.attach(params, adapters), x)

    assert loss(adapters, True) == loss(adapters, False)
    stopped, free = (jax.grad(loss)(adapters, stop)["w"] for stop in (True, False))
    assert not np.any(stopped.a) and not np.any(stopped.b)
    assert np.any(free.a) and np.any(free.b)


def test_reassociation_is_never_left_to_the_compiler(key):
    """Two products of two operands each: no equation forms a b."""
    params = {"w": jnp.ones((32, 48))}
    adapters = {"w": adapter(key, (32, 48), Axes((), (0,), (1,)))}
    jaxpr = jax.make_jaxpr(lora.lift(lambda p, x: x @ p["w"]))(lora.attach(params, adapters), jnp.ones((8, 32)))
    shapes = [eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert shapes == [(8, 48), (8, 2), (8, 48)]
