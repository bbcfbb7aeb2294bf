"""What a method cannot do: one clear line each, and nothing silent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import Rule, Spec
from lora_jax.adalora import adalora

pytestmark = pytest.mark.usefixtures("quick")
V, D, F = 11, 6, 8
KEY = jax.random.key(0)


def model(p, ids):
    x = p["embed"][ids] * p["norm"]
    x = jnp.where(p["steps"] > 0, x, 0) @ p["up"]
    return jax.nn.relu(x) @ p["down"] @ p["embed"].T


def parameters():
    draw = jax.random.normal
    return {
        "embed": draw(KEY, (V, D)),
        "norm": jnp.ones(D),
        "steps": jnp.ones(D, jnp.int32),
        "up": draw(KEY, (D, F)),
        "down": draw(KEY, (F, D)),
    }


IDS = jnp.array([[1, 2, 3]])
SITES = lora.trace(model, parameters(), IDS)
METHODS = {
    "lora": Rule("up", rank=2),
    "pissa": Rule("up", rank=2, init="pissa"),
    "dora": Rule("up", rank=2, method="dora"),
    "adalora": Rule("up", rank=2, method="adalora"),
    "vera": Rule("up", rank=2, method="vera"),
    "ia3": Rule("up", method="ia3"),
    "full": Rule("up", method="full"),
    "rows": Rule("embed", method="rows", rows=(1, 5)),
    "bottleneck": Rule("up", rank=2, method="bottleneck"),
}


def made(rule):
    return lora.init(KEY, parameters(), SITES, Spec(rule))


def refused(message, make, *args, **kwargs):
    """The error is one line, with these words."""
    with pytest.raises(ValueError, match=message) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, r"rank must be at least 1, not 0 \(target 'all-linear'\)"),
        ({"alpha": 0.0}, r"alpha must be positive and finite, not 0.0"),
        ({"alpha": float("nan")}, r"alpha must be positive and finite, not nan"),
        ({"alpha": float("inf")}, r"alpha must be positive and finite, not inf"),
        ({"dropout": float("nan")}, r"dropout must be in \[0, 1\), not nan"),
        ({"active_experts": 0}, r"active_experts must be at least 1"),
        ({"method": "lokr"}, r"no method 'lokr'; there are lora, lora-fa, dora"),
        ({"init": "zero"}, r"no initialiser 'zero'; there are uniform"),
        ({"share": "c"}, r'share is "a" or "b"'),
        ({"side": "both"}, r'side is "out" or "in"'),
        ({"method": "ia3", "rank": 4}, r"method 'ia3' has no rank \(given 4\)"),
        ({"method": "vera", "alpha": 4.0}, r"method 'vera' has no alpha \(given 4.0\)"),
        ({"method": "vera", "init": "pissa"}, r"method 'vera' has no init"),
        ({"method": "dora", "init": "pissa"}, r"method 'dora' starts from uniform, normal, orthogonal, not 'pissa'"),
        ({"method": "lora-fa", "init": "olora"}, r"method 'lora-fa' starts from"),
        ({"method": "dora", "share": "a"}, r"method 'dora' has no share"),
        ({"method": "full", "dropout": 0.1}, r"method 'full' has no dropout"),
        ({"method": "bottleneck", "dropout": 0.1}, r"method 'bottleneck' has no dropout"),
        ({"rows": (1,)}, r"method 'lora' has no rows"),
        ({"method": "rows"}, r"method 'rows' and the rows that it trains are given together"),
        ({"method": "rows", "rows": (1, 1)}, r"rows must be distinct and not negative, not \(1, 1\)"),
        ({"method": "rows", "rows": (-1,)}, r"rows must be distinct and not negative, not \(-1,\)"),
    ],
)
def test_fields_of_a_rule(fields, message):
    refused(message, Rule, **fields)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("norm", rank=2), "matches only 'norm' and the like: it is of kind elementwise"),
        (Rule("norm", method="ia3"), "it is of kind elementwise, and method 'ia3' works on"),
        (Rule("embed", rank=2, method="dora"), "matches only 'embed' and the like: it is of kind embedding"),
        (Rule("embed", rank=2, method="vera"), "it is of kind embedding, and method 'vera' works on dense"),
        (Rule("embed", rank=2, method="lora-fa"), "it is of kind embedding"),
        (Rule("up", method="rows", rows=(1,)), "it is of kind dense, and method 'rows' works on embedding"),
        (Rule("embed", method="rows", rows=(V,)), f"'embed' has {V} rows: there is no row {V} to train"),
        (Rule("steps", rank=2), "matches only 'steps' and the like: it holds int32, which cannot be trained"),
        (Rule("steps", method="full"), "it holds int32, which cannot be trained"),
        (Rule("up", rank=7), "rank 7 is larger than the matrix 6 x 8 of 'up': choose at most 6"),
        (Rule("embed", rank=2, init="pissa"), "init='pissa' is for products, and 'embed' is an embedding: exclude it"),
        (Rule("up", rank=2, share="a"), "share='a' is for experts, and 'up' has none"),
    ],
)
def test_weights_that_a_method_does_not_work_on(rule, message):
    refused(message, made, rule)


def test_what_is_refused_is_so_for_the_reason_given():
    """Next to each refusal, what is allowed."""
    for rule in (*METHODS.values(), Rule("norm", method="full"), Rule("embed", rank=2), Rule("embed", method="full")):
        assert next(iter(made(rule))) == rule.target


def test_vera_has_one_rank_since_its_matrices_are_shared():
    rules = Rule("up", rank=2, method="vera"), Rule("down", rank=1, method="vera")
    refused(
        "VeRA's matrices are shared, so that ranks are equal: 'down' has 1, 'up' 2",
        lora.init,
        KEY,
        parameters(),
        SITES,
        Spec(*rules),
    )
    assert len(lora.init(KEY, parameters(), SITES, Spec(rules[0], Rule("down", rank=2, method="vera")))) == 3


@pytest.mark.parametrize("method", METHODS)
def test_attached_to_other_parameters(method):
    """The path and both shapes are named."""
    rule, params = METHODS[method], parameters()
    adapters, path = made(rule), rule.target
    shape = params[path].shape
    wider = {**params, path: jnp.ones((shape[0], shape[1] + 1))}
    refused(
        f"adapter of '{path}' does not fit its weight {re.escape(str([shape[0], shape[1] + 1]))}: ",
        *(lora.attach, wider, adapters),
    )
    refused(f"adapter of '{path}' does not fit its weight .*: ", lora.merge, {**params, path: jnp.ones(9)}, adapters)
    absent = {name: leaf for name, leaf in params.items() if name != path}
    refused(f"no parameter '{path}' for this adapter; nearest: ", lora.attach, absent, adapters)
    lora.attach(params, adapters)


def test_rows_of_a_larger_embedding():
    adapters = made(METHODS["rows"])
    smaller = {**parameters(), "embed": jnp.ones((5, D))}
    refused("'embed' has 5 rows: there is no row 5 to train", lora.merge, smaller, adapters)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "bottleneck"])
def test_values_that_are_not_finite_are_not_merged(method, value):
    adapters, params = made(METHODS[method]), parameters()
    leaves, structure = jax.tree.flatten(adapters)
    for i, leaf in enumerate(leaves):
        spoiled = jax.tree.unflatten(
            structure, [*leaves[:i], leaf.ravel().at[-1].set(value).reshape(leaf.shape), *leaves[i + 1 :]]
        )
        refused("the adapter of '.*' has values that are not finite", lora.merge, params, spoiled)
        refused("the adapter of '.*' has values that are not finite", lora.merge_error, params, spoiled)
    lora.merge(params, adapters)


def test_vera_without_its_matrices():
    adapters, params = made(METHODS["vera"]), parameters()
    alone = {"up": adapters["up"]}
    message = "the adapter of 'up' is VeRA's, but '/vera', its matrices, is not attached"
    refused(message, lora.merge, params, alone)
    refused(message, lora.lift(model), lora.attach(params, alone), IDS)
    short = {**adapters, "/vera": jax.tree.map(lambda x: x[:-1], adapters["/vera"])}
    refused("'up' is 6 x 8, more than the 5 and 7 rows of '/vera'", lora.merge, params, short)
    lower = {**adapters, "/vera": jax.tree.map(lambda x: x[:, :1], adapters["/vera"])}
    refused("'up' has rank 2, and '/vera', its matrices, 1", lora.merge, params, lower)


def test_a_bottleneck_is_not_merged():
    refused("the adapter of 'up' is not linear in the weight", lora.merge, parameters(), made(METHODS["bottleneck"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 5, "end": 5}, "pruning begins at step 5, which must be before step 5"),
        ({"start": -1, "end": 5}, "pruning begins at step -1"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"every": 0}, "every must be at least 1, not 0"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), not 1.0"),
    ],
)
def test_pruning(fields, message):
    refused(message, adalora, optax.sgd(0.1), **{"rank": 1, "start": 0, "end": 5, **fields})


def test_pruning_of_what_it_cannot_prune():
    refused("the adapter of 'up' is LoRA, not AdaLoRA", adalora(optax.sgd(0.1), 1, 0, 5).init, made(METHODS["lora"]))
    adapters = made(METHODS["adalora"])
    refused(
        "nothing to prune: rank=3 keeps all 2 singular values a matrix",
        adalora(optax.sgd(0.1), 3, 0, 5).init,
        adapters,
    )
    refused("pruning needs the adapters", (tx := adalora(optax.sgd(0.1), 1, 0, 5)).update, adapters, tx.init(adapters))
