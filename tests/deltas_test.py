"""Merging dense deltas, compared with the formulas and with PEFT; and everything that cannot be combined."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import adapter, dense_delta
from trees import WEIGHTS, assert_delta, dense, distance, matrices, tree

import lora_jax as lora
from lora_jax import Axes, arithmetic, deltas, grouping
from lora_jax.methods import DoRA

pytestmark = pytest.mark.usefixtures("quick_module")

pytestmark = pytest.mark.usefixtures("strict")


def one_matrix(*rows):
    """An adapter whose delta is this matrix."""
    delta = jnp.asarray(rows, jnp.float32)
    return {"w": lora.LoRA(jnp.eye(len(rows)), delta.T, 1.0, Axes((), (0,), (1,)))}


def test_ties_by_hand():
    trees = [one_matrix([4.0, -3, 1], [0.5, 2, 0]), one_matrix([-1.0, -5, 2], [3.0, 0.1, 0])]
    merged, errors = arithmetic.ties(trees, rank=2, density=0.5)
    # Three of six stay: [4 -3 0; 0 2 0] and [0 -5 2; 3 0 0]. No sign is contested but that of zeros.
    np.testing.assert_allclose(dense_delta(merged["w"]), [[4, -4, 2], [3, 2, 0]], atol=1e-5)
    assert errors["w"] < 1e-6
    contested, _ = arithmetic.ties(trees, rank=2, density=1.0, weights=[2.0, 3.0])
    # [0, 0] goes to the first alone (4 > 1); the others agree, and each zero is left out of its mean.
    want = [[8, (2 * -3 + 3 * -5) / 2, (2 * 1 + 3 * 2) / 2], [(2 * 0.5 + 3 * 3) / 2, (2 * 2 + 3 * 0.1) / 2, 0]]
    np.testing.assert_allclose(dense_delta(contested["w"]), want, atol=1e-5)


def ties_of(deltas, density, weights):
    """The formula, element by element."""
    trimmed = []
    for delta in deltas:
        kept = int(density * delta.size)
        order = np.argsort(-np.abs(delta), axis=None)[:kept]
        trimmed.append(np.where(np.isin(np.arange(delta.size), order).reshape(delta.shape), delta, 0))
    merged = np.zeros_like(deltas[0])
    for at in np.ndindex(merged.shape):
        sign = 1 if sum(delta[at] for delta in trimmed) >= 0 else -1
        agreeing = [w * delta[at] for w, delta in zip(weights, trimmed, strict=True) if delta[at] * sign > 0]
        merged[at] = sum(agreeing) / max(len(agreeing), 1)
    return merged


def test_ties_trims_and_elects_layer_by_layer():
    trees, weights = [tree(0), tree(1, rank=3, scale=0.3), tree(2, rank=1)], [1.0, 0.5, 2.0]
    got, errors = arithmetic.ties(trees, rank=2, density=0.4, weights=weights)
    total = arithmetic.add(trees, weights)
    for path in WEIGHTS:
        layers = zip(*(matrices(dense(x, path), path) for x in trees), strict=True)
        want = np.stack([ties_of(deltas, 0.4, weights) for deltas in layers])
        _, s, _ = np.linalg.svd(want)
        have = matrices(dense_delta(got[path]), path)
        assert errors[path] == pytest.approx(np.linalg.norm(s[:, 2:]) / np.linalg.norm(s), abs=1e-5)
        assert np.linalg.norm(have - want) / np.linalg.norm(want) == pytest.approx(errors[path], abs=1e-5)
        assert errors[path] > 1e-3 and distance(got, total, path) > 0.1


def test_dare_keeps_a_fraction_and_the_mean(key):
    one = {"w": adapter(key, (2, 40, 50), Axes((0,), (1,), (2,)))}
    kept, errors = arithmetic.dare(key, [one], rank=40, density=0.25, weights=[3.0])
    want, got = 3 * dense_delta(one["w"]), dense_delta(kept["w"])
    stays = np.abs(got) > np.abs(want / 0.25) / 2
    assert abs(stays.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / stays.size)  # five standard deviations
    np.testing.assert_allclose(got, np.where(stays, want / 0.25, 0), atol=1e-4)
    assert errors["w"] < 1e-5
    assert abs((stays[0] & stays[1]).mean() - 0.25**2) < 5 * math.sqrt(0.25**2 / stays[0].size), "a mask per layer"


def test_dare_of_everything_is_the_sum(key):
    trees = [tree(0, paths=("heads", "mixed")), tree(1, paths=("heads",))]
    got, _ = arithmetic.dare(key, trees, rank=3, density=1.0, weights=[0.5, 1.0])
    rest, _ = arithmetic.dare(key, trees, rank=3, density=0.5, weights=[0.5, 1.0])
    total = arithmetic.rerank(arithmetic.add(trees, [0.5, 1.0]), 3)[0]
    alone, _ = arithmetic.dare(key, [{"mixed": trees[0]["mixed"]}], rank=3, density=0.5, weights=[0.5])
    for path in total:
        assert_delta(got, path, dense(total, path))
        assert distance(rest, total, path) > 0.1
    assert_delta(alone, "mixed", dense(rest, "mixed"))


def test_dense_deltas_exist_one_layer_at_a_time():
    """The temporaries grow by the factors of each further layer, and not by its dense matrices."""

    def temporaries(layers):
        a, b, w = (jax.ShapeDtypeStruct((layers, *shape), jnp.float32) for shape in ((64, 2), (48, 2), (64, 48)))
        key = jax.ShapeDtypeStruct((layers,), jax.random.key(0).dtype)
        weights = jax.ShapeDtypeStruct((2,), jnp.float32)
        programs = (
            deltas.merged.lower(deltas.elected, [(a, b)] * 2, weights, None, 0.2, 2),
            deltas.merged.lower(deltas.dropped, [(a, b)] * 2, weights, key, 0.2, 2),
            deltas.difference.lower(w, w, 2),
        )
        return [program.compile().memory_analysis().temp_size_in_bytes for program in programs]

    for one, sixteen in zip(temporaries(1), temporaries(16), strict=True):
        factors, matrix = 4 * 2 * (64 + 48), 4 * 64 * 48
        assert one > 2 * matrix and (sixteen - one) / 15 < 3 * factors < matrix / 4


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def by_peft(peft, adapters, weights, **combination):
    """What PEFT makes of these adapters of one weight [in, out]."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False))
    for i, one in enumerate(adapters):
        config = peft.LoraConfig(r=one.rank, lora_alpha=one.rank * one.scale, target_modules=["0"])
        model = model.add_adapter(str(i), config) or model if i else peft.get_peft_model(model, config, str(i))
        layer = model.base_model.model[0]
        layer.lora_A[str(i)].weight.data = torch.tensor(np.asarray(one.a).T)
        layer.lora_B[str(i)].weight.data = torch.tensor(np.asarray(one.b))
    model.add_weighted_adapter([str(i) for i in range(len(adapters))], weights, "merged", **combination)
    return layer.get_delta_weight("merged").detach().numpy().T


