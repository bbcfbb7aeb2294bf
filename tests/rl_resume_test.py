"""`kill -9` in every phase of reinforcement learning, then the same command: the run is one that nothing disturbed."""

import collections
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import tiny
from resume_test import ROOT, environment, recorded, weights, writing

from lora_jax import checkpoint
from train import loop

pytestmark = pytest.mark.slow
STEPS, ANSWERS, HELD = 12, 16, 8  # steps; answers in each; prompts in an evaluation


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl_resume")
    tiny.write(folder / "model")
    lines = [{"prompt": f"{a} + {b}", "answer": str(a + b)} for a in range(8) for b in range(7)]
    tiny.write_jsonl(folder / "sums.jsonl", lines)
    source = """
        import json, os, time

        def noted(answer, entry):
            with open(os.environ["EVENTS"], "a") as file:
                file.write(json.dumps(entry["prompt"]) + "\\n")
            time.sleep(0.02)
            return -len(answer.encode()) / 8
        """
    (folder / "noted_rewards.py").write_text(textwrap.dedent(source))
    return folder


def command(place, run, *more):
    values = {
        "model": place / "model",
        "run": run,
        "data.source": place / "sums.jsonl",
        "data.heldout": HELD,
        "data.heldout_source": "",
        "steps": STEPS,
        "sampler.prompts": 4,
        "sampler.samples": 4,
        "sampler.max_new": 5,
        "batch_size": 8,
        "policy.epochs": 2,
        "policy.objective": "ppo",
        "policy.kl": 0.1,
        "method": "lora",
        "lora.rank": 4,
        "optim.lr": 1e-2,
        "reward.functions": "(('noted_rewards:noted', 1.0),)",
        "eval.every": 5,
        "checkpoint.every": 3,
    }
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return [sys.executable, "-m", "train.rl", "--config=configs/rl.py", *flags, *more]


def events(run):
    return run.with_suffix(".events")


def surroundings(place, run):
    variables = environment(place, EVENTS=str(events(run)))
    return variables | {"PYTHONPATH": f"{variables['PYTHONPATH']}{os.pathsep}{place}"}


def finish(place, run, *more):
    done = subprocess.run(
        command(place, run, *more), cwd=ROOT, env=surroundings(place, run), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def prompts(run):
    """The prompts of every answer that was judged, in the order of judging."""
    return [json.loads(line) for line in events(run).read_text().splitlines()] if events(run).exists() else []


@pytest.fixture(scope="module")
def undisturbed(place):
    run = place / "undisturbed"
    finish(place, run)
    # What is asked: every prompt once in a pass over the 48 of them, which takes all twelve steps, and each in a group.
    asked = collections.Counter(prompts(run))
    assert len(asked) == 56 and sum(asked.values()) == STEPS * ANSWERS + 4 * HELD
    assert sorted(asked.values()) == [4] * 56  # held-out ones in four evaluations
    return run


def killed(place, run, when):
    with subprocess.Popen(
        command(place, run), cwd=ROOT, env=surroundings(place, run), stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 600
        while process.poll() is None and not when(run) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before the moment to kill it"
        assert time.monotonic() < deadline, "the moment to kill it never came"
        os.kill(process.pid, signal.SIGKILL)


def judged(count):
    return lambda run: len(prompts(run)) >= count


def after(step):
    return lambda run: any(line["step"] >= step and "loss" in line for line in loop.read(run / "metrics.jsonl"))


MOMENTS = {
    "before-the-first-checkpoint": after(2),
    "rollout": after(4),  # the next one has just begun
    "reward": judged(HELD + 4 * ANSWERS + 5),  # in the midst of the fifth step's answers
    "update": judged(HELD + 5 * ANSWERS),  # all of them are judged
    "save": writing(6),
    "last-save": writing(STEPS),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(place, undisturbed, moment):
    run = place / moment
    killed(place, run, MOMENTS[moment])
    assert checkpoint.newest(run / "checkpoints", log=lambda line: None) != STEPS
    finish(place, run)
    mine, theirs = weights(run), weights(undisturbed)
    assert all(mine[path].tobytes() == theirs[path].tobytes() for path in theirs) and mine.keys() == theirs.keys()
    assert untimed(run) == untimed(undisturbed)
    assert (run / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()


def untimed(run):
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in recorded(run)]


def test_another_seed_is_another_run(place, undisturbed):
    """The partner of the equalities above."""
    finish(place, place / "other", "--config.seed=1")
    mine, theirs = weights(place / "other"), weights(undisturbed)
    assert any(mine[path].tobytes() != theirs[path].tobytes() for path in mine)
    assert untimed(place / "other") != untimed(undisturbed)
