"""The training script on a tiny model: the step against a plain one, what a run leaves behind, and full fine-tuning."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import lora_jax as lora
from lora_jax.data import packing
from lora_jax.interop import hf
from lora_jax.models import decoder
from train import config as settings
from train import loop, objective, sft, update

pytestmark = pytest.mark.usefixtures("quick_module")


def configured(model, tmp_path, **changes):
    """Sums of one digit in a dozen tiny steps."""
    lines = [{"prompt": f"{a} + {b}", "completion": str(a + b)} for a in range(8) for b in range(8)]
    config = settings.sft()
    config.model = str(model)
    config.data.source = str(tiny.write_jsonl(tmp_path / "sums.jsonl", lines))
    config.data.heldout = 8
    config.steps = 6
    config.batch_size = 4
    config.optim.lr = 1e-2
    config.eval.answers = 4
    config.eval.max_new = 4
    config.eval.batch_size = 4
    config.lora.rank = 4
    config.checkpoint.every = 2
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        setattr(config[group] if group else config, key, value)
    return config


def batch_of(lengths, learned, length=24, vocab=300):
    rng = np.random.default_rng(0)
    rows = [
        [packing.Tokens("x", rng.integers(0, vocab, n + 1, np.int32), np.arange(n + 1) > n - k)]
        for n, k in zip(lengths, learned, strict=True)
    ]
    return packing.batch(rows, length)


def test_loss_looks_at_learned_positions_alone_and_equals_the_plain_one(model):
    m = hf.load(model)
    batch = batch_of([5, 12, 20, 7], [2, 9, 1, 4])
    log_probs = jax.nn.log_softmax(decoder.forward(m.params, batch["tokens"], m.config))
    picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    expected = -jnp.sum(picked * batch["weights"])
    nll = functools.partial(objective.negative_log_likelihood, m.params, batch, shape=m.config)
    for options in ({}, {"chunk": 5}, {"packed": True}, {"remat": "full"}, {"chunk": 8, "remat": "dots"}):
        total, tokens = nll(learned=9, **options)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert tokens == 16
    assert abs(nll(learned=4)[0] - expected) > 1  # too few places miss some


def test_head_runs_on_learned_positions_alone(model):
    m = hf.load(model)
    batch = batch_of([5, 12, 20, 7], [2, 9, 1, 4])

    def logits(learned):
        nll = functools.partial(objective.negative_log_likelihood, batch=batch, shape=m.config, learned=learned)
        shapes = re.findall(rf"f32\[([\d,]+),{m.config.vocab}\]", str(jax.make_jaxpr(nll)(m.params)))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert logits(learned=9) == 4 * 9
    assert logits(learned=24) == 4 * 24


@pytest.mark.slow
def test_however_a_batch_is_laid_out_and_computed_the_update_is_the_same(model):
    m = hf.load(model)
    rng = np.random.default_rng(0)
    shapes = zip((5, 12, 20, 7), (1, 9, 1, 4), strict=True)  # accumulated: parts with 10 and 5 tokens to learn
    examples = [packing.Tokens("x", rng.integers(0, 300, n + 1, np.int32), np.arange(n + 1) > n - k) for n, k in shapes]

    def rows(length=24, pack=False):
        return packing.batch(packing.rows(examples, length, pack), length)

    plain = functools.partial(objective.negative_log_likelihood, shape=m.config, learned=9)
    adapters = lora.init(jax.random.key(0), m.params, lora.trace(plain, m.params, rows()), lora.Spec(rank=4))
    adapters, tx = jax.tree.map(lambda x: x + 0.01, adapters), optax.sgd(1.0)

    def moved(batch, accumulate=1, **options):
        nll = functools.partial(objective.negative_log_likelihood, shape=m.config, **{"learned": 9, **options})
        step = update.make_update(lora.lift(nll), lambda a, base, key: lora.attach(base, a), tx, accumulate)
        fresh = jax.tree.map(jnp.array, adapters)
        new, _, numbers = step(fresh, tx.init(fresh), m.params, batch, jax.random.key(0))
        return jax.tree.map(lambda old, new: old - new, adapters, new), numbers

    def same(got, expected):
        np.testing.assert_allclose(got[1]["loss"], expected[1]["loss"], rtol=1e-5)
        largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[0]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), got[0], expected[0])

    @jax.jit
    @jax.value_and_grad
    def mean(adapters, batch):
        total, tokens = lora.lift(plain)(lora.attach(m.params, adapters), batch)
        return total / tokens

    whole = moved(rows())
    value, gradient = mean(adapters, rows())
    same(whole, (gradient, {"loss": value}))
    same(moved(rows(), 2), whole)
    same(moved(rows(length=40)), whole)
    packed = rows(length=24, pack=True)
    assert len(packed["tokens"]) == 2
    same(moved(packed, packed=True, learned=24), whole)
    # Partner: the mean of the parts' means, as naive accumulation has it, is another gradient.
    halves = [mean(adapters, {name: x[i : i + 2] for name, x in rows().items()})[1] for i in (0, 2)]
    naive = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, naive, gradient)) > 0.1 * optax.tree.norm(gradient)


def test_base_is_an_argument_that_stays_and_adapters_are_donated(model):
    m = hf.load(model)
    batch = batch_of([5, 12], [1, 9])
    nll = functools.partial(objective.negative_log_likelihood, shape=m.config, learned=9)
    adapters = lora.init(jax.random.key(0), m.params, lora.trace(nll, m.params, batch), lora.Spec(rank=4))
    tx = optax.adam(1e-3)
    step = update.make_update(lora.lift(nll), lambda a, base, key: lora.attach(base, a), tx, 1)
    arguments = (adapters, tx.init(adapters), m.params, batch, jax.random.key(0))
    compiled = step.lower(*arguments).compile()
    assert compiled.memory_analysis().argument_size_in_bytes > lora.nbytes(m.params)
    step(*arguments)
    assert all(x.is_deleted() for x in jax.tree.leaves(adapters))
    assert not any(x.is_deleted() for x in jax.tree.leaves(m.params))


def test_a_run_and_what_it_leaves(model, tmp_path, capsys):
    config = configured(model, tmp_path, eval__every=3)
    folder = tmp_path / "run"
    sft.train(config, folder, "tiny")
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("exact match 0.0% -> ")
    assert "adapter parameters" in said and "tokens/s" in said
    metrics = loop.read(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics if "heldout_loss" in line] == [0, 3, 6]
    assert metrics[-1]["heldout_loss"] < metrics[0]["heldout_loss"]
    rates = [line["learning_rate"] for line in metrics if "loss" in line]
    np.testing.assert_allclose(rates, 1e-2 * (1 - np.arange(6) / 6), rtol=1e-5)
    assert json.loads((folder / "config.json").read_text())["lora"]["rank"] == 4
    assert json.loads((folder / "versions.json").read_text())["jax"] == jax.__version__
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "7 targets" in (folder / "report.html").read_text()
    assert "exact match" in (folder / "report.md").read_text()
    assert list((folder / "tensorboard").glob("events*"))
    # A finished run, started again, only reports.
    sft.train(config, folder, "tiny")
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]
    assert loop.read(folder / "metrics.jsonl") == metrics


def test_more_sets_to_evaluate_on_are_never_trained_on(model, tmp_path, capsys):
    """One has questions of the source; they leave it."""
    easy = [{"prompt": f"1 + {b}", "completion": str(1 + b)} for b in range(4)]
    other = [{"prompt": f"{a} * 2", "completion": str(2 * a)} for a in range(6)]
    sets = {
        name: str(tiny.write_jsonl(tmp_path / f"{name}.jsonl", x)) for name, x in (("easy", easy), ("other", other))
    }
    config = configured(model, tmp_path, steps=1, eval__sets=tuple(sets.items()))
    sft.train(config, tmp_path / "run", "sets")
    said = capsys.readouterr().out
    assert "easy: 4 examples to evaluate on" in said and "other: 6 examples to evaluate on" in said
    trained = int(re.search(r"(\d+) examples to train on, 8 held out", said)[1])
    assert 64 - 8 - 4 <= trained < 64 - 8
    (last,) = [line for line in loop.read(tmp_path / "run" / "metrics.jsonl") if "heldout_loss" in line][1:]
    assert {"heldout_loss/easy", "heldout_loss/other", "exact_match/easy", "exact_match/other"} < last.keys()
    assert len({last["heldout_loss"], last["heldout_loss/easy"], last["heldout_loss/other"]}) == 3
    assert "held-out loss/other" in said


def final(folder):
    """The last checkpoint's trainable tree, as Orbax gives it without being told its types."""
    import orbax.checkpoint as ocp

    last = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    return ocp.StandardCheckpointer().restore(last / "trainable")


