"""Every rule against the dense computation, over random shapes, dimension numbers and dtypes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, PartitionSpec
from moves import MOVES, ROUNDING, division, uses, weights
from oracle import adapter, assert_lifts, dense_params

import lora_jax as lora
from lora_jax import control, rules

pytestmark = pytest.mark.usefixtures("quick")
# Smaller examples are not looked for: each costs a compilation.
few = settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def primitives(jaxpr) -> set[str]:
    inner = [primitives(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)]
    return {eqn.primitive.name for eqn in jaxpr.eqns}.union(*inner)


def data(*shape, seed=1.7):
    return jnp.sin(seed + 1.3 * jnp.arange(math.prod(shape))).reshape(shape)


def check(name, axes, f, *args, tolerance=2e-4):
    """`f` uses a weight of these axes by the primitive `name`; lifted, it is f of the dense weight."""
    shape = [n for n, _ in axes]
    params = {"w": jax.random.normal(jax.random.key(0), shape)}
    adapters = {"w": adapter(jax.random.key(1), shape, division(axes), scale=4.0)}
    assert name in primitives(jax.make_jaxpr(f)(params["w"], *args).jaxpr)
    assert_lifts(lambda p, *args: f(p["w"], *args), params, adapters, *args, tolerance=tolerance, eager=False)


# --- operations that leave the weight a weight ---


@pytest.mark.parametrize("name", MOVES)
def test_moves(name):
    few(given(uses(name))(lambda use: check(name, *use, tolerance=1e-2 if name in ROUNDING else 2e-4)))()


@few
@given(weights())
def test_reshard(axes):
    def f(w, x):
        return jnp.tensordot(x, jax.sharding.reshard(w, PartitionSpec()), w.ndim)

    with jax.set_mesh(jax.make_mesh((1,), ("d",), axis_types=(AxisType.Explicit,))):
        check("reshard", axes, f, data(3, *(n for n, _ in axes)))


@pytest.mark.slow
@settings(few, max_examples=3)
@given(uses())
def test_stop_gradient(use):
    axes, f, x = use
    shape = [n for n, _ in axes]
    adapters = {"w": adapter(jax.random.key(1), shape, division(axes))}

    def loss(adapters, stop):
        tree = lora.attach({"w": data(*shape)}, adapters)
        return jnp.sum(lora.lift(lambda p: f(stop(p["w"]), x))(tree))

    stopped, free = (jax.grad(loss)(adapters, stop)["w"] for stop in (jax.lax.stop_gradient, lambda w: w))
    np.testing.assert_allclose(loss(adapters, jax.lax.stop_gradient), loss(adapters, lambda w: w))
    assert not np.any(stopped.a) and not np.any(stopped.b)
    assert np.any(free.a) and np.any(free.b)


# --- operations that consume the weight ---


@pytest.mark.slow
@settings(few, max_examples=4)
@given(uses(), st.sampled_from([jnp.bfloat16, jnp.float16]))
def test_products_of_fewer_bits(use, dtype):
    """Base and data of fewer bits, factors of float32: as close to the exact product as that dtype comes."""
    axes, f, x = use
    shape = [n for n, _ in axes]
    params = {"w": data(*shape).astype(dtype)}
    adapters = {"w": adapter(jax.random.key(1), shape, division(axes))}
    x = x.astype(dtype)
    y = lora.lift(lambda p, x: f(p["w"], x))(lora.attach(params, adapters), x)
    base = f(params["w"], x)
    assert y.dtype == base.dtype == dtype
    wide = dense_params({"w": params["w"].astype(jnp.float32)}, adapters)["w"]
    exact = f(wide, x.astype(jnp.float32))
    # Of what is added up, not of the sum, in which it may cancel.
    size = float(f(jnp.abs(wide), jnp.abs(x.astype(jnp.float32))).max())
    error = jnp.abs(y.astype(jnp.float32) - exact).max()
    assert error < 16 * float(jnp.finfo(dtype).eps) * max(size, 1) < jnp.abs(base - exact).max() * 8


@st.composite
def convolutions(draw):
    """Any layout, strides, padding, dilations and groups, of one or two dimensions."""
    n = draw(st.integers(1, 2))
    groups, features, inputs = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window = [draw(st.integers(1, 3)) for _ in range(n)]
    space = "XY"[:n]

    def layout(*letters):
        return "".join(draw(st.permutations([*letters, *space])))

    numbers = (layout("N", "C"), layout("O", "I"), layout("N", "C"))
    sizes = dict(zip(space, window, strict=True)) | {"O": groups * features, "I": inputs}
    axes = [(sizes[letter], "o" if letter == "O" else "i") for letter in numbers[1]]
    sizes = dict.fromkeys(space, 7) | {"N": 2, "C": groups * inputs}
    options = {
        "window_strides": [draw(st.integers(1, 2)) for _ in space],
        "padding": draw(st.sampled_from(["SAME", "VALID", [(draw(st.integers(0, 2)), 1) for _ in space]])),
        "rhs_dilation": [draw(st.integers(1, 2)) for _ in space],
        "feature_group_count": groups,
    }
    if not isinstance(options["padding"], str):  # transposed: the image is dilated, and no stride may miss it
        options |= {"lhs_dilation": [draw(st.integers(1, 2)) for _ in space], "window_strides": [1] * n}

    def f(w, x):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    return axes, f, data(*(sizes[letter] for letter in numbers[0]))


@pytest.mark.slow
@settings(few, max_examples=15)
@given(convolutions())
def test_convolution(case):
    check("conv_general_dilated", *case)


@pytest.mark.slow
@few
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_ragged_dot(experts, d, f, draw):
    sizes = jnp.array([draw.draw(st.integers(0, 3)) for _ in range(experts)] + [1])
    axes = [(experts + 1, draw.draw(st.sampled_from("so"))), (d + 1, "i"), (f, "o")]
    check("ragged_dot_general", axes, lambda w, x: jax.lax.ragged_dot(x, w, sizes), data(int(sizes.sum()), d + 1))


@st.composite
def lookups(draw):
    """Rows by numbers of any shape, along either factor's axis or both; and one table for each of a batch."""
    kind = draw(st.sampled_from(["rows", "elements", "batched", "columns"]))
    mode = draw(st.sampled_from(["fill", "clip", "promise_in_bounds"]))
    roles = draw(st.permutations("io"))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    n, m = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    axes = [(n, roles[0]), (m, roles[1])]

    def numbers(limit, *shape):
        return jnp.array([draw(st.integers(0, limit - 1)) for _ in range(math.prod(shape))], int).reshape(shape)

    rows = numbers(n, *shape)
    if kind == "rows":
        return axes, lambda w: w.at[rows].get(mode=mode)
    if kind == "columns":
        columns = numbers(m, *shape)
        return axes, lambda w: w.at[:, columns].get(mode=mode)
    if kind == "elements":
        columns = numbers(m, *shape)
        return axes, lambda w: w.at[rows, columns].get(mode=mode)
    each = numbers(n, 3, 2)
    return [(3, "s"), *axes], lambda w: jax.vmap(lambda w, i: w.at[i].get(mode=mode))(w, each)


