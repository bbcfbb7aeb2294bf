"""Training by two and four hosts, processes here: the losses are those of one host, and one of them writes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from lora_jax import checkpoint
from train import loop, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    tiny.write(folder / "model")
    tiny.write(folder / "teacher", seed=1, hidden_size=64)
    lines = [{"prompt": f"{a} + {b}", "completion": str(a + b)} for a in range(9) for b in range(9)]
    pairs = [
        {"prompt": f"{a} + {b}", "completion": f"is {a}", "chosen": f"it is {a + b}", "rejected": str(a), "answer": "1"}
        for a in range(7)
        for b in range(6)
    ]
    (folder / "short_rewards.py").write_text("def short(answer, entry):\n    return -len(answer.encode()) / 8\n")
    for host in range(4):  # each has its own files
        (folder / f"host{host}").mkdir()
        tiny.write_jsonl(folder / f"host{host}" / "sums.jsonl", lines)
        tiny.write_jsonl(folder / f"host{host}" / "pairs.jsonl", pairs)
        tiny.write_jsonl(folder / f"host{host}" / "other.jsonl", [*lines, {"prompt": "what", "completion": str(host)}])
    return folder


SFT = {
    "data.source": "sums.jsonl",
    "lora.dropout": 0.1,
    "eval.answers": 4,
    "eval.max_new": 4,
    "eval.batch_size": 4,
}
PAIRS = {"data.source": "pairs.jsonl", "data.prompt": "prompt", "data.length": 60}
DISTILL = PAIRS | {"data.completion": "completion", "teacher.model": "../teacher", "sampler.max_new": 6}
DRAWN = {"sampler.prompts": 4, "sampler.samples": 4, "sampler.max_new": 5}
OTHERS = {
    "dpo precomputed": PAIRS | {"reference": "precomputed"},
    "distill": DISTILL | {"on_policy": True},
    "rl": DRAWN
    | {"data.source": "pairs.jsonl", "data.heldout_source": "", "policy.kl": 0.1}
    | {"reward.functions": "(('short_rewards:short', 1.0),)"},
}


def start(place, folder, count, *more, present=None, script="sft", config="quickstart", settings=SFT, slurm=False):
    """The processes of a run by several hosts, or those of them that are present; by flags, or as SLURM says."""
    settings = {
        "model": place / "model",
        "run": place / folder,
        "data.heldout": 8,
        "steps": STEPS,
        "batch_size": 8,
        "lora.rank": 4,
        "optim.schedule": "constant",
        "optim.lr": 1e-2,
        "eval.every": 4,
        "checkpoint.every": 3,
        **settings,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    flagged = not slurm and count > 1
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count), "SLURM_LOCALID": "0"}
    step |= {"JAX_COORDINATOR_PORT": str(port)}
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{place}", "XDG_CACHE_HOME": str(place / "cache")}
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"train.{script}", f"--config={ROOT}/configs/{config}.py", *flags]
            + ([f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={n}"] if flagged else [])
            + [flag.replace("HOST", str(n)) for flag in more],
            cwd=place / f"host{n}",
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | paths | (step | {"SLURM_PROCID": str(n)} if slurm else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for n in range(count)
        if n in (present or range(count))
    ]


def end(processes, status=0):
    """What each said, on either channel, once all have ended with this status; Gloo speaks for itself."""
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == status, errors
    return [(re.sub(r"\[Gloo\].*\n", "", out), errors) for out, errors in said]


def wait_for_step(folder, step, processes):
    """Until a run has made so many steps."""
    deadline = time.monotonic() + 400
    while not any(line["step"] >= step for line in loop.read(folder / loop.METRICS)):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def errors(said):
    return [next(line for line in errors.splitlines() if line.startswith("error: ")) for _, errors in said]


def numbers(place, folder, names=("loss", "gradient_norm", "tokens", "heldout_loss", "exact_match")):
    """What was measured and does not depend on time, in an array, and the steps."""
    lines = loop.read(place / folder / loop.METRICS)
    return [line["step"] for line in lines], np.array([[line.get(name, 0) for name in names] for line in lines])


@pytest.fixture(scope="module")
def interrupted(place):
    """Four hosts until the third is asked to stop, then two; returns the step at which they changed."""
    four = start(place, "changed", 4, "--config.mesh=data=2,fsdp=2", "--config.steps=100000")
    wait_for_step(place / "changed", 2, four)
    os.kill(four[2].pid, signal.SIGTERM)
    said = end(four, run.RESUMABLE)
    stopped = checkpoint.newest(place / "changed" / "checkpoints", log=pytest.fail)
    assert f"step {stopped}: asked to stop, and saved" in said[0][0] and not any(out for out, _ in said[1:])
    two = start(place, "changed", 2, f"--config.steps={stopped + STEPS}")
    assert f"going on from step {stopped} of" in end(two)[0][0]
    return stopped


@pytest.fixture(scope="module")
def alone(place, interrupted):
    """One host, for as long."""
    end(start(place, "alone", 1, f"--config.steps={interrupted + STEPS}"))
    return numbers(place, "alone")


def test_two_hosts_are_as_one(place, alone):
    said = end(start(place, "two", 2, "--config.mesh=fsdp=2"))
    steps, values = numbers(place, "two")
    assert steps == alone[0][: len(steps)] and len(steps) == STEPS + 3  # three evaluations
    np.testing.assert_allclose(values, alone[1][: len(steps)], rtol=1e-5)
    # Each line is written once, and one host speaks.
    assert "held-out loss" in said[0][0] and not said[1][0]
    samples = [(place / folder / loop.SAMPLES).read_text().splitlines() for folder in ("two", "alone")]
    assert samples[0] == samples[1][: len(samples[0])] and samples[0]
    assert (place / "two" / "adapter" / "adapter_model.safetensors").is_file()
    # Partner: losses differ from step to step by more than hosts do.
    assert np.abs(np.diff(values[values[:, 0] > 0, 0])).min() > 1e-4


def test_four_hosts_and_then_two_are_as_one(place, alone, interrupted):
    """Evaluations apart: when the last one is, is decided by when the run is to end."""
    mine, theirs = (
        {step: row[:3] for step, row in zip(*found, strict=True) if row[0]}
        for found in (numbers(place, "changed"), alone)
    )
    assert list(mine) == list(theirs) == [*range(1, interrupted + STEPS + 1)]
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=1e-5)


@pytest.mark.parametrize("trainer", OTHERS)
def test_other_trainers_on_two_hosts(place, trainer):
    script, *_ = trainer.split()
    found, names = [], ("loss", "gradient_norm", "heldout_loss", "reward_margin", "reward", "heldout_reward", "length")
    for count in (1, 2):
        folder = f"{trainer} {count}"
        end(start(place, folder, count, script=script, config=script, settings=OTHERS[trainer]))
        found.append(numbers(place, folder, names))
        assert (place / folder / "adapter" / "adapter_model.safetensors").is_file()
    (steps, alone), (same, two) = found
    assert steps == same and len(steps) == STEPS + 3  # three evaluations
    largest = np.abs(alone).max(axis=0)
    # A policy's loss is a sum that is next to nothing, so that some is allowed beside it; less where numbers are small.
    may = np.minimum(1e-6, 1e-5 * largest) + 1e-5 * np.abs(alone)
    assert (np.abs(two - alone) <= may).all(), (two, alone)
    # Partner: gradients' norms differ from step to step by far more than hosts may.
    assert np.abs(np.diff(alone[alone[:, 1] > 0, 1])).min() > 100 * may[:, 1].max()


def test_two_hosts_meet_as_slurm_says(place):
    said = end(start(place, "srun", 2, "--config.steps=1", slurm=True))
    assert "held-out loss" in said[0][0] and not said[1][0]
    assert numbers(place, "srun")[0] == [0, 1, 1]


@pytest.mark.parametrize("slurm", [False, True])
def test_a_host_that_never_arrives_is_named(place, slurm):
    said = end(start(place, "missing", 2, "--arrival=2", present=[0], slurm=slurm), status=1)
    assert "for 2 hosts, but not for host 1: start it" in errors(said)[0]
    assert not (place / "missing").exists()


def test_hosts_with_different_settings(place):
    said = end(start(place, "differ", 2, "--config.optim.b2=0.9HOST"), status=1)
    for host, line in enumerate(errors(said)):
        assert line == (
            f"error: host {host}: config.optim.b2 is 0.9 on host 0 and 0.91 on host 1; "
            "start all of them with the same command and the same files"
        )
    assert not (place / "differ").exists()


def test_hosts_with_different_files(place):
    said = end(start(place, "differ", 2, "--config.data.source=other.jsonl"), status=1)
    for host, line in enumerate(errors(said)):
        assert line.startswith(f"error: host {host}: the run's data is ") and " on host 1; start all" in line
    assert not (place / "differ" / "metrics.jsonl").exists()


def test_a_folder_that_hosts_do_not_share(place):
    said = end(start(place, "own", 2, "--config.run=own"), status=1)  # each in its own working folder
    for host, line in enumerate(errors(said)):
        assert line == (
            f"error: host {host}: config.run=own: host 1 cannot see what host 0 writes there "
            f"({place}/host{host}/own here); give a folder of a file system that all hosts share"
        )
        assert not list((place / f"host{host}").glob("own/*"))


def test_a_host_that_is_killed(place):
    two = start(place, "killed", 2, "--config.steps=100000")
    wait_for_step(place / "killed", 7, two)  # the checkpoint of step 3 is whole
    two[1].kill()
    said = end(two[:1], status=1)
    (line,) = errors(said)
    assert line.startswith("error: host 0: another host is gone or cannot be reached (") and "make room" not in line
    assert line.endswith("); see why, and the same command goes on from the last checkpoint")
    assert "Traceback" not in said[0][1]
    assert checkpoint.newest(place / "killed" / "checkpoints", log=pytest.fail) >= 3


def test_asked_to_stop_before_the_first_step(place):
    """Whether a run begins or goes on, and whichever host is asked."""

    def stopped(*, began):
        processes = start(place, "early", 2, "--config.steps=100000")
        deadline = time.monotonic() + 400
        while not versions.is_file() or versions.stat().st_mtime_ns == began:  # written before the first evaluation
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.05)
        os.kill(processes[1].pid, signal.SIGTERM)
        return int(re.findall(r"step (\d+): asked to stop", end(processes, run.RESUMABLE)[0][0])[0])

    versions = place / "early" / loop.VERSIONS
    assert stopped(began=0) < 10
    end(start(place, "early", 2))
    assert STEPS <= stopped(began=versions.stat().st_mtime_ns) < STEPS + 10
