"""`kill -9` at any moment, then the same command: the final adapters are those of a run that nothing disturbed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from lora_jax import checkpoint
from train import loop

ROOT = Path(__file__).parent.parent
STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.write(folder / "model")
    lines = [{"prompt": f"{a} + {b}", "completion": str(a + b)} for a in range(9) for b in range(9)]
    tiny.write_jsonl(folder / "sums.jsonl", lines)
    return folder


def command(place, run, *more):
    settings = {
        "model": place / "model",
        "run": run,
        "data.source": place / "sums.jsonl",
        "data.heldout": 8,
        "steps": STEPS,
        "batch_size": 4,
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "eval.every": 5,
        "eval.answers": 4,
        "eval.max_new": 4,
        "eval.batch_size": 4,
        "checkpoint.every": 3,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "train.sft", "--config=configs/quickstart.py", *flags, *more]


def environment(place, **more):
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(place / "cache")} | more


def finish(place, run, *more):
    done = subprocess.run(
        command(place, run, *more), cwd=ROOT, env=environment(place), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(run):
    """Every array of the final checkpoint's trainable tree, by its path."""
    import jax
    import orbax.checkpoint as ocp

    assert checkpoint.newest(run / "checkpoints") == STEPS
    tree = ocp.StandardCheckpointer().restore(run / "checkpoints" / str(STEPS) / "trainable")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def recorded(run):
    """What was measured, but for times."""
    return [
        {name: value for name, value in line.items() if name not in ("tokens_per_second", "input_share")}
        for line in loop.read(run / "metrics.jsonl")
    ]


def assert_identical(run, other):
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys() and len(mine) == 14
    for path in mine:
        assert mine[path].tobytes() == theirs[path].tobytes(), path
    assert recorded(run) == recorded(other)
    samples = [hashlib.sha256((r / "samples.jsonl").read_bytes()).hexdigest() for r in (run, other)]
    assert samples[0] == samples[1]


@pytest.fixture(scope="module")
def undisturbed(place):
    finish(place, place / "undisturbed")
    return place / "undisturbed"


def killed(place, run, when, **more):
    """Starts the command and kills it as soon as `when(run)`."""
    process = subprocess.Popen(
        command(place, run), cwd=ROOT, env=environment(place, **more), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None and not when(run) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before the moment to kill it"
        assert time.monotonic() < deadline, "the moment to kill it never came"
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


def after(step):
    return lambda run: any(line["step"] >= step and "loss" in line for line in loop.read(run / "metrics.jsonl"))


def writing(step):
    """Inside the write of a checkpoint: its files are there, its manifest is not."""

    def now(run):
        folder = run / "checkpoints"
        return any(
            path.name.startswith(str(step)) and not (path / checkpoint.MANIFEST).exists()
            for path in folder.glob(f"{step}*")
        )

    return now


MOMENTS = {
    "before-the-first-step": lambda run: (run / "metrics.jsonl").exists(),
    "before-the-first-checkpoint": after(2),
    "between-checkpoints": after(7),
    "inside-a-checkpoint": writing(6),
    "inside-the-last-checkpoint": writing(12),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(place, undisturbed, moment):
    run = place / moment
    killed(place, run, MOMENTS[moment])
    assert checkpoint.newest(run / "checkpoints", log=lambda line: None) != STEPS
    finish(place, run)
    assert_identical(run, undisturbed)


@pytest.mark.slow
def test_killed_again_and_again(place, undisturbed):
    run = place / "again"
    for step in (2, 5, 8, 11):
        killed(place, run, after(step))
    finish(place, run)
    assert_identical(run, undisturbed)
    # Started anew or from a checkpoint, it is one program, compiled once.
    assert len(list((place / "cache").rglob("jit_update-*-cache"))) == 1


@pytest.mark.slow
def test_another_order_of_data_gives_other_adapters(place, undisturbed):
    """The partner of all the equalities above."""
    finish(place, place / "other", "--config.seed=1")
    mine, theirs = weights(place / "other"), weights(undisturbed)
    assert any(mine[path].tobytes() != theirs[path].tobytes() for path in mine)


@pytest.mark.slow
def test_truncated_checkpoint_is_passed_over(place, undisturbed):
    run = place / "truncated"
    killed(place, run, lambda run: (run / "checkpoints" / "6" / checkpoint.MANIFEST).exists())
    last = run / "checkpoints" / "6"
    assert checkpoint.newest(run / "checkpoints") == 6
    biggest = max((last / "trainable").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    os.truncate(biggest, biggest.stat().st_size // 2)
    said = finish(place, run)
    # The evaluation at step 5 was the best so far, and has been saved too.
    assert "passing over checkpoint" in said and "going on from step 5" in said
    assert_identical(run, undisturbed)
