"""What a LoRA step of the scanned decoder costs, at the shapes of SmolLM2-135M, rank 16, 4 x 256 tokens.

It is what the step of a decoder with LoRA written into it costs, and no gradient or copy of a base weight is computed.
"""

import dataclasses
import functools
import math

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from steps import SMOLLM2, Steps

import lora_jax as lora
from lora_jax.cost import flops

SHAPES = steps.shapes(SMOLLM2)
# Full remat computes the layers' forward products again in either step: (6N² + ...) of 8N², not (4N² + ...) of 6N².
SHARE = {"none": 0.72, "dots": 0.72, "full": 0.775}


@functools.cache
def compiled(step, remat):
    program = jax.jit(getattr(Steps(SMOLLM2, remat), step)).lower(*SHAPES).compile()
    return hlo.parse(program.as_text()), program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", SHARE)
def test_flops(remat):
    cost = {
        step: flops(getattr(Steps(SMOLLM2, remat), step), *SHAPES) for step in ("lifted", "by_hand", "merged", "full")
    }
    assert cost["lifted"] == pytest.approx(cost["by_hand"], rel=0.005)
    assert cost["lifted"] <= SHARE[remat] * cost["full"]
    assert cost["merged"] > 0.92 * cost["full"]


@pytest.mark.slow
@pytest.mark.parametrize("remat", SHARE)
def test_flops_of_the_compiled_program(remat):
    lifted, by_hand, full = (compiled(step, remat)[0].flops() for step in ("lifted", "by_hand", "full"))
    assert lifted == pytest.approx(by_hand, rel=0.005)
    assert lifted <= SHARE[remat] * full
    # XLA computes once what nested remats ask for twice.
    assert lifted == pytest.approx(flops(Steps(SMOLLM2, remat).lifted, *SHAPES), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("remat", SHARE)
def test_temporaries(remat):
    lifted, by_hand, merged = (compiled(step, remat)[1] for step in ("lifted", "by_hand", "merged"))
    assert lifted == pytest.approx(by_hand, rel=0.02)
    assert merged > lifted + lora.nbytes(SHAPES[1]["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", SHARE)
def test_nothing_of_a_weights_size_is_computed(remat):
    sizes = steps.sizes(SHAPES[1])
    if remat == "none":
        sizes -= {576, 30 * 576}  # norms' scales, which the decoder itself saves layer by layer
    assert compiled("lifted", remat)[0].computed(sizes) == []
    opcodes = {step: {i.opcode for i in compiled(step, remat)[0].computed(sizes)} for step in ("full", "merged")}
    assert "dot" in opcodes["full"]  # gradients
    assert {"dot", "add"} <= opcodes["merged"]  # gradients, and W + γ a b


def narrow(**changes):
    return dataclasses.replace(SMOLLM2, **{"vocab": 320, "layers": 2, "context": 128} | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        narrow(dim=48, hidden=80, heads=3, kv_heads=1, head_dim=16, layers=3),
        pytest.param(narrow(), id="width of SmolLM2", marks=pytest.mark.slow),
    ],
)
def test_gradients(config):
    arguments = steps.values(config)
    made = Steps(config, "full")
    loss, gradients = jax.jit(made.lifted)(*arguments)
    loss_by_hand, by_hand = jax.jit(made.by_hand)(*arguments)
    base = jax.jit(made.loss)(*arguments[1:])
    np.testing.assert_allclose(loss, loss_by_hand, rtol=1e-5)
    assert abs(loss - base) > 1e-3
    for path, gradient in gradients.items():
        for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(by_hand[path]), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()), rtol=1e-5, err_msg=path)
            assert float(jnp.abs(want).max()) > 0


# --- several adapters in one step: `vmap` over the adapters alone ---

K = 4


def many(adapters):
    """K adapters, no two alike."""
    return jax.tree.map(lambda leaf: jnp.stack([(k + 1) * leaf for k in range(K)]), adapters)


@pytest.mark.slow
def test_adapters_of_one_step_have_their_own_gradients_and_learning_rates():
    config = narrow(dim=48, hidden=80, heads=3, kv_heads=1, head_dim=16)
    adapters, params, batch = steps.values(config)
    step = Steps(config, "full").lifted
    rates_K = jnp.array([0.0, 0.1, 0.2, 0.3])

    def update(adapters, rate):
        loss, gradients = step(adapters, params, batch)
        return loss, jax.tree.map(lambda leaf, gradient: leaf - rate * gradient, adapters, gradients)

    losses_K, together = jax.jit(jax.vmap(update))(many(adapters), rates_K)
    assert len(set(losses_K.tolist())) == K
    for k in range(K):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], many(adapters))
        loss, separate = jax.jit(update)(one, rates_K[k])
        np.testing.assert_allclose(losses_K[k], loss, rtol=1e-5)
        jax.tree.map(
            lambda got, want, k=k: np.testing.assert_allclose(got[k], want, rtol=1e-4, atol=1e-5), together, separate
        )


def test_adapters_of_one_step_share_the_base():
    """A product with a base weight is one product, of the tokens of all adapters with the one weight."""
    config = narrow(vocab=304, layers=30)
    adapters, params, batch = steps.shapes(config, batch=2, length=20)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((K, *leaf.shape), leaf.dtype), adapters)
    step = jax.vmap(Steps(config, "full").lifted, in_axes=(0, None, None))
    program = hlo.parse(jax.jit(step).lower(stacked, params, batch).compile().as_text())
    sizes = {size for size in steps.sizes(params) if size > 30 * 576}  # but the norms' scales
    assert program.computed(sizes | {K * size for size in sizes}) == []
    seen = []
    for instruction, operands in program:
        weights = [math.prod(operand.shapes[0]) in sizes for operand in operands]
        if instruction.opcode == "dot" and any(weights):
            (data,) = operands[weights.index(False)].shapes
            assert math.prod(data) % (K * 2 * 20) == 0 and not instruction.axes("lhs_batch_dims"), instruction
            seen.append(instruction)
    assert len(seen) >= 7 + 7 + 6  # a layer forward, backward, and again but for its last product


def test_the_first_product_is_computed_once_for_all_adapters():
    """Data that no adapter has touched meets the base once, however many adapters there are."""
    N, D, F = 64, 96, 160
    params = {"up": jnp.zeros((D, F)), "down": jnp.zeros((F, D))}
    x = jnp.zeros((N, D))

    def f(params, x):
        return jnp.sum(jnp.sin(jnp.sin(x @ params["up"]) @ params["down"]))

    adapters = lora.init(jax.random.key(0), params, lora.trace(f, params, x), lora.Spec(target="up|down", rank=4))
    stacked = many(adapters)

    def step(adapters):
        return jax.grad(lambda adapters: lora.lift(f)(lora.attach(params, adapters), x))(adapters)

    one, together = flops(step, adapters), flops(jax.vmap(step), stacked)
    assert together == K * one - (K - 1) * 2 * N * D * F
    merged = jax.vmap(jax.grad(lambda adapters: f(lora.merge(params, adapters), x)))
    assert flops(merged, stacked) > together
