"""The loop that trainers share, on a trainer of a few numbers: what a step is given, and when it saves and ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_trainer

from lora_jax import checkpoint
from train import loop
from train import run as runner

pytestmark = pytest.mark.usefixtures("quick_module")

ROOT = Path(__file__).parent.parent


def steps_of(folder):
    return [line for line in loop.read(folder / loop.METRICS) if "learning_rate" in line]


def test_it_is_the_plain_loop(tmp_path):
    config = tiny_trainer.configured(steps=5)
    w = tiny_trainer.train(config, tmp_path / "run")
    tx, plain = optax.adam(0.1), jnp.zeros(3)
    state = tx.init(plain)
    for i in range(5):
        gradient = jax.grad(lambda w, target: jnp.mean((w - target) ** 2))(plain, tiny_trainer.target(i))
        updates, state = tx.update(gradient, state)
        plain = optax.apply_updates(plain, updates)
    np.testing.assert_allclose(w, plain, rtol=1e-5)
    assert [line["seen"] for line in steps_of(tmp_path / "run")] == [0, 1, 2, 3, 4]  # every batch once, in order
    assert len({line["drawn"] for line in steps_of(tmp_path / "run")}) == 5  # a key of its own for every step


def test_the_batch_that_was_fetched_ahead_is_not_lost(tmp_path):
    config = tiny_trainer.configured(steps=4, checkpoint__every=2)
    whole = tiny_trainer.train(config, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        tiny_trainer.train(config, tmp_path / "run", fail_at=3)
    again = tiny_trainer.train(config, tmp_path / "run")
    np.testing.assert_array_equal(again, whole)
    assert [line["seen"] for line in steps_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_best_checkpoint_and_early_end(tmp_path, capsys):
    config = tiny_trainer.configured(steps=30, eval__every=1, eval__patience=3, checkpoint__keep=1)
    losses = [5.0, 4.0, 2.0, 3.0, 2.5, 2.0, 1.0, 1.5]
    tiny_trainer.train(config, tmp_path / "run", evaluations=losses)
    said = capsys.readouterr().out
    assert "ended at step 5 of 30: 3 evaluations were no better" in said
    assert "best held-out loss 2.0000 at step 2, kept in checkpoints/2" in said
    assert checkpoint.best(tmp_path / "run" / "checkpoints") == 2
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == 5
    # The same command ends at once, and says the same.
    tiny_trainer.train(config, tmp_path / "run", evaluations=losses)
    assert capsys.readouterr().out.splitlines()[-4:] == said.splitlines()[-4:]
    # Without patience it goes on, and finds the better one.
    config.eval.patience = 0
    config.steps = 7
    tiny_trainer.train(config, tmp_path / "run", evaluations=losses)
    assert checkpoint.best(tmp_path / "run" / "checkpoints") == 6


@pytest.mark.parametrize(("losses", "best"), [([5.0, 4.0, 2.0, 3.0, 2.5], 2), ([5.0, 4.0, 3.0, 2.0, 1.0], 4)])
def test_the_best_is_what_is_exported(tmp_path, losses, best):
    config, exported = tiny_trainer.configured(steps=4, eval__every=1), []

    def export(folder, step, trainable):
        exported.append((step, np.asarray(trainable["w"])))

    last = tiny_trainer.train(config, tmp_path / "run", evaluations=losses, export=export)
    ((step, w),) = exported
    assert step == best
    config.steps, config.eval.every = best, 0
    np.testing.assert_array_equal(w, tiny_trainer.train(config, tmp_path / "until"))
    assert np.array_equal(w, last) == (best == 4)


def test_more_may_be_better(tmp_path):
    config = tiny_trainer.configured(steps=4, eval__every=1, eval__higher=True)
    tiny_trainer.train(config, tmp_path / "run", evaluations=[0.0, 1.0, 3.0, 2.0, 1.0])
    assert checkpoint.best(tmp_path / "run" / "checkpoints") == 2


def test_a_metric_that_is_not_measured_is_found_before_a_step(tmp_path):
    config = tiny_trainer.configured(eval__best="reward")
    with pytest.raises(ValueError, match=r"config.eval.best='reward' is not measured; what is: heldout_loss"):
        tiny_trainer.train(config, tmp_path / "run")
    assert not steps_of(tmp_path / "run")


@pytest.mark.slow
def test_a_bad_step_is_skipped_as_if_it_had_not_been(tmp_path, capsys):
    config = tiny_trainer.configured(steps=30, guard__then="skip", guard__spike=6.0, checkpoint__every=10)
    bad = {5: np.nan, 27: 1e4}
    w = tiny_trainer.train(config, tmp_path / "run", added=bad)
    said = capsys.readouterr().out
    assert "step 6: loss nan, gradient norm nan: skipped, the 1. so far" in said
    assert "step 28: loss 1e+04 is a spike (above " in said and "2 steps skipped" in said
    only_good = tiny_trainer.train(tiny_trainer.configured(steps=28), tmp_path / "good", without=bad)
    np.testing.assert_allclose(w, only_good, rtol=1e-6)
    assert [line["step"] for line in steps_of(tmp_path / "run") if "skipped" in line] == [6, 28]
    # A run that goes on knows what it has seen and skipped.
    with pytest.raises(ZeroDivisionError):
        tiny_trainer.train(config, tmp_path / "again", added=bad, fail_at=25)
    np.testing.assert_array_equal(tiny_trainer.train(config, tmp_path / "again", added=bad), w)


def test_a_bad_step_stops_a_run_that_does_not_skip(tmp_path):
    for name, added, words in (("nan", np.nan, "loss nan"), ("spike", 1e4, r"loss 1e\+04 is a spike")):
        config = tiny_trainer.configured(steps=30, guard__spike=6.0, checkpoint__every=10)
        with pytest.raises(FloatingPointError, match=f"step 26: {words}.*the last good checkpoint is kept in "):
            tiny_trainer.train(config, tmp_path / name, added={25: added})
        assert checkpoint.newest(tmp_path / name / "checkpoints") == 20
    config = tiny_trainer.configured(steps=30)
    tiny_trainer.train(config, tmp_path / "unwatched", added={25: 1e4})
    assert steps_of(tmp_path / "unwatched")[25]["loss"] > 1e3


def test_nothing_but_bad_steps_is_not_skipped_for_ever(tmp_path):
    config = tiny_trainer.configured(steps=30, guard__then="skip")
    with pytest.raises(FloatingPointError, match="step 13: loss nan"):
        tiny_trainer.train(config, tmp_path / "run", added={i: np.nan for i in range(3, 30)})


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status", "kept"), [("SIGTERM", runner.RESUMABLE, (5,)), ("SIGKILL", -9, (2, 4))])
def test_a_signal_in_the_fifth_step(tmp_path, number, status, kept):
    """Asked to stop, it ends the step and saves; killed, it goes on from the last checkpoint that was written whole."""

    def start(*signal_at):
        script = f"import signal, sys, tiny_trainer; tiny_trainer.main(sys.argv[1], {', '.join(signal_at)})"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        return subprocess.run(
            [sys.executable, "-c", script, tmp_path / "run"],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=240,
        )

    stopped = start("5", f"signal.{number}")
    assert stopped.returncode == status, stopped.stderr
    asked = "step 5: asked to stop, and saved; the same command goes on from here"
    assert (stopped.stdout.splitlines()[-1] == asked) == (number == "SIGTERM")
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest in kept
    done = start()
    assert done.returncode == 0 and f"going on from step {newest}" in done.stdout, done.stderr
    whole = tiny_trainer.train(tiny_trainer.configured(steps=6), tmp_path / "whole")
    np.testing.assert_array_equal(json.loads(done.stdout.splitlines()[-1]), np.asarray(whole).tolist())
    assert [line["seen"] for line in steps_of(tmp_path / "run")] == [0, 1, 2, 3, 4, 5]


def test_asked_to_stop_in_the_first_evaluation(tmp_path, capsys):
    config = tiny_trainer.configured(steps=4)
    with pytest.raises(SystemExit) as stopped:
        tiny_trainer.train(config, tmp_path / "run", signal_at=(0, signal.SIGTERM))
    assert stopped.value.code == runner.RESUMABLE
    assert capsys.readouterr().out.splitlines()[-1] == "step 0: asked to stop; the same command begins anew"
    again = tiny_trainer.train(config, tmp_path / "run")
    np.testing.assert_array_equal(again, tiny_trainer.train(config, tmp_path / "whole"))
    assert [line["step"] for line in loop.read(tmp_path / "run" / loop.METRICS)] == [0, 1, 2, 3, 4, 4]


def test_asked_to_stop_while_a_checkpoint_is_read(tmp_path, capsys, monkeypatch):
    config = tiny_trainer.configured(steps=4, checkpoint__every=2)
    with pytest.raises(ZeroDivisionError):
        tiny_trainer.train(config, tmp_path / "run", fail_at=3)
    restore = checkpoint.Checkpoints.restore

    def asked(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return restore(*arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(checkpoint.Checkpoints, "restore", asked)
        tiny_trainer.train(config, tmp_path / "run")
    assert stopped.value.code == runner.RESUMABLE
    said = "step 2: asked to stop, and saved; the same command goes on from here"
    assert capsys.readouterr().out.splitlines()[-1] == said
    np.testing.assert_array_equal(
        tiny_trainer.train(config, tmp_path / "run"), tiny_trainer.train(config, tmp_path / "whole")
    )
    assert [line["seen"] for line in steps_of(tmp_path / "run")] == [0, 1, 2, 3]


def test_asked_to_stop_after_the_last_step_a_run_ends_as_ever(tmp_path):
    def export(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    tiny_trainer.train(tiny_trainer.configured(steps=2), tmp_path / "run", export=export)
    assert (tmp_path / "run" / "report.html").is_file()


def test_signals_are_as_before_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    tiny_trainer.train(tiny_trainer.configured(steps=1), tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before
