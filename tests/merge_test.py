"""Merging, what it loses, and going back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import adapter, dense_delta, dense_params

import lora_jax as lora
from lora_jax import Axes

pytestmark = pytest.mark.usefixtures("quick_module")


def case(dtype, size=0.01):
    key = jax.random.key(5)
    params = {
        "stack": jax.random.normal(key, (2, 16, 4, 8)).astype(dtype),
        "wide": jax.random.normal(key, (16, 24)).astype(dtype),
        "norm": jnp.ones(16, dtype),
    }
    adapters = {
        "stack": adapter(key, (2, 16, 4, 8), Axes((0,), (1,), (2, 3)), scale=size),
        "wide": adapter(key, (16, 24), Axes((), (1,), (0,)), scale=size),
    }
    return params, adapters


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merge_is_the_dense_sum_rounded_once(dtype):
    params, adapters = case(dtype)
    merged, exact = lora.merge(params, adapters), dense_params(params, adapters)
    for path in params:
        assert merged[path].dtype == dtype and merged[path].shape == params[path].shape
        epsilon = float(jnp.finfo(dtype).eps)
        difference = np.abs(np.asarray(merged[path], np.float64) - np.asarray(exact[path], np.float64))
        assert np.all(difference <= epsilon * np.abs(np.asarray(exact[path], np.float64)) + 1e-7)
    np.testing.assert_array_equal(merged["norm"], params["norm"])
    assert np.any(np.asarray(merged["wide"] != params["wide"]))


def test_merge_error_is_what_rounding_loses():
    for dtype, low, high in ((jnp.float32, 1e-9, 1e-4), (jnp.bfloat16, 1e-2, 1.0)):
        params, adapters = case(dtype)
        merged, errors = lora.merge(params, adapters), lora.merge_error(params, adapters)
        for path, error in errors.items():
            delta = dense_delta(adapters[path])
            lost = np.asarray(merged[path], np.float64) - np.asarray(params[path], np.float64) - delta
            assert error == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(delta), rel=1e-2, abs=1e-6)
            assert low < error < high
    params, adapters = case(jnp.bfloat16, size=0.0)
    assert set(lora.merge_error(params, adapters).values()) == {0.0}


def test_unmerge_is_exact_where_subtracting_is_not():
    params, adapters = case(jnp.bfloat16, size=0.7)
    kept = lora.replaced(params, adapters)
    merged = lora.merge(params, adapters)
    restored = lora.unmerge(merged, adapters, kept)
    for path in params:
        np.testing.assert_array_equal(np.asarray(restored[path]), np.asarray(params[path]))
    subtracted = (merged["wide"].astype(jnp.float32) - dense_delta(adapters["wide"])).astype(jnp.bfloat16)
    assert np.mean(np.asarray(subtracted != params["wide"])) > 0.05


def test_unmerge_refuses_what_it_cannot_restore():
    params, adapters = case(jnp.float32)
    kept, merged = lora.replaced(params, adapters), lora.merge(params, adapters)
    with pytest.raises(ValueError, match="cannot unmerge 'stack': its original is not among the kept weights"):
        lora.unmerge(merged, adapters, {"wide": kept["wide"]})
    trained = {**merged, "wide": merged["wide"].at[0, 0].add(1e-3)}
    with pytest.raises(ValueError, match="cannot unmerge 'wide': it is not the kept weight plus this adapter"):
        lora.unmerge(trained, adapters, kept)


def test_merge_refuses_an_adapter_of_another_base():
    params, adapters = case(jnp.float32)
    with pytest.raises(ValueError, match="no parameter 'wide'"):
        lora.merge({"stack": params["stack"]}, adapters)
