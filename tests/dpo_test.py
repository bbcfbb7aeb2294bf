"""Preference learning on a tiny model: losses against plain ones, the reference without a second model, whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pairs_test
import pytest
import tiny

import lora_jax as lora
from lora_jax.interop import hf
from lora_jax.models import decoder
from train import dpo, dpo_settings, launch, likelihood, loop, methods, pairs, preferences
from train.update import make_update

pytestmark = pytest.mark.usefixtures("quick_module")


def configured(model, tmp_path, lines=pairs_test.LINES, **changes):
    """Pairs that a dozen tiny steps can tell apart: the better answer is a sentence."""
    config = dpo_settings.dpo()
    config.model = str(model)
    config.data.source = str(tiny.write_jsonl(tmp_path / "pairs.jsonl", lines))
    config.data.heldout = 4
    config.steps, config.batch_size = 6, 4
    config.optim.lr = 1e-2
    config.lora.rank = 4
    config.checkpoint.every = 2
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        setattr(config[group] if group else config, key, value)
    return config


class Tiny:
    """A model, its data, a batch and adapters that are not zero."""

    def __init__(self, model, tmp_path, **changes):
        self.config = configured(model, tmp_path, **changes)
        self.model = hf.load(model)
        unpaired = self.config.loss == "kto"
        self.data = pairs.prepare(self.config, pairs_test.FORMAT, 128, unpaired)
        self.batch = (pairs.crossed if unpaired else pairs.batch)(self.data.items[:4], self.data.length)
        self.sites = methods.sites(self.model)
        adapters = lora.init(jax.random.key(0), self.model.params, self.sites, lora.Spec(rank=4))
        self.adapters = jax.tree.map(lambda x: x + 0.02, adapters)

    def log_probs(self, tree, batch):
        found = likelihood.log_probs
        return methods.applied(lambda p, b: found(p, b, shape=self.model.config, learned=self.data.learned))(
            tree, batch
        )

    def plain(self, tree, batch):
        """Log-probabilities of answers from all logits, without any of the machinery."""
        params = lora.merge(self.model.params, tree.adapters) if isinstance(tree, lora.Attached) else tree
        logits = decoder.forward(params, batch["tokens"], self.model.config)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
        return (picked * batch["weights"]).sum(1), batch["weights"].sum(1)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "orpo", "simpo")]


@pytest.mark.parametrize("name", ["dpo", "kto", *SLOW])
def test_the_loss_of_a_batch(model, tmp_path, name):
    """With the adapters switched off as reference: equal to that of a merged model beside another."""
    t = Tiny(model, tmp_path, loss=name)

    def compiled(log_probs):
        @jax.jit
        def f(adapters):
            def total(adapters):
                trees = lora.attach(t.model.params, adapters), t.model.params
                value, n, sums = dpo.summed(dpo.judged(t.config, log_probs))(trees, t.batch)
                return value, sums | {"n": n}

            return jax.value_and_grad(total, has_aux=True)(adapters)

        return f

    ours, naive = compiled(t.log_probs), compiled(t.plain)
    for adapters in (t.adapters, jax.tree.map(lambda x: -x, t.adapters)):
        ((value, sums), gradient), ((expected, other), theirs) = ours(adapters), naive(adapters)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), sums, other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, theirs)
        assert optax.tree.norm(gradient) > 1e-3
        assert sums["n"] == (8 if name == "kto" else 4)


def test_accumulated_update_is_the_plain_one(model, tmp_path):
    t = Tiny(model, tmp_path)
    judge, tx = dpo.judged(t.config, t.log_probs), optax.sgd(1.0)

    def step(parts):
        update = make_update(dpo.summed(judge), lambda a, base, key: (lora.attach(base, a), base), tx, parts)
        fresh = jax.tree.map(jnp.array, t.adapters)
        return update(fresh, tx.init(fresh), t.model.params, t.batch, jax.random.key(0))

    (whole, _, numbers), (accumulated, _, again) = step(1), step(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), accumulated, whole)
    for key in ("loss", "margin", "accuracy", "tokens"):
        np.testing.assert_allclose(again[key], numbers[key], rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, t.adapters)
    assert max(jax.tree.leaves(moved)) > 1e-4


def evaluations(folder):
    return [line for line in loop.read(folder / "metrics.jsonl") if "heldout_loss" in line]


@pytest.mark.slow
def test_a_run_and_what_it_leaves(model, tmp_path, capsys):
    config = configured(model, tmp_path, steps=12)
    dpo.train(config, tmp_path / "run", "tiny")
    before, after = evaluations(tmp_path / "run")
    assert before["reward_accuracy"] == 0.5 and before["reward_margin"] == 0
    np.testing.assert_allclose(before["heldout_loss"], np.log(2), rtol=1e-5)
    assert after["reward_accuracy"] == 1 and after["reward_margin"] > 0.03
    assert after["heldout_loss"] < before["heldout_loss"]
    steps = [line for line in loop.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert steps[0]["margin"] == 0 and steps[0]["accuracy"] == 0.5
    assert steps[-1]["margin"] > 0.03 and steps[-1]["chosen_reward"] > steps[-1]["rejected_reward"]
    # Precomputed, the reference says the same: the run is the same but for rounding.
    config.reference = "precomputed"
    dpo.train(config, tmp_path / "known", "tiny")
    losses = [
        [line["loss"] for line in loop.read(tmp_path / r / "metrics.jsonl") if "loss" in line] for r in ("run", "known")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    saved = json.loads((tmp_path / "known" / dpo.REFERENCE).read_text())["log_probs"]
    assert np.shape(saved) == (16, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "prompt", "loftq"])
def test_other_methods(model, tmp_path, method):
    config = configured(model, tmp_path, method=method, steps=12)
    config.optim.lr = {"full": 3e-3, "prompt": 0.3, "loftq": 1e-2}[method]
    dpo.train(config, tmp_path / "run", method)
    before, after = evaluations(tmp_path / "run")
    assert after["heldout_loss"] < before["heldout_loss"]
    if method == "full":
        config.reference = "precomputed"
        dpo.train(config, tmp_path / "known", method)
        np.testing.assert_allclose(evaluations(tmp_path / "known")[1]["heldout_loss"], after["heldout_loss"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in preferences.LOSSES if name != "dpo"])
def test_other_losses(model, tmp_path, name):
    dpo.train(configured(model, tmp_path, loss=name, steps=16), tmp_path / "run", name)
    before, after = evaluations(tmp_path / "run")
    assert after["heldout_loss"] < before["heldout_loss"]
    assert after["reward_margin"] > before["reward_margin"]


@pytest.mark.slow
def test_judged_answers_alone(model, tmp_path):
    lines = [{"prompt": f"{a}", "completion": "it is" if a % 2 else str(a), "label": bool(a % 2)} for a in range(24)]
    dpo.train(configured(model, tmp_path, lines, loss="kto", steps=12), tmp_path / "run", "kto")
    before, after = evaluations(tmp_path / "run")
    assert after["reward_accuracy"] == 1 > before["reward_accuracy"] == 0.5
    with pytest.raises(ValueError, match="not preference pairs"):
        dpo.train(configured(model, tmp_path, lines), tmp_path / "none", "dpo")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "ppo"}, "config.loss='ppo' is not one of 'dpo'"),
        ({"reference": "copy"}, "config.reference='copy' is not one of"),
        ({"smoothing": 0.5}, "config.smoothing=0.5 must be"),
        ({"beta": -1.0}, "config.beta=-1.0 must be"),
        ({"loss": "kto", "accumulate": 2}, "config.accumulate must be 1"),
        ({"loss": "kto", "reference": "precomputed"}, "cannot be precomputed"),
        ({"data__source": ""}, "config.data.source is empty"),
        ({"data__heldout": 0}, "config.data.heldout=0"),
        ({"data__heldout": 99}, "too few to hold out 99"),
    ],
)
def test_settings_that_cannot_be_meant(model, tmp_path, changes, words):
    with pytest.raises(launch.MISTAKES) as caught:
        dpo.train(configured(model, tmp_path, **changes), tmp_path / "run", "bad")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