def test_full_fine_tuning_is_the_same_step(model, tmp_path):
    m = hf.load(model)
    sft.train(configured(model, tmp_path, method="full"), tmp_path / "full", "full")
    tuned = final(tmp_path / "full")
    assert jax.tree.structure(tuned) == jax.tree.structure(m.params)
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), tuned, m.params)
    assert all(jax.tree.leaves(changed))
    losses = [line["heldout_loss"] for line in loop.read(tmp_path / "full" / "metrics.jsonl") if "heldout_loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_settings_of_a_run_decide(model, tmp_path):
    """What saves memory is not to be seen in the losses; every other change is."""

    def losses(name, **changes):
        config = configured(model, tmp_path, steps=3, eval__answers=0, **changes)
        sft.train(config, tmp_path / name, name)
        return [line["loss"] for line in loop.read(tmp_path / name / "metrics.jsonl") if "loss" in line]

    plain = losses("plain")
    np.testing.assert_allclose(losses("parts", accumulate=2, remat="full", loss_chunk=3), plain, rtol=1e-4)
    for name, other in {
        "constant": {"optim__schedule": "constant", "optim__clip": 0.0},
        "dropout": {"lora__dropout": 0.5},
        "pack": {"data__pack": True},
        "seed": {"seed": 1},
    }.items():
        assert not np.allclose(losses(name, **other), plain, rtol=1e-4), name
