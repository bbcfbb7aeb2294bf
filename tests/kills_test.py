"""`kill -9` fifty times, in steps and in saves: the adapters in the end are those of a run that nothing disturbed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import kills
import numpy as np
import pytest
import resume_test

from lora_jax import checkpoint
from train import loop

TESTS = Path(__file__).parent


def weights(run):
    like = {name: jax.ShapeDtypeStruct((16, 16), jnp.float32) for name in "ab"}
    found = checkpoint.load(run / "checkpoints", like, "none", kills.STEPS)
    return {name: x.tobytes() for name, x in jax.tree.map(np.asarray, found).items()}


def test_what_an_earlier_process_left_is_no_save(tmp_path):
    left, new = (tmp_path / "checkpoints" / step for step in ("4", "8"))
    left.mkdir(parents=True)
    os.utime(left, ns=(1, 1))
    since = time.time_ns() - 10**9  # clocks of file systems are coarse
    assert not kills.saving(tmp_path, since)
    new.mkdir()
    assert kills.saving(tmp_path, since)
    (new / checkpoint.MANIFEST).touch()
    assert not kills.saving(tmp_path, since)


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, kills.__file__, tmp_path, "50", "0"],
        env=os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["threads"] == 1  # a process that is forked has no more
    assert told["doing"][kills.SAVE] >= 15 and told["doing"][kills.STEP] >= 15 and sum(told["doing"].values()) >= 50
    undisturbed = tmp_path / "undisturbed"
    seen = [line["seen"] for line in loop.read(undisturbed / loop.METRICS) if "seen" in line]
    assert len(seen) == kills.STEPS and len(set(seen)) > kills.STEPS // 2  # what is lost or repeated would show
    for run in told["runs"]:
        assert checkpoint.newest(tmp_path / run / "checkpoints") == kills.STEPS
        assert weights(tmp_path / run) == weights(undisturbed)
        assert resume_test.recorded(tmp_path / run) == resume_test.recorded(undisturbed)
