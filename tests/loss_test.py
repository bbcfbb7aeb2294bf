"""Every form of the cross-entropy has the value and the gradient of the plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cost import flops
from lora_jax.models import decoder, loss
from lora_jax.models.config import DecoderConfig

pytestmark = pytest.mark.usefixtures("quick_module")
SHAPE = DecoderConfig("llama", 61, 16, 24, 1, 2, 1, 8, context=64)
FORMS = {
    "all logits": {},
    "chunks": {"chunk": 10},
    "chunks that do not divide": {"chunk": 17},
    "once": {"once": True},
    "once, in chunks": {"chunk": 10, "once": True},
    "once, in chunks that do not divide": {"chunk": 17, "once": True},
}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def case(request):
    config = DecoderConfig(**{**vars(SHAPE), "tied": request.param})
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(5 * rng.normal(size=(2, 20, 16)), jnp.float32)
    targets = rng.integers(0, 61, (2, 20))
    weights = rng.integers(0, 3, (2, 20)).astype(np.float32)
    return decoder.init(jax.random.key(0), config), hidden, targets, weights, config


def plain(params, hidden, targets, weights, config):
    """Value, and gradients of hidden states and head, in float64, written out."""
    kernel = np.float64(params["embed"]["embedding"].T if config.tied else params["head"]["kernel"])
    hidden = np.float64(hidden).reshape(-1, 16)
    z = hidden @ kernel
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    right = np.eye(61)[targets.reshape(-1)]
    dz = weights.reshape(-1, 1) * (np.exp(log_p) - right)
    return -np.sum(weights.reshape(-1, 1) * right * log_p), (dz @ kernel.T).reshape(2, 20, 16), hidden.T @ dz


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_value_and_gradients(case, form):
    params, hidden, targets, weights, config = case
    part = "embed" if config.tied else "head"

    def ours(hidden, params, targets=targets):
        return 3 * loss.cross_entropy(params, hidden, targets, weights, config, **form)[0]

    value, of_hidden = jax.value_and_grad(ours)(hidden, params)  # the head is not learned
    expected = plain(*case)
    np.testing.assert_allclose(value / 3, expected[0], rtol=1e-6)
    np.testing.assert_allclose(of_hidden / 3, expected[1], atol=1e-5)
    again, of_head = jax.grad(ours, argnums=(0, 1))(hidden, params)
    np.testing.assert_allclose(again, of_hidden, atol=1e-6)
    of_head = jax.tree.leaves(of_head[part])[0]
    np.testing.assert_allclose((of_head.T if config.tied else of_head) / 3, expected[2], atol=1e-4)
    np.testing.assert_allclose(ours(hidden, params), value, rtol=1e-6)
    assert abs(ours(hidden, params, targets[:, ::-1]) - value) > 0.1


def test_the_second_value_is_the_sum_of_weights(case):
    _, _, _, weights, _ = case
    assert loss.cross_entropy(*case)[1] == weights.sum()


def test_bfloat16_hidden_states_give_a_float32_loss(case):
    params, hidden, *rest = case
    total, count = loss.cross_entropy(params, hidden.astype(jnp.bfloat16), *rest)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, plain(*case)[0], rtol=1e-2)


def test_no_form_but_the_first_holds_all_logits(case):
    params, hidden, targets, weights, config = case
    for name, form in FORMS.items():
        f = jax.grad(lambda h, form=form: loss.cross_entropy(params, h, targets, weights, config, **form)[0])
        text = str(jax.make_jaxpr(f)(hidden))
        assert ("[40,61]" in text) == ("chunk" not in form), name


@pytest.mark.parametrize("learned", [False, True], ids=["frozen head", "learned head"])
def test_once_saves_a_product_and_chunks_save_memory(learned):
    config = DecoderConfig(**{**vars(SHAPE), "vocab": 4096, "dim": 64})
    params = {"head": {"kernel": jnp.zeros((64, 4096))}}
    hidden, targets, weights = jnp.zeros((1, 1024, 64)), np.zeros((1, 1024), int), np.ones((1, 1024))

    def measured(**form):
        def f(hidden, params):
            return loss.cross_entropy(params, hidden, targets, weights, config, **form)[0]

        gradient = jax.grad(f, argnums=(0, 1) if learned else 0)
        compiled = jax.jit(gradient).lower(hidden, params).compile()
        product = 2 * 1024 * 64 * 4096
        return flops(gradient, hidden, params) / product, compiled.memory_analysis().temp_size_in_bytes

    (whole, all_bytes), (again, again_bytes), (once, bytes_) = (
        measured(**form) for form in ({}, {"chunk": 64}, {"chunk": 64, "once": True})
    )
    products = 3 if learned else 2
    assert (round(whole, 3), round(again, 3), round(once, 3)) == (products, products + 1, products)
    assert all_bytes >= 4 * 1024 * 4096
    # A chunk's logits and their gradient, and what is added up for a head.
    assert max(bytes_, again_bytes) < all_bytes / 4