PAIR, SHARES = [tree(0, paths=("dense",)), tree(1, rank=3, scale=1.5, paths=("dense",))], [0.6, 1.2]
COMBINATIONS = {
    "cat": (PAIR, SHARES, {}, lambda: arithmetic.add(PAIR, SHARES)),
    "svd": (PAIR, SHARES, {"svd_rank": 3}, lambda: arithmetic.rerank(arithmetic.add(PAIR, SHARES), 3)[0]),
    "ties_svd": (PAIR, SHARES, {"svd_rank": 3, "density": 0.4}, lambda: arithmetic.ties(PAIR, 3, 0.4, SHARES)[0]),
    # The ties of one tree are what is left of it after trimming.
    "magnitude_prune_svd": (
        PAIR[:1] * 2,
        [0.5, 0.5],
        {"svd_rank": 4, "density": 0.4},
        lambda: arithmetic.ties(PAIR[:1], 4, 0.4)[0],
    ),
}


@pytest.mark.slow  # PEFT takes that long to import
@pytest.mark.parametrize("name", COMBINATIONS)
def test_peft_combines_alike(name, peft):
    trees, weights, options, ours = COMBINATIONS[name]
    theirs = by_peft(peft, [x["dense"] for x in trees], weights, combination_type=name, **options)
    np.testing.assert_allclose(dense_delta(ours()["dense"]), theirs, atol=1e-5 * np.abs(theirs).max())
    other = {key: 0.8 if key == "density" else 1 for key in options}
    if other:
        unlike = by_peft(peft, [x["dense"] for x in trees], weights, combination_type=name, **other)
        assert np.abs(unlike - theirs).max() > 1e-2


@pytest.mark.slow
def test_peft_dares_alike(peft, key, monkeypatch):
    """Given our masks, which merges at full rank with a weight of zero for all but one adapter show."""
    import torch

    density, masks = 0.7, []
    for one, weights in zip(PAIR, ([1.0, 0.0], [0.0, 1.0]), strict=True):
        kept = dense(arithmetic.dare(key, PAIR, 6, density, weights)[0], "dense")
        masks.append(np.abs(kept) > np.abs(dense(one, "dense") / density) / 2)
    drawn = iter([torch.tensor(mask.T, dtype=torch.float32) for mask in masks])
    assert np.any(masks[0] != masks[1]) and not np.all(masks[0])
    monkeypatch.setattr(torch, "bernoulli", lambda input: next(drawn))
    options = {"combination_type": "dare_linear_svd", "svd_rank": 3, "density": density}
    theirs = by_peft(peft, [x["dense"] for x in PAIR], SHARES, **options)
    ours, _ = arithmetic.dare(key, PAIR, 3, density, SHARES)
    np.testing.assert_allclose(dense(ours, "dense"), theirs, atol=1e-5 * np.abs(theirs).max())


