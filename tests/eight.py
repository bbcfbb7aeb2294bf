"""A file of tests in a process of its own, to which this CPU is eight devices."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# The threads of eight devices wait for one another; on cores that are busy, for longer than XLA would. A device may
# wait in several exchanges at once, each in a thread of XLA's pool: where these are as few as devices, for ever.
THREADS = "64"
FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"


def run(file: str) -> None:
    """Runs it, and fails as it does."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / file],
        env=os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}", "NPROC": THREADS},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
