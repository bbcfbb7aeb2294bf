"""Functions that no factors can be carried through: the error names the weight, the operation and the model's line."""

import re

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import adapter

import lora_jax as lora
from lora_jax import Axes

pytestmark = pytest.mark.usefixtures("strict")


def through_a_custom_vjp(x, w):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    return product(x, w)


def through_a_pallas_kernel(x, w):
    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


def through_the_host(x, w):
    return jax.pure_callback(lambda x, w: np.matmul(x, w), jax.ShapeDtypeStruct((5, 6), x.dtype), x, w)


def through_a_function_of_its_elements(x, w):
    return x @ jnp.tanh(w)


def through_a_sort(x, w):
    return x @ jnp.sort(w, axis=0)


def through_a_product_with_itself(x, w):
    return x @ (w @ w)


def through_a_sum_with_another(x, w):
    return x @ (w + jnp.eye(6))


def inside_a_scan(x, w):
    return jax.lax.scan(lambda x, _: (x @ jnp.exp(w), None), x, None, length=2)[0]


def inside_a_remat(x, w):
    return jax.checkpoint(lambda x, w: x @ jnp.linalg.qr(w)[0])(x, w)


REFUSED = {
    through_a_custom_vjp: ("custom_vjp_call", "through_a_custom_vjp"),
    through_a_pallas_kernel: ("pallas_call", "through_a_pallas_kernel"),
    through_the_host: ("pure_callback", "through_the_host"),
    through_a_function_of_its_elements: ("tanh", "through_a_function_of_its_elements"),
    through_a_sort: ("sort", "through_a_sort"),
    through_a_product_with_itself: ("dot_general", "through_a_product_with_itself"),
    through_a_sum_with_another: ("add", "through_a_sum_with_another"),
    inside_a_scan: ("exp", "inside_a_scan"),
    inside_a_remat: ("householder_product|geqrf|qr", "inside_a_remat"),
}


@pytest.mark.parametrize("apply", REFUSED, ids=lambda apply: apply.__name__)
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_error_names_the_weight_the_operation_and_the_line(key, apply, run):
    params = {"first": {"w": jax.random.normal(key, (6, 6)) / 2}, "second": jax.random.normal(key, (6, 6))}
    adapters = {path: adapter(key, (6, 6), Axes((), (0,), (1,))) for path in ("first/w", "second")}
    x = jax.random.normal(key, (5, 6))

    def f(p, x):
        return apply(x @ p["second"], p["first"]["w"])

    operation, function = REFUSED[apply]
    wanted = (
        rf"the adapted weight 'first/w' \[6, 6\] reaches `({operation})` at \S*refused_test.py:\d+(:\d+)? "
        rf"\(\S*{function}\S*\), .*materialise=\['first/w'\]"
    )
    with pytest.raises(lora.LiftError) as error:
        run(lora.lift(f))(lora.attach(params, adapters), x)
    assert re.fullmatch(wanted, str(error.value)), error.value
    uses = lora.trace(f, params, x)["first/w"].uses
    assert any(use.where in str(error.value) and use.where for use in uses)

    y = run(lora.lift(f, materialise=["first/w"]))(lora.attach(params, adapters), x)
    np.testing.assert_allclose(y, f(lora.merge(params, adapters), x), rtol=1e-3, atol=1e-4)
    assert float(jnp.abs(y - f(params, x)).max()) > 1e-2
    y = run(lora.lift(f))(lora.attach(params, {"second": adapters["second"]}), x)  # or leave it out
    np.testing.assert_allclose(y, f(lora.merge(params, {"second": adapters["second"]}), x), rtol=1e-3, atol=1e-4)
