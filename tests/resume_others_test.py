"""`kill -9` in preference learning and distillation, then the same command: nothing is lost, and nothing done twice."""

import os
import signal
import subprocess
import sys
import time

import pytest
import resume_test
import tiny

from train import loop

pytestmark = pytest.mark.slow

STEPS, TIMES = resume_test.STEPS, ("tokens_per_second", "input_share")
LINES = [
    {"prompt": f"{a} + {b}", "completion": f"is {a}", "chosen": f"it is {a + b}", "rejected": str(a)}
    for a in range(7)
    for b in range(6)
]
TRAINERS = {
    "dpo": {},
    "dpo precomputed": {"reference": "precomputed", "method": "full", "optim.lr": 1e-3},
    "dpo kto": {"loss": "kto"},
    "distill": {"on_policy": True, "sampler.max_new": 6, "teacher.system": "be two"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.write(folder / "model")
    tiny.write_jsonl(folder / "lines.jsonl", LINES)
    return folder


def command(place, run, trainer):
    script, *_ = trainer.split()
    settings = {
        "model": place / "model",
        "run": run,
        "data.source": place / "lines.jsonl",
        "data.heldout": 8,
        "data.prompt": "prompt",
        "data.length": 60,
        "steps": STEPS,
        "batch_size": 4,
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "eval.every": 5,
        "checkpoint.every": 3,
        **({"data.completion": "completion"} if script == "distill" else {}),
        **TRAINERS[trainer],
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", f"train.{script}", f"--config=configs/{script}.py", *flags]


def finish(place, run, trainer):
    options = {"cwd": resume_test.ROOT, "env": resume_test.environment(place), "timeout": 600}
    done = subprocess.run(command(place, run, trainer), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr


def killed(place, run, trainer, when):
    """Starts the command and kills it as soon as `when(run)`."""
    process = subprocess.Popen(
        command(place, run, trainer),
        cwd=resume_test.ROOT,
        env=resume_test.environment(place),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 500
    try:
        while process.poll() is None and not when(run) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before the moment to kill it"
        assert time.monotonic() < deadline, "the moment to kill it never came"
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


def recorded(run):
    """What was measured, but for how long it took."""
    lines = loop.read(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_killed_and_started_again(place, trainer):
    undisturbed, run = place / f"{trainer} undisturbed", place / trainer
    finish(place, undisturbed, trainer)
    for moment in (resume_test.after(2), resume_test.writing(6), resume_test.after(10)):
        killed(place, run, trainer, moment)
    finish(place, run, trainer)
    assert recorded(run) == recorded(undisturbed)
    assert [line["step"] for line in recorded(run) if "loss" in line] == [*range(1, STEPS + 1)]
    mine, theirs = resume_test.weights(run), resume_test.weights(undisturbed)
    assert mine.keys() == theirs.keys()
    assert all(mine[path].tobytes() == theirs[path].tobytes() for path in mine)
    assert (run / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    # Partner: steps differ, so that a lost or repeated one would be seen.
    assert len({line["loss"] for line in recorded(run) if "loss" in line}) > STEPS // 2
