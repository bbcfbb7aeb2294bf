"""Every form of the cross-entropy has the value and the gradient of the plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import decoder, loss
from lora_jax.models.config import DecoderConfig

SHAPE = DecoderConfig("llama", 61, 16, 24, 1, 2, 1, 8, context=64)
FORMS = {
    "all logits": {},
    "chunks": {"chunk": 10},
    "chunks that do not divide": {"chunk": 17},
    "frozen head": {"frozen_head": True},
    "frozen head in chunks": {"chunk": 10, "frozen_head": True},
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
    kernel = params["embed"]["embedding"].T if config.tied else params["head"]["kernel"]
    log_probs = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.sum(weights * jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_value_and_gradient(case, form):
    params, hidden, targets, weights, config = case

    def ours(hidden, targets=targets):
        return loss.cross_entropy(params, hidden, targets, weights, config, **form)[0]

    value, gradient = jax.value_and_grad(ours)(hidden)
    expected = jax.value_and_grad(lambda h: plain(params, h, targets, weights, config))(hidden)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-5)
    np.testing.assert_allclose(ours(hidden), value, rtol=1e-6)
    assert abs(ours(hidden, targets[:, ::-1]) - value) > 0.1


@pytest.mark.parametrize("form", [FORMS["all logits"], FORMS["chunks"]], ids=["all logits", "chunks"])
def test_gradient_of_the_head(case, form):
    params, hidden, targets, weights, config = case
    ours = jax.grad(lambda p: loss.cross_entropy(p, hidden, targets, weights, config, **form)[0])(params)
    expected = jax.grad(lambda p: plain(p, hidden, targets, weights, config))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, expected)
    assert max(np.abs(x).max() for x in jax.tree.leaves(ours)) > 0.1


def test_the_second_value_is_the_sum_of_weights(case):
    _, _, _, weights, _ = case
    assert loss.cross_entropy(*case)[1] == weights.sum()


def test_bfloat16_hidden_states_give_a_float32_loss(case):
    params, hidden, *rest = case
    total, count = loss.cross_entropy(params, hidden.astype(jnp.bfloat16), *rest)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, plain(params, hidden, *rest), rtol=1e-2)


def test_no_form_but_the_first_holds_all_logits(case):
    params, hidden, targets, weights, config = case
    for name, form in FORMS.items():
        f = jax.grad(lambda h, form=form: loss.cross_entropy(params, h, targets, weights, config, **form)[0])
        text = str(jax.make_jaxpr(f)(hidden))
        assert ("[40,61]" in text) == ("chunk" not in form), name


def test_gradient_of_a_frozen_head_is_an_error(case):
    params, *rest = case
    with pytest.raises(ValueError, match="frozen_head=True, but the head's gradient is asked for"):
        jax.grad(lambda p: loss.cross_entropy(p, *rest, frozen_head=True)[0])(params)
