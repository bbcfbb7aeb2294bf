"""Which weights a spec selects, what it starts them from, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import Rule, Spec


def model(p, ids):
    x = p["embed"][ids]

    def layer(x, w):
        x = x + jnp.tanh(x @ w["attn"]["q"]) @ w["attn"]["o"]
        return x + jax.nn.relu(x @ w["mlp"]["up"]) @ w["mlp"]["down"] * w["norm"], None

    return jax.lax.scan(layer, x, p["layers"])[0] @ p["head"]


def parameters():
    shapes = {
        "embed": (11, 6),
        "layers": {
            "attn": {"q": (2, 6, 8), "o": (2, 8, 6)},
            "mlp": {"up": (2, 6, 12), "down": (2, 12, 6)},
            "norm": (2, 6),
        },
        "head": (6, 11),
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda s: isinstance(s, tuple))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)])


IDS = jnp.array([[1, 2, 3]])
SITES = lora.trace(model, parameters(), IDS)
LINEAR = ["layers/attn/o", "layers/attn/q", "layers/mlp/down", "layers/mlp/up"]


def selected(*rules, **kwargs):
    return sorted(lora.select(SITES, Spec(*rules, **kwargs)))


def test_presets():
    assert selected(rank=2) == LINEAR
    assert selected(target="attention", rank=2) == LINEAR[:2]
    assert selected(target="mlp", rank=2) == LINEAR[2:]


def test_patterns_exclude_and_precedence():
    assert selected(target="q$", rank=2) == ["layers/attn/q"]
    assert selected(target="head|embed", rank=2) == ["embed", "head"]
    assert selected(rank=2, exclude=["down"]) == [path for path in LINEAR if "down" not in path]
    rules = lora.select(SITES, Spec(Rule("mlp", rank=4), Rule("all-linear", rank=2)))
    assert {path: rule.rank for path, rule in rules.items()} == {path: 4 if "mlp" in path else 2 for path in LINEAR}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(target="q_proj"), "target 'q_proj' matches no parameter; nearest: .*'layers/attn/q'"),
        (Spec(rank=2, exclude="lm_head"), "exclude='lm_head' matches no parameter; nearest: 'head'"),
        (
            Spec(target="norm", rank=2),
            "target 'norm' matches only 'layers/norm' and the like: it is of kind elementwise",
        ),
        (Spec(rank=7), "rank 7 is larger than the matrix 8 x 6 of 'layers/attn/o': choose at most 6"),
        (Spec(Rule(rank=2), Rule("up", rank=2)), "target 'up' matches only weights that an earlier rule"),
    ],
)
def test_refusals(spec, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        lora.init(jax.random.key(0), parameters(), SITES, spec)


def test_a_lone_product_is_a_head_and_the_error_says_so():
    sites = lora.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((6, 8))}, jnp.ones((5, 6)))
    with pytest.raises(ValueError, match=r"the output head 'w' is left out: name it to adapt it"):
        lora.select(sites, Spec(rank=2))
    assert list(lora.select(sites, Spec(target="w", rank=2))) == ["w"]


@pytest.mark.parametrize("fields", [{"rank": 0}, {"dropout": 1.0}, {"init": "unifrom"}])
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=next(iter(fields)) if "init" not in fields else "no initialiser"):
        Rule(**fields)


def test_scale():
    assert Rule(rank=16, alpha=32).scale_at(SITES["layers/attn/q"]) == 2
    assert Rule(rank=16, alpha=32, rslora=True).scale_at(SITES["layers/attn/q"]) == 8


@pytest.mark.parametrize("target", ["all-linear", "embed", "head"])
def test_the_start_is_the_function_itself(target):
    params = parameters()
    adapters = lora.init(jax.random.key(0), params, SITES, Spec(target=target, rank=2))
    tree = lora.attach(params, adapters)
    for run in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(run(lora.lift(model))(tree, IDS), run(model)(params, IDS))
    trained = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    assert np.abs(lora.lift(model)(lora.attach(params, trained), IDS) - model(params, IDS)).max() > 1e-3


def test_keys_depend_on_the_path_alone():
    key = jax.random.key(0)
    all_of_them = lora.init(key, parameters(), SITES, Spec(rank=2))
    alone = lora.init(key, parameters(), SITES, Spec(target="attn/q", rank=2))
    np.testing.assert_array_equal(all_of_them["layers/attn/q"].a, alone["layers/attn/q"].a)
    drawn = [adapter.a.ravel()[:8] for adapter in all_of_them.values()]
    assert len({tuple(np.asarray(values).tolist()) for values in drawn}) == len(drawn)
    layers = all_of_them["layers/attn/q"].a
    assert np.any(layers[0] != layers[1])


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_initial_spread(init):
    sites = lora.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((256, 400))}, jnp.ones((1, 256)))
    adapter = lora.init(jax.random.key(1), {}, sites, Spec(target="w", rank=64, init=init))["w"]
    bound = 256**-0.5
    assert adapter.a.dtype == jnp.float32 and not np.any(adapter.b)
    assert np.std(adapter.a) == pytest.approx(bound / np.sqrt(3) if init == "uniform" else bound, rel=0.03)
    assert (np.abs(adapter.a).max() <= bound) == (init == "uniform")


def test_report_counts_what_init_makes():
    spec = Spec(Rule("mlp", rank=4), Rule("all-linear", rank=2))
    report = lora.report(model, parameters(), IDS, spec=spec)
    adapters = lora.init(jax.random.key(0), parameters(), SITES, spec)
    assert lora.count(report.adapters) == lora.count(adapters) == 2 * 4 * (2 * 18) + 2 * 2 * (2 * 14)
    assert report.base_parameters == lora.count(parameters())
    assert report.materialised == ()
    printed = str(report)
    assert "4 targets, 400 adapter parameters" in printed and "output head, left out: head" in printed


def test_report_says_where_a_sum_is_formed():
    def f(p, x):
        return x @ jnp.sin(p["w"])

    args = (f, {"w": jnp.ones((6, 8))}, jnp.ones((5, 6)))
    with pytest.raises(ValueError, match="it is of kind other, and method"):
        lora.report(*args, spec=Spec(target="w", rank=2))

    def g(p, x):
        return x @ p["w"] + jnp.sum(p["w"] ** 2)

    args = (g, *args[1:])
    with pytest.raises(lora.LiftError, match=r"`integer_pow`|`square`"):
        lora.report(*args, spec=Spec(target="w", rank=2))
    report = lora.report(*args, spec=Spec(target="w", rank=2), materialise=["w"])
    ((path, _, where),) = report.materialised
    assert path == "w" and "spec_test.py" in where
    assert "materialised: w at" in str(report)
