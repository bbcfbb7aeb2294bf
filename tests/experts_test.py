"""Factors of experts, each its own or one shared, in batched and grouped products, inside a scan over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import Axes, Rule, Spec

pytestmark = pytest.mark.usefixtures("quick")
L, E, T, D, F, RANK, ACTIVE = 3, 4, 8, 6, 10, 4, 2
R = RANK // ACTIVE
SIZES = jnp.array([3, 0, 4, 1])


def batched(p, x):
    """Every expert sees every token, weighted by the router."""

    def layer(x, w):
        gates_TE = jax.nn.softmax(x @ w["router"])
        h_ETF = jnp.tanh(jnp.einsum("etd,edf->etf", jnp.einsum("te,td->etd", gates_TE, x), w["up"]))
        return x + jnp.einsum("etf,efd->etd", h_ETF, w["down"]).sum(0), None

    return jax.lax.scan(jax.checkpoint(layer), x, p["layers"])[0]


def grouped(p, x):
    """The rows of each expert stand together."""

    def layer(x, w):
        h_MF = jnp.tanh(jax.lax.ragged_dot(x, w["up"], SIZES))
        return x @ w["router"] @ w["router"].T / 9 + jax.lax.ragged_dot(h_MF, w["down"], SIZES), None

    return jax.lax.scan(layer, x, p["layers"])[0]


def numbered(p, x):
    """The rows of each expert stand together, and every two of them pick its matrix."""
    pairs = jnp.array([2, 0, 3, 2])

    def layer(x, w):
        h_GMF = jnp.tanh(jnp.einsum("gmd,gdf->gmf", x.reshape(-1, 2, D), w["up"][pairs]))
        y_GMD = jnp.einsum("gmf,gfd->gmd", h_GMF, w["down"][pairs])
        return x @ w["router"] @ w["router"].T / 9 + y_GMD.reshape(x.shape), None

    return jax.lax.scan(layer, x, p["layers"])[0]


MODELS = {"einsum": batched, "ragged_dot": grouped, "number": numbered}


def case(key, model, share):
    """Parameters, a batch and adapters whose factors are all random; `share` is on the side of the hidden state."""
    shapes = {"up": (L, E, D, F), "down": (L, E, F, D), "router": (L, D, E)}
    keys = iter(jax.random.split(key, 10))
    params = {"layers": {name: jax.random.normal(next(keys), shape) / 3 for name, shape in shapes.items()}}
    x = jax.random.normal(next(keys), (T, D))
    common = {"rank": RANK, "alpha": 3.0, "active_experts": ACTIVE}
    up, down = ("a", "b") if share else ("", "")
    spec = Spec(Rule("up", share=up, **common), Rule("down", share=down, **common), Rule("router", **common))
    adapters = lora.init(key, params, lora.trace(model, params, x), spec)
    return params, x, jax.tree.map(lambda leaf: leaf + jax.random.normal(next(keys), leaf.shape) / 2, adapters)


def dense(params, adapters, share):
    """W + γ a b by index arithmetic."""
    axes = {"up": ("led" if not share else "ld", "lef"), "down": ("lef", "led" if not share else "ld")}
    layers = dict(params["layers"])
    for name, (a, b) in axes.items():
        adapter, out = adapters[f"layers/{name}"], {"up": "ledf", "down": "lefd"}[name]
        layers[name] = layers[name] + 3.0 / R * jnp.einsum(f"{a}r,{b}r->{out}", adapter.a, adapter.b)
    router = adapters["layers/router"]
    layers["router"] = layers["router"] + 3.0 / RANK * jnp.einsum("ldr,ler->lde", router.a, router.b)
    return {"layers": layers}


@pytest.mark.parametrize("share", [False, True], ids=["each its own", "shared outer"])
@pytest.mark.parametrize("name", MODELS)
def test_lifted_equals_dense(key, name, share):
    model = MODELS[name]
    params, x, adapters = case(key, model, share)
    lead = {"a": (L,) if share else (L, E), "b": (L, E)}
    up, down, router = (adapters[f"layers/{name}"] for name in ("up", "down", "router"))
    assert (up.a.shape, up.b.shape) == ((*lead["a"], D, R), (*lead["b"], F, R))
    assert (down.a.shape, down.b.shape) == ((*lead["b"], F, R), (*lead["a"], D, R))
    assert (router.a.shape, router.b.shape) == ((L, D, RANK), (L, E, RANK))  # no expert: the whole rank
    assert up.axes == down.axes == Axes((0, 1), (2,), (3,))
    assert (up.scale, router.scale) == (3.0 / R, 3.0 / RANK)

    def pulled_back(f):
        y, pull = jax.vjp(f, adapters)
        return y, pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape))[0]

    lifted, densely = jax.jit(
        lambda: (
            pulled_back(lambda a: lora.lift(model)(lora.attach(params, a), x)),
            pulled_back(lambda a: model(dense(params, a, share), x)),
        )
    )()
    for got, want in zip(jax.tree.leaves(lifted), jax.tree.leaves(densely), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=1e-4)
        assert np.abs(want).max() > 1e-3
    assert np.abs(model(params, x) - lifted[0]).max() > 1e-2
    for path, leaf in lora.merge(params, adapters)["layers"].items():
        np.testing.assert_allclose(leaf, dense(params, adapters, share)["layers"][path], atol=1e-5)


@pytest.mark.parametrize("name", ["einsum", "ragged_dot"])
def test_an_experts_factors_are_for_its_tokens_alone(key, name):
    """Only the adapter of expert 2 is there: the tokens of the others come out as without."""
    params, x, adapters = case(key, grouped, share=False)
    keep = (jnp.arange(E) == 2)[None, :, None, None]
    alone = {path: jax.tree.map(lambda leaf: leaf * keep, adapters[path]) for path in ("layers/up", "layers/down")}

    def one(p, x):
        if name == "ragged_dot":
            return jax.lax.ragged_dot(x, p["layers"]["up"][0], SIZES)
        slots = jnp.eye(E)[jnp.repeat(jnp.arange(E), SIZES, total_repeat_length=T)]
        return jnp.einsum("etd,edf->tf", jnp.einsum("te,td->etd", slots, x), p["layers"]["up"][0])

    got = lora.lift(one)(lora.attach(params, alone), x)
    difference = np.abs(got - one(params, x)).max(1)
    start = int(SIZES[:2].sum())
    assert np.all(difference[start : start + 4] > 1e-2)
    assert np.all(difference[:start] < 1e-6) and np.all(difference[start + 4 :] < 1e-6)


def test_what_is_shared_starts_alike_and_is_counted_once(key):
    params, x, _ = case(key, batched, share=True)
    sites = lora.trace(batched, params, x)
    own = lora.init(key, params, sites, Spec(Rule("up", rank=R)))["layers/up"]
    shared = lora.init(key, params, sites, Spec(Rule("up", rank=R, share="a")))["layers/up"]
    assert np.abs(own.a[:, 0] - own.a[:, 1]).max() > 1e-2
    assert own.a.size == E * shared.a.size and own.b.shape == shared.b.shape
    assert np.abs(shared.a[0] - shared.a[1]).max() > 1e-2  # each layer its own


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("router", rank=2, share="a"), "share='a' is for experts, and 'layers/router' has none"),
        (Rule("up", rank=3, active_experts=2), "2 active experts do not divide rank 3 of 'layers/up'"),
        (Rule("up", rank=16, active_experts=2), "rank 8 is larger than the matrix 6 x 10 of 'layers/up'"),
    ],
)
def test_wrong_use_is_refused(key, rule, message):
    params, x, _ = case(key, batched, share=False)
    with pytest.raises(ValueError, match=message):
        lora.init(key, params, lora.trace(batched, params, x), Spec(rule))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_each_experts_matrix_is_not_shared(init):
    with pytest.raises(ValueError, match=f"share='a' and init='{init}', which takes both factors from each matrix"):
        Rule("up", rank=2, share="a", init=init)


def test_attached_to_another_number_of_experts(key):
    params, _, adapters = case(key, batched, share=True)
    fewer = {"layers": {**params["layers"], "up": params["layers"]["up"][:, :3]}}
    with pytest.raises(ValueError, match=r"the adapter of 'layers/up' does not fit its weight \[3, 3, 6, 10\]: b is"):
        lora.attach(fewer, adapters)
