"""One training step for any loss that is a sum over items: its gradient, its parts, and what it records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from train import config as settings
from train import methods, update

pytestmark = pytest.mark.usefixtures("quick_module")


def loss(w, batch):
    """Squares over items with weights; the weights' sum is the count."""
    error = jnp.einsum("bd,d->b", batch["x"], w["w"]) - batch["y"]
    return jnp.sum(batch["n"] * error**2), batch["n"].sum(), {"error": jnp.sum(batch["n"] * error)}


def batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    segments = np.array([[1, 1, 0], [1, 2, 2], [0, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    return {"x": x, "y": y, "n": np.array([1, 0, 3, 1, 1, 9], np.float32), "segments": segments}


def step(accumulate, loss=loss):
    w, tx = {"w": jnp.ones(3)}, optax.sgd(1.0)
    made = update.make_update(loss, lambda w, base, key: w, tx, accumulate)
    return made(w, tx.init(w), None, batch(), jax.random.key(0))


@pytest.mark.parametrize("accumulate", [1, 2, 3, 6])
def test_parts_give_the_mean_over_all_items(accumulate):
    w, _, numbers = step(accumulate)
    rows = {name: np.float64(value) for name, value in batch().items()}
    error, n = rows["x"].sum(1) - rows["y"], rows["n"]
    gradient = 2 * (n * error) @ rows["x"] / n.sum()
    np.testing.assert_allclose(w["w"], 1 - gradient, rtol=1e-5)
    np.testing.assert_allclose(numbers["loss"], (n * error**2).sum() / n.sum(), rtol=1e-6)
    np.testing.assert_allclose(numbers["error"], (n * error).sum() / n.sum(), rtol=1e-5)
    np.testing.assert_allclose(numbers["gradient_norm"], np.linalg.norm(gradient), rtol=1e-5)
    assert numbers["tokens"] == 11
    # Partner: a mean over rows is another loss.
    assert abs(numbers["loss"] - (error**2).mean()) > 0.1


def test_a_loss_need_not_record_more():
    with_more, without = step(2), step(2, lambda w, batch: loss(w, batch)[:2])
    np.testing.assert_array_equal(with_more[0]["w"], without[0]["w"])
    assert "error" in with_more[2] and "error" not in without[2]


def test_every_part_has_a_key_of_its_own():
    def noise(w, part):
        return jnp.sum(w["key"] * w["w"]), jnp.float32(1)

    def tree(w, base, key):
        return {"key": jax.random.uniform(key), **w}

    w, tx = {"w": jnp.ones(())}, optax.sgd(1.0)
    moved = [
        update.make_update(noise, tree, tx, 2)({"w": jnp.ones(())}, tx.init(w), None, batch(), jax.random.key(i))[0][
            "w"
        ]
        for i in (0, 0, 1)
    ]
    drawn = [jax.random.uniform(key) for key in jax.random.split(jax.random.key(0), 2)]
    np.testing.assert_allclose(moved[0], 1 - sum(drawn) / 2, rtol=1e-6)
    assert moved[0] == moved[1] != moved[2] and drawn[0] != drawn[1]


def configured(**changes):
    config = settings.sft()
    for name, value in changes.items():
        config.optim[name] = value
    return config


def applied(config, trainable, gradient):
    tx = methods.optimizer(config, trainable, lambda step: 0.1)
    return tx.update(gradient, tx.init(trainable), trainable)[0]


@pytest.mark.parametrize("method", ["full", "lora", "lora+"])
def test_weight_decay_is_for_matrices_alone_and_off_by_default(method):
    params = {"kernel": jnp.full((8, 4), 2.0), "norm": {"scale": jnp.full((4,), 2.0)}, "bias": jnp.full((4,), 2.0)}
    if method == "full":
        trainable = params
    else:
        sites = lora.trace(lambda p, x: x @ p["kernel"] * p["norm"]["scale"] + p["bias"], params, jnp.ones((1, 8)))
        spec = lora.Spec(lora.Rule("kernel", rank=2), lora.Rule("scale$|bias$", method="full"))
        trainable = jax.tree.map(lambda x: x + 1.0, lora.init(jax.random.key(0), params, sites, spec))
    gradient = jax.tree.map(jnp.zeros_like, trainable)

    def moved(**changes):
        config = configured(**changes)
        config.method = method
        found = jax.tree_util.tree_leaves_with_path(applied(config, trainable, gradient))
        return {jax.tree_util.keystr(path): x for path, x in found}

    assert all(not np.any(x) for x in moved().values())
    before = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(trainable)}
    for path, change in moved(weight_decay=0.5).items():
        spared = "scale" in path or "bias" in path
        faster = 16 if method == "lora+" and path.endswith(".b") else 1
        np.testing.assert_allclose(change, -0.1 * 0.5 * faster * before[path] * (not spared), rtol=1e-5, err_msg=path)


def test_clipping_and_memory_are_the_config_s():
    trainable, gradient = {"w": jnp.zeros(2)}, {"w": jnp.array([30.0, 40.0])}

    def config(**changes):
        made = configured(**changes)
        made.method = "full"
        return made

    tx = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(0.1, 0.5, 0.25))
    one = methods.optimizer(config(clip=5.0, b1=0.5, b2=0.25), trainable, lambda step: 0.1)
    state, expected = one.init(trainable), tx.init(trainable)
    for scale in (1.0, 0.01, 0.1):
        now = jax.tree.map(lambda g: scale * g, gradient)  # noqa: B023
        (got, state), (want, expected) = one.update(now, state, trainable), tx.update(now, expected, trainable)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)
    free = methods.optimizer(config(clip=0.0, b1=0.5, b2=0.25), trainable, lambda step: 0.1)
    state = free.init(trainable)
    for scale in (1.0, 0.01, 0.1):
        got, state = free.update({"w": scale * gradient["w"]}, state, trainable)
    assert not np.allclose(got["w"], want["w"], rtol=1e-3)


