"""A mixture of experts compiled for a TPU that is not there: what its products cost."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lora_jax.models import moe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the package libtpu"),
]
N, A, D = 512, 2, 256


def grouped(x_ND, scores_NE, kernel_EDD):
    return moe.routed(lambda x_GMD, expert_G: moe._product(x_GMD, kernel_EDD, expert_G), x_ND, scores_NE, A, True)


def ragged(x_ND, scores_NE, kernel_EDD):
    expert_S = jax.lax.top_k(scores_NE, A)[1].reshape(-1)
    order = jnp.argsort(expert_S)
    return jax.lax.ragged_dot(x_ND[order // A], kernel_EDD, jnp.bincount(expert_S, length=kernel_EDD.shape[0]))


def operations(f, experts):
    from jax.experimental import topologies

    place = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])
    shapes = [(N, D), (N, experts), (experts, D, D)]
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes]
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("experts", [8, 64])
def test_a_tpu_computes_at_most_twice_the_rows_of_the_active_experts(experts):
    needed = 2 * N * A * D**2
    assert needed <= operations(grouped, experts) < 2.2 * needed
    assert operations(ragged, experts) > 0.9 * experts * needed
