"""Trees of random adapters over weights whose axes lie in every way, and their dense deltas."""

import math

import jax
import numpy as np
from oracle import adapter, dense_delta

from lora_jax import Axes
from lora_jax.adapters import check

WEIGHTS = {
    "dense": ((6, 8), Axes((), (0,), (1,))),
    "turned": ((8, 6), Axes((), (1,), (0,))),
    "heads": ((3, 6, 2, 4), Axes((0,), (1,), (2, 3))),
    "mixed": ((2, 4, 3, 5, 2), Axes((4, 0), (3, 1), (2,))),
}


def tree(seed, rank=2, scale=0.7, paths=tuple(WEIGHTS)):
    keys = jax.random.split(jax.random.key(seed), len(WEIGHTS))
    return {
        path: adapter(key, *WEIGHTS[path], rank=rank, scale=scale)
        for path, key in zip(WEIGHTS, keys, strict=True)
        if path in paths
    }


def dense(adapters, path):
    """The delta; zero where there is no adapter."""
    return dense_delta(adapters[path]) if path in adapters else np.zeros(WEIGHTS[path][0])


def matrices(delta, path):
    """A dense delta as [S, D, F]."""
    shape, axes = WEIGHTS[path]
    sizes = [math.prod(shape[axis] for axis in group) for group in axes]
    return np.transpose(delta, [axis for group in axes for axis in group]).reshape(sizes)


def distance(one, other, path):
    """How far one tree's delta is from another's, relative to the other's."""
    return np.linalg.norm(dense(one, path) - dense(other, path)) / np.linalg.norm(dense(other, path))


def assert_delta(adapters, path, want, tolerance=1e-5):
    """This adapter fits its weight and stands for this delta."""
    got = dense_delta(adapters[path])
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)
    check(adapters[path], path, WEIGHTS[path][0])