@pytest.mark.parametrize("method", ["full", "lora", "lora+"])
def test_the_mean_of_gradients_may_be_kept_in_bfloat16(method):
    """Updates are those of Adam in float64 but for bfloat16's rounding, and the optimizer keeps a quarter less."""
    rng, steps = np.random.default_rng(0), 30
    if method == "full":
        trainable = {"w": jnp.zeros((8, 4))}
    else:
        params = {"w": jnp.ones((8, 4))}
        sites = lora.trace(lambda p, x: x @ p["w"], params, jnp.ones((1, 8)))
        trainable = lora.init(jax.random.key(0), params, sites, lora.Spec(lora.Rule("w", rank=2)))
    gradients = [
        jax.tree.map(lambda x: rng.normal(0.3, 1, x.shape).astype(np.float32), trainable) for _ in range(steps)
    ]

    def run(mu_dtype):
        config = configured(mu_dtype=mu_dtype, clip=0.0)
        config.method = method
        tx = methods.optimizer(config, trainable, lambda step: 0.1)
        state = tx.init(trainable)
        for gradient in gradients:
            moved, state = tx.update(gradient, state, trainable)
        return jax.tree.leaves(moved), sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)

    (rounded, less), (exact, whole) = run("bfloat16"), run("")
    assert less == 0.75 * whole
    for i, (got, near) in enumerate(zip(rounded, exact, strict=True)):
        series = np.stack([np.float64(jax.tree.leaves(gradient)[i]) for gradient in gradients])
        decay = np.arange(steps)[::-1].reshape(-1, *[1] * got.ndim)
        mean = (0.1 * 0.9**decay * series).sum(0) / (1 - 0.9**steps)
        square = (0.001 * 0.999**decay * series**2).sum(0) / (1 - 0.999**steps)
        update = -0.1 * (16 if method == "lora+" and i == 1 else 1) * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(near, update, rtol=1e-3, atol=1e-5)
        # A mean is rounded twice a step to 2^-9 of it, and remembers ten steps.
        np.testing.assert_allclose(got, update, rtol=0, atol=10 * 2 * 2**-9 * abs(update).max())
        assert np.any(got != near)
