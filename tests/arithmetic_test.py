"""Operations on adapters, each compared with what it should do to the dense deltas, in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import dense_delta
from trees import WEIGHTS, assert_delta, dense, distance, matrices, tree

import lora_jax as lora
from lora_jax import Axes, Rule, Spec, arithmetic

pytestmark = pytest.mark.usefixtures("strict")
LOSSY = 1e-3


def assert_nearest(adapters, errors, path, want, rank, tolerance=1e-5):
    """These are the adapters of this rank nearest to a dense delta, and their error is told (Eckart and Young)."""
    u, s, v = np.linalg.svd(matrices(want, path), full_matrices=False)
    best = np.matmul(u[..., :rank] * s[..., None, :rank], v[..., :rank, :])
    got = matrices(dense_delta(adapters[path]), path)
    np.testing.assert_allclose(got, best, atol=tolerance * np.abs(best).max(), rtol=0)
    assert errors[path] == pytest.approx(np.linalg.norm(s[..., rank:]) / np.linalg.norm(s), abs=1e-5)


def test_scale():
    for path in WEIGHTS:
        assert_delta(arithmetic.scale(tree(0), -3), path, -3 * dense(tree(0), path))
    assert arithmetic.scale(tree(0), 0)["dense"].rank == 2
    np.testing.assert_array_equal(dense(arithmetic.scale(tree(0), 0), "dense"), np.zeros((6, 8)))


def test_add():
    trees = [tree(0), tree(1, rank=3, scale=1.5), tree(2, rank=1, paths=("dense", "mixed"))]
    total = arithmetic.add(trees, weights=[1.0, -0.5, 2.0])
    for path in WEIGHTS:
        want = dense(trees[0], path) - 0.5 * dense(trees[1], path) + 2 * dense(trees[2], path)
        assert_delta(total, path, want)
        assert total[path].rank == (6 if path in trees[2] else 5)
        assert distance(arithmetic.add(trees), total, path) > 0.1
    np.testing.assert_allclose(dense(arithmetic.add([tree(0), tree(0)], [1, -1]), "heads"), 0, atol=1e-6)


def test_average():
    trees = [tree(0), tree(1, rank=3, scale=1.5), tree(2, paths=("dense",))]
    mean = arithmetic.average(trees, weights=[10, 30, 60])
    for path in WEIGHTS:
        want = sum(w * dense(x, path) for w, x in zip((0.1, 0.3, 0.6), trees, strict=True))
        assert_delta(mean, path, want)
        assert_delta(arithmetic.average(trees), path, sum(dense(x, path) for x in trees) / 3)
        assert distance(arithmetic.average(trees), mean, path) > 0.1


def test_linear_operations_compile():
    trees = [tree(0), tree(1)]
    for f in (arithmetic.add, arithmetic.average, arithmetic.stack):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), jax.jit(f)(trees), f(trees))


def test_fedavg_says_how_far_it_is_from_the_mean():
    trees, shares = [tree(0), tree(1), tree(2)], (0.25, 0.25, 0.5)
    got, errors = arithmetic.fedavg(trees, weights=[1, 1, 2])
    for path, (_, axes) in WEIGHTS.items():
        a, b = (
            sum(w * np.asarray(getattr(x[path], name), np.float64) for w, x in zip(shares, trees, strict=True))
            for name in "ab"
        )
        assert_delta(got, path, dense_delta(lora.LoRA(a, b, 0.7, axes)))
        exact = sum(w * dense(x, path) for w, x in zip(shares, trees, strict=True))
        want = np.linalg.norm(dense(got, path) - exact) / np.linalg.norm(exact)
        assert errors[path] == pytest.approx(want, rel=1e-4) and want > 0.1


def test_fedavg_is_the_mean_where_a_is_shared():
    trees = [tree(0), tree(1)]
    trees[1] = {path: dataclasses.replace(x, a=trees[0][path].a) for path, x in trees[1].items()}
    got, errors = arithmetic.fedavg(trees)
    for path in WEIGHTS:
        assert_delta(got, path, (dense(trees[0], path) + dense(trees[1], path)) / 2)
        assert errors[path] < 1e-6


@pytest.mark.parametrize("others", [{}, {"rank": 3}, {"rank": 1, "scale": 2.0}])
def test_stack(others, key):
    """Each slice of a stack is that adapter, and a vmap over the stack runs each over one base."""
    trees = [tree(0), tree(1), tree(2, **others)]
    bank = arithmetic.stack(trees)
    for k, adapters in enumerate(trees):
        one = jax.tree.map(lambda x, k=k: x[k], bank)
        for path in WEIGHTS:
            assert_delta(one, path, dense(adapters, path), tolerance=1e-6)
    params, x = {"dense": jax.random.normal(key, (6, 8))}, jnp.ones((3, 6))

    def run(adapters, params, x):
        return lora.lift(lambda p, x: x @ p["dense"])(lora.attach(params, adapters), x)

    ys = jax.vmap(run, in_axes=(0, None, None))({"dense": bank["dense"]}, params, x)
    for y, adapters in zip(ys, trees, strict=True):
        want = np.asarray(x, np.float64) @ (np.asarray(params["dense"], np.float64) + dense(adapters, "dense"))
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert np.abs(ys[0] - ys[1]).max() > LOSSY


def test_stack_is_bit_identical_where_nothing_differs():
    one = jax.tree.map(lambda x: x[1], arithmetic.stack([tree(0), tree(1)]))
    jax.tree.map(np.testing.assert_array_equal, one, tree(1))


def test_rerank_is_the_truncated_svd():
    both = arithmetic.add([tree(0), tree(1, scale=0.1)])
    for rank in (1, 2):
        got, errors = arithmetic.rerank(both, rank)
        for path in WEIGHTS:
            assert_nearest(got, errors, path, dense(both, path), rank)
            assert got[path].rank == rank and errors[path] > LOSSY
            gram = np.matmul(*(matrices_of_a(got[path], path, flip) for flip in (True, False)))
            np.testing.assert_allclose(gram, np.broadcast_to(np.eye(rank), gram.shape), atol=1e-5)


def matrices_of_a(one, path, flip):
    stacked = len(WEIGHTS[path][1].stacked)
    a = np.asarray(one.a).reshape(math.prod(one.a.shape[:stacked]), -1, one.rank)
    return np.swapaxes(a, -1, -2) if flip else a


def test_rerank_loses_nothing_of_a_rank_that_is_there():
    twice, two = arithmetic.add([tree(0), tree(0)]), tree(0, scale=0.2)
    got, errors = arithmetic.rerank(twice, 2)
    kept, none = arithmetic.rerank(two, 3)
    for path in WEIGHTS:
        assert twice[path].rank == 4 and got[path].rank == 2
        assert_delta(got, path, 2 * dense(tree(0), path))
        assert_delta(kept, path, dense(two, path))
        assert max(errors[path], none[path]) < 1e-5
        assert kept[path].rank == 2 and kept[path].scale == 0.2
    assert set(arithmetic.rerank(arithmetic.scale(two, 0), 1)[1].values()) == {0.0}


def test_starts_and_shared_factors_are_part_of_the_delta():
    """Each adapter has a twin without them, of the same delta."""
    one, began = tree(0), tree(1)
    first, same = one["mixed"].a[:, 0], jnp.broadcast_to(one["heads"].b[:1], one["heads"].b.shape)
    told = {
        "dense": dataclasses.replace(one["dense"], start=(began["dense"].a, began["dense"].b), frozen=("a",)),
        "mixed": dataclasses.replace(one["mixed"], a=first, common=("a", (0,))),
        "heads": dataclasses.replace(
            one["heads"], b=one["heads"].b[0], common=("b", (0,)), start=(began["heads"].a, began["heads"].b[0])
        ),
    }
    twins = {
        "mixed": dataclasses.replace(one["mixed"], a=jnp.stack([first, first], 1)),
        "heads": dataclasses.replace(one["heads"], b=same),
    }
    ended = dataclasses.replace(began["heads"], b=jnp.broadcast_to(began["heads"].b[:1], same.shape))
    want = {
        "dense": dense(one, "dense") - dense(began, "dense"),
        "mixed": dense(twins, "mixed"),
        "heads": dense(twins, "heads") - dense_delta(ended),
    }
    other = tree(2, paths=tuple(told))
    bank = arithmetic.stack([other, told])
    merged = lora.merge({path: jnp.zeros(WEIGHTS[path][0]) for path in told}, arithmetic.scale(told, -2))
    for path in told:
        assert_delta(arithmetic.add([told, other], [2, 1]), path, 2 * want[path] + dense(other, path))
        assert_delta(jax.tree.map(lambda x: x[1], bank), path, want[path])
        assert_delta(arithmetic.rerank({path: told[path]}, 3 if path == "mixed" else 4)[0], path, want[path])
        assert np.abs(want[path] - dense(one, path)).max() > LOSSY
        np.testing.assert_allclose(merged[path], -2 * want[path], atol=1e-5)
    got, errors = arithmetic.fedavg([told, told])
    assert_delta(got, "heads", want["heads"])
    assert max(errors.values()) < 1e-6 and got["heads"].start is None and got["dense"].frozen == ("a",)


def test_rerank_never_forms_the_matrix():
    """Here it would have 10^11 elements."""
    size, (key_a, key_b) = 300_000, jax.random.split(jax.random.key(0))
    a, b = jax.random.normal(key_a, (size, 2)), jax.random.normal(key_b, (size, 2))
    adapters, errors = arithmetic.rerank(
        {"w": lora.LoRA(a, b * jnp.array([[1.0, 1e-2]]), 1.0, Axes((), (0,), (1,)))}, 1
    )
    assert adapters["w"].a.shape == (size, 1) and errors["w"] == pytest.approx(1e-2, rel=0.05)


def model(p, x):
    """Uses every weight along the axes that it has in WEIGHTS."""
    layers = jax.lax.scan(
        lambda x, w: (x + jnp.einsum("td,dhk->thk", x, w)[:, 0] @ jnp.ones((4, 6)), None), x, p["heads"]
    )[0]
    expert = jnp.einsum("tqpdc,pcfdq->tqpf", jnp.ones((3, 2, 2, 5, 4)), p["mixed"])
    return jnp.tanh(layers @ p["dense"]) + x @ p["turned"].T + expert.sum() + p["norm"].sum() + p["spare"].sum()


def checkpoints(rank, dtype=jnp.float32):
    """Two checkpoints that differ by deltas of this rank, and in `norm`."""
    shapes = {path: shape for path, (shape, _) in WEIGHTS.items()} | {"norm": (6,), "spare": (2, 2)}
    base = {path: jax.random.normal(jax.random.key(7), shape).astype(dtype) for path, shape in shapes.items()}
    tuned = lora.merge(base, tree(3, rank=rank)) | {"norm": base["norm"] + jnp.ones((), dtype)}
    return base, tuned, lora.trace(model, jax.tree.map(lambda x: x.astype(jnp.float32), base), jnp.ones((3, 6)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extract_is_the_truncated_svd_of_the_difference(dtype):
    base, tuned, sites = checkpoints(rank=3, dtype=dtype)
    adapters, errors = arithmetic.extract(base, tuned, sites, Spec(Rule("|".join(WEIGHTS), rank=2, alpha=5)))
    assert errors.keys() == {*WEIGHTS, "norm"} and errors["norm"] == 1.0
    for path in WEIGHTS:
        difference = np.asarray(tuned[path], np.float64) - np.asarray(base[path], np.float64)
        assert_nearest(adapters, errors, path, difference, 2)
        assert adapters[path].scale == 2.5 and errors[path] > LOSSY


def test_extract_finds_the_adapter_that_was_merged():
    base, tuned, sites = checkpoints(rank=2)
    adapters, errors = arithmetic.extract(base, tuned, sites, Spec(Rule("dense|heads", rank=2)))
    assert errors.keys() == {*WEIGHTS, "norm"} and adapters.keys() == {"dense", "heads"}
    for path, error in errors.items():
        assert error < 1e-5 if path in adapters else error == 1.0
    again = lora.merge(base, adapters)
    np.testing.assert_allclose(again["heads"], tuned["heads"], atol=1e-5)
    same, none = arithmetic.extract(base, base, sites, Spec(Rule("dense", rank=2)))
    assert none == {"dense": 0.0} and not np.any(same["dense"].b) and np.any(same["dense"].a)


def test_extract_refuses_checkpoints_of_different_models():
    base, tuned, sites = checkpoints(rank=2)
    spec = Spec(Rule("dense", rank=2))
    without = {path: leaf for path, leaf in tuned.items() if path != "spare"}
    bad = base["dense"].at[0, 0].set(jnp.nan)
    for message, one, other, chosen in (
        ("'spare' is [2, 2] in the base, missing in the tuned checkpoint", base, without, spec),
        ("'norm' is [6] in the base, [7] in the tuned", base, tuned | {"norm": jnp.ones(7)}, spec),
        ("no parameter 'dense' in these checkpoints", {"v": base["norm"]}, {"v": base["norm"]}, spec),
        ("'dense' does not fit its weight [6, 9]", base | {"dense": jnp.ones((6, 9))}, None, spec),
        ("difference at 'dense' is not finite everywhere", base, tuned | {"dense": bad}, spec),
        ("rank 7 is larger than the matrix 6 x 8 of 'dense'", base, tuned, Spec(Rule("dense", rank=7))),
    ):
        with pytest.raises(ValueError) as caught:
            arithmetic.extract(one, one if other is None else other, sites, chosen)
        assert message in str(caught.value)
