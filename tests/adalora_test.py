"""AdaLoRA's optimizer: its budget, its importance and its regulariser against float64 NumPy, step by step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import AdaLoRA, Axes, Rule, Spec
from lora_jax.adalora import adalora

pytestmark = pytest.mark.usefixtures("quick")
L, D, F, R, RATE = 3, 6, 8, 4, 0.05
START, END, EVERY, KEEP = 3, 11, 2, 2
AXES = {"stack": Axes((0,), (1,), (2,)), "flat": Axes((), (0,), (1,))}
SHAPES = {"stack": (L, D, F), "flat": (F, D)}
TOTAL, MATRICES = R * (L + 1), L + 1


def made(key, spread=0.4):
    def one(path, key):
        stacked, inp, out = ([SHAPES[path][i] for i in axes] for axes in AXES[path])
        keys = jax.random.split(key, 3)
        shapes = ((*stacked, *inp, R), (*stacked, R), (*stacked, *out, R))
        a, e, b = (spread * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
        return AdaLoRA(a, e, b, 1.0, AXES[path])

    return {path: one(path, k) for path, k in zip(SHAPES, jax.random.split(key, len(SHAPES)), strict=True)}


def float64(adapters):
    return {path: {n: np.asarray(getattr(x, n), np.float64) for n in "aeb"} for path, x in adapters.items()}


def gradients(step):
    """Whatever the loss: any arrays will do."""
    return made(jax.random.key(100 + step))


class ByHand:
    """Algorithm 1 of the paper with gradient descent, in float64."""

    def __init__(self, adapters, orthogonal, beta=0.85):
        self.p, self.orthogonal, self.beta, self.step = float64(adapters), orthogonal, beta, 0
        self.mean, self.spread = ({path: dict.fromkeys("aeb", 0.0) for path in adapters} for _ in range(2))
        self.gone = {}

    def budget(self):
        if self.step < START:
            return TOTAL
        if self.step >= END:
            return KEEP * MATRICES
        return int(KEEP * MATRICES + (TOTAL - KEEP * MATRICES) * ((END - self.step) / (END - START)) ** 3)

    def regulariser(self, path, name):
        x = self.p[path][name]
        gram = np.swapaxes(x, -1, -2) @ x
        return self.orthogonal * 4 * x @ (gram - np.eye(R))

    def update(self, gradients):
        self.step += 1
        scores, new = {}, {}
        for path, values in self.p.items():
            new[path] = {}
            importance = {}
            for name, p in values.items():
                g = gradients[path][name]
                now = np.abs(p * g)
                mean = self.mean[path][name] = self.beta * self.mean[path][name] + (1 - self.beta) * now
                spread = self.spread[path][name]
                self.spread[path][name] = self.beta * spread + (1 - self.beta) * np.abs(now - mean)
                importance[name] = mean * self.spread[path][name]
                g = g if name == "e" else g + self.regulariser(path, name)
                new[path][name] = p - RATE * g
            scores[path] = importance["e"] + importance["a"].mean(-2) + importance["b"].mean(-2)
        if START <= self.step <= END and (self.step % EVERY == 0 or self.step == END):
            order = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[::-1]
            for path, score in scores.items():
                self.gone[path] = score < order[self.budget() - 1]
                new[path]["e"] = np.where(self.gone[path], 0, new[path]["e"])
        elif self.step > END:
            for path in scores:
                new[path]["e"] = np.where(self.gone[path], 0, new[path]["e"])
        self.p, self.scores = new, scores


def run(adapters, orthogonal, steps, every=EVERY):
    tx = adalora(optax.sgd(RATE), KEEP, START, END, every, orthogonal=orthogonal)
    update = jax.jit(tx.update)
    state = tx.init(adapters)
    for step in range(steps):
        updates, state = update(gradients(step), state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        yield adapters, state


def kept(adapters):
    return int(sum(jnp.sum(x.e != 0) for x in adapters.values()))


@pytest.mark.parametrize("orthogonal", [0.0, 0.1])
def test_every_step_is_the_papers(key, orthogonal):
    adapters = made(key)
    hand = ByHand(adapters, orthogonal)
    for step, (now, state) in enumerate(run(adapters, orthogonal, END + 5)):
        hand.update(float64(gradients(step)))
        for path, values in hand.p.items():
            for name, want in values.items():
                np.testing.assert_allclose(getattr(now[path], name), want, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(getattr(state.sensitivity[path], name), hand.mean[path][name], rtol=1e-4)
                spread = getattr(state.uncertainty[path], name)
                np.testing.assert_allclose(spread, hand.spread[path][name], rtol=1e-3, atol=1e-6)
    other = ByHand(adapters, 0.1 - orthogonal)
    for step in range(END + 5):
        other.update(float64(gradients(step)))
    assert np.abs(np.asarray(now["flat"].a) - other.p["flat"]["a"]).max() > 1e-2


def test_the_budget_falls_with_the_cube_of_the_time_left(key):
    counts = [kept(now) for now, _ in run(made(key), 0.0, END + 4)]
    assert counts[: START - 1] == [TOTAL] * (START - 1)  # before the start
    hand = ByHand(made(key), 0.0)
    for step in range(START, END + 1):
        hand.step = step
        if step % EVERY == 0:
            assert counts[step - 1] == hand.budget(), step
    halfway = KEEP * MATRICES + (TOTAL - KEEP * MATRICES) * (5 / 8) ** 3
    assert counts[5] == int(halfway) and KEEP * MATRICES < counts[5] < TOTAL
    assert counts[END - 1 :] == [KEEP * MATRICES] * 5  # from the end on


def test_what_is_pruned_comes_back_before_the_end_and_not_after(key):
    history = [
        np.concatenate([np.asarray(x.e != 0).ravel() for x in now.values()]) for now, _ in run(made(key), 0.0, 20)
    ]
    before, after = history[: END - 1], history[END - 1 :]
    assert any(np.any(new & ~old) for old, new in itertools.pairwise(before))
    assert all(np.array_equal(after[0], now) for now in after)


def test_the_matrices_compete(key):
    """The budget is one for all: a matrix without gradients loses its values to the others."""
    adapters = made(key)
    tx = adalora(optax.sgd(RATE), KEEP, 0, 1, 1, orthogonal=0.0)
    quiet = gradients(0)
    quiet["flat"] = jax.tree.map(lambda g: 1e-4 * g, quiet["flat"])
    state = tx.init(adapters)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(quiet, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    assert not np.any(adapters["flat"].e) and np.sum(adapters["stack"].e != 0) == KEEP * MATRICES


def test_the_regularisers_gradient_is_that_of_finite_differences(key):
    adapters = {"stack": made(key)["stack"]}
    weight, zeros = 0.3, jax.tree.map(jnp.zeros_like, adapters)
    tx = adalora(optax.sgd(1.0), KEEP, START, END, orthogonal=weight)
    updates, _ = tx.update(zeros, tx.init(adapters), adapters)
    values = float64(adapters)["stack"]

    def penalty(x):
        return weight * np.sum((np.swapaxes(x, -1, -2) @ x - np.eye(R)) ** 2)

    for name in "ab":
        got, x = np.asarray(getattr(updates["stack"], name)), values[name]
        for index in [(0, 0, 0), (1, 3, 2), (2, 5, 3)]:
            step = np.zeros_like(x)
            step[index] = 1e-5
            want = -(penalty(x + step) - penalty(x - step)) / 2e-5
            assert got[index] == pytest.approx(want, rel=1e-3, abs=1e-5) and abs(want) > 1e-3
    assert not np.any(updates["stack"].e)


def test_columns_become_orthonormal(key):
    adapters = made(key)
    zeros = jax.tree.map(jnp.zeros_like, adapters)

    def error(adapters):
        return max(
            float(jnp.abs(x.swapaxes(-1, -2) @ x - jnp.eye(R)).max()) for y in adapters.values() for x in (y.a, y.b)
        )

    tx = adalora(optax.sgd(0.1), KEEP, 1000, 1001, orthogonal=0.5)

    def step(carry, _):
        adapters, state = carry
        updates, state = tx.update(zeros, state, adapters)
        return (optax.apply_updates(adapters, updates), state), None

    (after, _), _ = jax.jit(lambda a: jax.lax.scan(step, (a, tx.init(a)), None, length=300))(adapters)
    assert error(adapters) > 0.3 and error(after) < 1e-3


def test_it_trains_through_a_lifted_model_and_ends_at_its_budget(key):
    w, x = jax.random.normal(key, (D, F)), jax.random.normal(key, (32, D))
    goal = x @ (w + jnp.outer(jnp.arange(D) / D, jnp.ones(F)))  # one singular value away

    def model(p, x):
        return x @ p["w"]

    spec = Spec(Rule("w", rank=R, method="adalora"))
    adapters = lora.init(key, {"w": w}, lora.trace(model, {"w": w}, x), spec)
    tx = adalora(optax.adam(0.05), 1, 10, 60, every=5)

    def loss(adapters):
        return jnp.mean((lora.lift(model)(lora.attach({"w": w}, adapters), x) - goal) ** 2)

    def step(carry, _):
        adapters, state = carry
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return (optax.apply_updates(adapters, updates), state), None

    (after, _), _ = jax.jit(lambda a: jax.lax.scan(step, (a, tx.init(a)), None, length=150))(adapters)
    assert kept(after) == 1
    assert loss(after) < 0.05 * loss(adapters)
    none = {"w": dataclasses.replace(after["w"], e=jnp.zeros(R))}
    assert loss(none) > 0.9 * loss(adapters)
