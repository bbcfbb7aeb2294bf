"""Starting values against NumPy: singular vectors, QR, the inputs' principal directions, what quantising lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import Rule, Spec
from lora_jax.eva import eva, second_moments
from lora_jax.loftq import loftq
from lora_jax.quant import quantize_leaf

pytestmark = pytest.mark.usefixtures("quick")
L, E, B, T, D, F, R = 2, 3, 4, 6, 8, 12, 3


def model(p, x):
    """A scan over layers with remat inside it: a product, and experts by einsum."""

    def layer(x, w):
        x = x + jnp.tanh(x @ w["up"]) @ w["down"]
        h_ENF = jnp.einsum("end,edf->enf", jnp.einsum("gnd->gnd", x.reshape(E, -1, D)), w["expert"])
        return x + jnp.sin(h_ENF).reshape(x.shape), None

    return jax.lax.scan(jax.checkpoint(layer), x, p["layers"])[0]


def captured(p, x):
    """The inputs of every weight by hand, float64: {path: [L, (E,) N, D]}."""
    p, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)["layers"], np.asarray(x, np.float64)
    inputs = {"layers/up": [], "layers/down": [], "layers/expert": []}
    for i in range(L):
        h = np.tanh(x @ p["up"][i])
        inputs["layers/up"].append(x.reshape(-1, D))
        inputs["layers/down"].append(h.reshape(-1, F))
        x = x + h @ p["down"][i]
        inputs["layers/expert"].append(x.reshape(E, -1, D))
        x = x + np.sin(np.einsum("end,edf->enf", x.reshape(E, -1, D), p["expert"][i])).reshape(x.shape)
    return {path: np.stack(found) for path, found in inputs.items()}


@pytest.fixture
def case(key):
    shapes = {"up": (L, D, F), "down": (L, F, D), "expert": (L, E, D, D)}
    keys = iter(jax.random.split(key, 4))
    # Columns of falling size: directions that are well apart.
    layers = {n: jax.random.normal(next(keys), s) * jnp.linspace(1.5, 0.2, s[-1]) / 2 for n, s in shapes.items()}
    x = jax.random.normal(next(keys), (B, 2 * E, D)) * jnp.linspace(2, 0.3, D)
    params = {"layers": layers}
    return params, x, lora.trace(model, params, x)


def test_second_moments_are_those_of_the_captured_inputs(case):
    params, x, sites = case
    found = second_moments(model, params, x, sites=sites, paths=list(sites))
    for path, inputs in captured(params, x).items():
        want = np.swapaxes(inputs, -1, -2) @ inputs
        np.testing.assert_allclose(found[path], want, atol=1e-4 * np.abs(want).max())
        assert np.abs(found[path] - want[::-1]).max() > 0.1 * np.abs(want).max()  # every layer its own


def test_evas_directions_are_the_singular_vectors_of_the_inputs(case):
    params, x, sites = case
    adapters = eva(model, params, x, sites=sites, spec=Spec(Rule("layers", rank=R)), limit=1.0)
    for path, inputs in captured(params, x).items():
        _, _, v = np.linalg.svd(inputs)
        a = np.asarray(adapters[path].a, np.float64)
        assert a.shape[-1] == R and not np.any(adapters[path].b)
        same = np.abs(np.einsum("...rd,...dr->...r", v[..., :R, :], a))
        np.testing.assert_allclose(same, 1, atol=1e-4)  # up to sign
        assert np.abs(np.einsum("...rd,...dr->...r", v[..., 1 : R + 1, :], a)).max() < 0.1
    np.testing.assert_allclose(lora.lift(model)(lora.attach(params, adapters), x), model(params, x), rtol=1e-6)


def test_evas_ranks_go_where_most_is_explained(case):
    params, x, sites = case
    limit = 2.0
    adapters = eva(model, params, x, sites=sites, spec=Spec(Rule("layers", rank=R)), limit=limit)
    shares = {}
    for path, inputs in captured(params, x).items():
        s = np.linalg.svd(inputs, compute_uv=False) ** 2
        shares[path] = (s / s.sum(-1, keepdims=True))[..., : int(limit * R)]
    budget = R * sum(share[..., 0].size for share in shares.values())
    least = np.sort(np.concatenate([share.ravel() for share in shares.values()]))[-budget]
    total = 0
    for path, share in shares.items():
        columns = np.any(np.asarray(adapters[path].a) != 0, axis=-2)
        np.testing.assert_array_equal(columns.sum(-1), (share >= least).sum(-1))
        total += columns.sum()
        assert adapters[path].scale == 32 / R  # of the rule's rank, as PEFT keeps it
    assert total == budget
    ranks = [np.any(np.asarray(a.a) != 0, axis=-2).sum(-1) for a in adapters.values()]
    assert len(set(np.concatenate([r.ravel() for r in ranks]).tolist())) > 1


def test_eva_refuses_other_methods(case):
    params, x, sites = case
    for rule in (Rule("up", rank=R, method="dora"), Rule("expert", rank=R, share="a")):
        with pytest.raises(ValueError, match="EVA starts LoRA's factors; the rule of 'layers/"):
            eva(model, params, x, sites=sites, spec=Spec(rule))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_decompositions_of_every_layer_and_expert(case, key, init):
    params, _, sites = case
    rule = Rule("layers", rank=R, alpha=6.0, init=init)
    for path, adapter in lora.init(key, params, sites, Spec(rule)).items():
        w = np.asarray(lora.tree.leaves_by_path(params)[path], np.float64)
        if init == "pissa":
            want = truncated(w) / adapter.scale
        else:
            q, r = np.linalg.qr(np.swapaxes(w, -1, -2))
            want = np.swapaxes(q[..., :R] @ r[..., :R, :], -1, -2)
        got = np.asarray(adapter.a, np.float64) @ np.swapaxes(np.asarray(adapter.b, np.float64), -1, -2)
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(got[0] - got[1]).max() > 1e-2 and np.abs(got - w / adapter.scale).max() > 1e-2


def test_orthogonal_columns(case, key):
    params, _, sites = case
    for path, adapter in lora.init(key, params, sites, Spec(Rule("layers", rank=R, init="orthogonal"))).items():
        a = np.asarray(adapter.a, np.float64)
        gram = np.swapaxes(a, -1, -2) @ a
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(R) / 3, gram.shape), atol=1e-6)
        assert np.abs(a[0] - a[1]).max() > 1e-2, path


def truncated(w):
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return u[..., :R] * s[..., None, :R] @ v[..., :R, :]


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_loftq_is_the_alternation_in_numpy(case, key, format):
    params, _, sites = case
    spec, rules = Spec(Rule("layers", rank=R, alpha=6.0)), {"layers/expert": format}
    leaves = lora.tree.leaves_by_path(params)
    w, errors = np.asarray(leaves["layers/expert"], np.float64), []
    for steps in (1, 4):
        base, adapters = loftq(key, params, sites, spec, rules, steps)
        low = 0.0
        for _ in range(steps):
            left = jnp.asarray(w - low, jnp.float32)
            q = np.asarray(quantize_leaf(left, format, -2, 2).dequantised(), np.float64)
            low = truncated(w - q)
        stored = np.asarray(base["layers"]["expert"].dequantised(), np.float64)
        a, b = (np.asarray(getattr(adapters["layers/expert"], name), np.float64) for name in "ab")
        got = 6.0 / R * a @ np.swapaxes(b, -1, -2)
        if steps == 1:
            np.testing.assert_array_equal(stored, q)
            np.testing.assert_allclose(got, low, atol=1e-5)
        # However often: γ a b is the best there is for the base that is stored.
        np.testing.assert_allclose(got, truncated(w - stored), atol=2e-5)
        errors.append(np.linalg.norm(w - stored - got))
        if format == "nf4":  # int4 puts each block's largest value halfway between codes, where an ulp decides
            assert errors[-1] == pytest.approx(np.linalg.norm(w - q - low), rel=1e-3)
    assert not np.any(adapters["layers/down"].b) and not hasattr(base["layers"]["down"], "dequantised")
    # Rounding alone loses more. That alternating further gains is so for nf4 here, but no law.
    plain = quantize_leaf(leaves["layers/expert"], format, -2, 2).dequantised()
    assert np.linalg.norm(w - plain) > errors[0]
    assert errors[0] > errors[1] or format == "int4"


def test_loftq_starts_nearer_to_the_model_than_quantising(case, key):
    params, x, sites = case
    spec, rules = Spec(Rule("layers", rank=R)), {"layers": "int4"}
    want = model(params, x)

    def error(tree):
        return float(jnp.linalg.norm(jax.jit(lora.lift(model))(tree, x) - want))

    base, adapters = loftq(key, params, sites, spec, rules)
    with_loftq = error(lora.attach(base, adapters))
    plain = lora.quantize.quantize(params, sites, rules)
    without = error(lora.attach(plain, lora.init(key, params, sites, spec)))
    assert 0 < with_loftq < 0.7 * without


@pytest.mark.parametrize(
    ("rule", "rules", "steps", "message"),
    [
        (Rule("up", rank=R), {"up": "nf4"}, 0, "steps must be at least 1, not 0"),
        (Rule("up", rank=R), {"down": "nf4"}, 1, "no weight is both adapted and quantised: the spec takes 'layers/up'"),
        (Rule("up", rank=R, method="dora"), {"up": "nf4"}, 1, "LoftQ starts LoRA's factors of matrices; 'layers/up'"),
    ],
)
def test_loftq_refuses(case, key, rule, rules, steps, message):
    params, _, sites = case
    with pytest.raises(ValueError, match=message):
        loftq(key, params, sites, Spec(rule), rules, steps)