@settings(few, max_examples=12)
@given(lookups())
def test_gather(case):
    check("gather", *case)


# --- functions within functions ---


def twice(g, w, x):
    return jax.lax.scan(lambda c, _: (c, g(w, (1 + c) * x)), jnp.zeros(()), None, length=2)[1]


def custom_jvp(g, w, x):
    call = jax.custom_jvp(g)
    call.defjvp(lambda primals, tangents: jax.jvp(g, primals, tangents))
    return call(w, x)


def while_(g, w, x):
    shape = jax.eval_shape(g, w, x)
    step = lambda carry: (carry[0] + 1, carry[1] + g(w, x))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0] < 2, step, (0, jnp.zeros(shape.shape)))[1]


WITHIN = {
    "jit": lambda g, w, x: jax.jit(g)(w, x),
    "remat2": lambda g, w, x: jax.checkpoint(g)(w, x),
    "scan": twice,
    "scan of layers": lambda g, w, x: jax.lax.map(lambda layer: g(layer, x), jnp.stack([w, -w])),
    "cond": lambda g, w, x: jax.lax.cond(jnp.sum(x) > 1e3, lambda w: -g(w, x), lambda w: g(w, 2 * x), w),
    "custom_jvp_call": custom_jvp,
}


@pytest.mark.parametrize("name", WITHIN)
def test_moves_within(name):
    def run(use):
        axes, g, x = use
        check(name.split()[0], axes, lambda w, x: WITHIN[name](g, w, x), x)

    few(given(uses())(run))()


@pytest.mark.slow
@few
@given(uses())
def test_moves_within_while(use):
    """Whose derivative backwards JAX does not have."""
    axes, g, x = use
    shape = [n for n, _ in axes]
    params, adapters = {"w": data(*shape)}, {"w": adapter(jax.random.key(1), shape, division(axes))}

    def f(p, x):
        return while_(g, p["w"], x)

    want = f(lora.merge(params, adapters), x)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(lora.lift(f)(lora.attach(params, adapters), x), want, atol=2e-4 * scale, rtol=2e-4)
    assert float(jnp.abs(want - f(params, x)).max()) > 1e-2 * scale


def test_every_rule_is_tested():
    here = {"dot_general", "conv_general_dilated", "ragged_dot_general", "gather", "reshard", "stop_gradient"}
    on_eight_devices = {"pvary", "all_gather", "shard_map"}  # by random divisions, in eight_devices.py
    of_jax_itself = {
        "call",
        "closed_call",
        "eval_jaxpr",
    }  # which no function of a user's makes: a jit, seen from within
    assert set(rules.RULES) - on_eight_devices == {*MOVES, *here}
    within = {primitive.name for primitive in control.CONTROL} - on_eight_devices - of_jax_itself
    assert within == {*(name.split()[0] for name in WITHIN), "while"}
