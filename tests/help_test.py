"""`--help` says what every setting means; a setting without a meaning is a mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train import config as settings
from train import help

ROOT = Path(__file__).parent.parent


def lines():
    text = help.text("Trains.\n", settings.sft, settings.sft())
    return {line.split()[0]: line for line in text.splitlines() if line.startswith("--config.")}


def test_every_setting_has_a_line_with_its_value_and_meaning():
    found = lines()
    assert list(found) == [f"--config.{name}" for name, _ in help.keys(settings.sft())]
    for name, line in found.items():
        assert len(line.split("  ")) > 2 and line.split("  ")[-1].strip(), name
    assert found["--config.optim.clip"].split(maxsplit=2)[1:] == ["1.0", "global norm of the gradient; 0: none"]
    assert found["--config.eval.max_new"].endswith("tokens in an answer")
    assert found["--config.data.columns.text"].endswith("and of these")  # its group's


def test_meanings_are_those_of_the_group():
    source = 'config = ConfigDict(\n    "a": 1,  # one\nconfig.g = {  # of g\n    "a": (1, "#"),  # two # or three\n'
    assert help.meanings(source) == {"a": "one", "g.a": "two # or three"}


@pytest.mark.slow
def test_on_the_command_line():
    def run(*flags, script="sft"):
        return subprocess.run(
            [sys.executable, "-m", f"train.{script}", *flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )

    plain, with_file = run("--help"), run("--config=configs/quickstart.py", "--help")
    assert plain.returncode == with_file.returncode == 0
    assert plain.stdout.startswith("Supervised fine-tuning: ")
    steps = [next(x for x in done.stdout.splitlines() if "config.steps" in x) for done in (plain, with_file)]
    assert [line.split()[1] for line in steps] == ["100", "60"]  # the file's own
    missing = run("--config=configs/none.py", "--help")
    assert missing.returncode == 1 and missing.stderr.strip().endswith("error: configs/none.py: no such config file")
    assert "\n--coordinator " in plain.stdout
    # What a script has of flags is there too, wherever it comes from.
    for script, flags in {"plan": ["config.mesh", "topology", "tokens"], "export": ["format", "run", "base"]}.items():
        said = run("--help", script=script).stdout
        assert all(f"\n--{flag} " in said for flag in flags), said