@dataclasses.dataclass(frozen=True)
class Shifted(lora.LoRA):
    """A LoRA that stands for something else."""


def changed(**fields):
    return {"w": dataclasses.replace(one_matrix([1.0, 2], [3.0, 4])["w"], **fields)}


GOOD = one_matrix([1.0, 2], [3.0, 4])
NAN = changed(a=jnp.array([[jnp.nan, 0], [0, 1]]))
MISTAKES = {
    "give a list of trees": lambda: arithmetic.add(GOOD),
    "give a list of trees of": lambda: arithmetic.stack([]),
    "a of the adapter of 'w' [2, 2] is not finite": lambda: arithmetic.add([GOOD, NAN]),
    "b of the adapter of 'w' [2, 2] is not finite": lambda: arithmetic.rerank(changed(b=jnp.full((2, 2), jnp.inf)), 1),
    "start of b of the adapter of 'w' [2, 1] is not finite": lambda: arithmetic.add(
        [changed(start=(jnp.ones((2, 1)), jnp.full((2, 1), jnp.nan)))]
    ),
    "the scale of the adapter of 'w' is nan": lambda: arithmetic.scale(changed(scale=math.nan), 1.0),
    "cannot be scaled by inf": lambda: arithmetic.scale(GOOD, math.inf),
    "the adapter of 'w' is a DoRA; only a LoRA's a b can": lambda: arithmetic.add(
        [{"w": DoRA(GOOD["w"], jnp.ones(2))}]
    ),
    "the adapter of 'w' is a Shifted": lambda: arithmetic.stack(
        [{"w": Shifted(**{f.name: getattr(GOOD["w"], f.name) for f in dataclasses.fields(GOOD["w"])})}]
    ),
    "'w' are of different weights: in [2] out [2], axes ((), (0,), (1,)) and in [2] out [3]": lambda: arithmetic.ties(
        [GOOD, one_matrix([1.0, 2, 3], [4.0, 5, 6])], 1
    ),
    "axes ((), (0,), (1,)) and in [2] out [2], axes ((), (1,), (0,))": lambda: arithmetic.add(
        [GOOD, changed(axes=Axes((), (1,), (0,)))]
    ),
    "the factors of 'w', [1, 2, 2] and [1, 2, 2], do not fit": lambda: arithmetic.rerank(arithmetic.stack([GOOD]), 1),
    "stack needs the same paths in every tree, but tree 1 has no 'w'": lambda: arithmetic.stack([GOOD, {}]),
    "fedavg needs the same paths": lambda: arithmetic.fedavg([tree(0), GOOD]),
    "'w' has ranks [2, 2] and scales [1.0, 2.0]; average takes any": lambda: arithmetic.fedavg(
        [GOOD, changed(scale=2.0)]
    ),
    "a stack has one dropout, but the adapters of 'w' have [0.0, 0.5]": lambda: arithmetic.stack(
        [GOOD, changed(dropout=0.5)]
    ),
    "3 weights for 2 trees": lambda: arithmetic.average([GOOD, GOOD], [1, 2, 3]),
    "the weights [1.0, nan] are not all finite": lambda: arithmetic.add([GOOD, GOOD], [1, math.nan]),
    "the weights [2.0, -1.0] are no shares": lambda: arithmetic.average([GOOD, GOOD], [2, -1]),
    "the weights [0.0, 0.0] are no shares": lambda: arithmetic.fedavg([GOOD, GOOD], [0, 0]),
    "no rank 3 for the matrix 2 x 2 of 'w': choose 1 to 2": lambda: arithmetic.rerank(GOOD, 3),
    "no rank 0 for the matrix": lambda: arithmetic.ties([GOOD], 0),
    "density is the fraction of elements to keep, in (0, 1], not 20": lambda: arithmetic.ties([GOOD], 1, 20),
    "in (0, 1], not 0": lambda: arithmetic.dare(jax.random.key(0), [GOOD], 1, 0),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    with pytest.raises(ValueError) as caught:
        MISTAKES[message]()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_field_that_may_change_the_delta_is_refused(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Longer(lora.LoRA):
        extra: jax.Array | None = None

    monkeypatch.setattr(grouping, "LoRA", Longer)
    plain = Longer(**{field.name: getattr(GOOD["w"], field.name) for field in dataclasses.fields(GOOD["w"])})
    assert arithmetic.scale({"w": plain}, 2.0)["w"].scale == 2.0
    with pytest.raises(ValueError, match="the adapter of 'w' has 'extra'; only a LoRA's a b can be combined"):
        arithmetic.scale({"w": dataclasses.replace(plain, extra=jnp.ones(2))}, 2.0)
