"""What a user can get wrong: one clear line, an exit status, and nothing half-written."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy
import tiny

from lora_jax import checkpoint
from train import config as settings
from train import launch, loop, sft

pytestmark = pytest.mark.usefixtures("quick_module")

ROOT = Path(__file__).parent.parent
GOOD = [{"prompt": f"{a} + {b}", "completion": str(a + b)} for a in range(5) for b in range(5)]


def configured(model, tmp_path, lines=GOOD, **changes):
    config = settings.sft()
    config.model = str(model)
    config.data.source = str(tiny.write_jsonl(tmp_path / "data.jsonl", lines))
    config.data.heldout = 4
    config.steps, config.batch_size = 4, 2
    config.lora.rank = 4
    config.eval.answers = 0
    config.checkpoint.every = 2
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        setattr(config[group] if group else config, key, value)
    return config


def mistake(config, folder) -> str:
    """The one line that the script would print."""
    with pytest.raises(launch.MISTAKES) as caught:
        sft.train(config, folder, "bad")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run(*flags, **environment):
    """The script itself: its exit status, and the last line that it prints to stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "train.sft", *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done.returncode, done.stderr.strip().splitlines()[-1]


def truncated(folder):
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def reshaped(folder):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors", "no such file")),
        (truncated, ("model.safetensors", "download")),
        (reshaped, ("model.norm.weight", "31", "32")),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ("tokenizer.json",)),
        (shutil.rmtree, ("config.json and safetensors",)),
    ],
    ids=["missing", "truncated", "shape", "tokenizer", "folder"],
)
def test_bad_weights(model, tmp_path, damage, words):
    bad = shutil.copytree(model, tmp_path / "model")
    damage(bad)
    line = mistake(configured(bad, tmp_path), tmp_path / "run")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_bad_examples(model, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").rmdir()
    config = configured(model, tmp_path, [*GOOD, {"messages": [{"role": "user", "content": "what is 1?"}]}])
    assert f"{config.data.source}:26: nothing to learn from" in mistake(config, tmp_path / "run")
    with open(config.data.source, "a") as file:
        file.write("{oops\n")
    assert f"{config.data.source}:27: not JSON" in mistake(config, tmp_path / "run")
    assert "no such file" in mistake(configured(model, tmp_path, data__heldout_source="no.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_longer_than_the_context_is_counted_and_cut_only_if_asked(model, tmp_path, capsys):
    lines = [*GOOD, *({"prompt": f"{i}", "completion": "x" * 200} for i in range(3))]
    config = configured(model, tmp_path, lines, steps=1, seed=1)
    sft.train(config, tmp_path / "run", "long")
    assert "3 examples are longer than 128 tokens and left out" in capsys.readouterr().out
    config.data.truncate = True
    sft.train(config, tmp_path / "cut", "long")
    assert "longer than" not in capsys.readouterr().out
    config.data.length = 8
    config.data.truncate = False
    assert "every example is longer than config.data.length=8" in mistake(config, tmp_path / "none")
    config.data.length = 129
    assert "more than the 128 positions" in mistake(config, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "config.dtype='int8' is not one of"),
        ({"optim__schedule": "step"}, "config.optim.schedule='step' is not one of 'linear', 'cosine', 'constant'"),
        ({"optim__warmup": 4}, "config.optim.warmup=4 must be less than config.steps=4"),
        ({"optim__b2": 1.0}, "config.optim.b2=1.0 must be at least 0 and less than 1"),
        ({"guard__spike": -1.0}, "config.guard.spike=-1.0 must be 0 or more"),
        ({"guard__then": "wait"}, "config.guard.then='wait' is not one of 'stop', 'skip'"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep=0 must be at least 1"),
        ({"accumulate": 3}, "accumulate=3 does not divide"),
        ({"steps": 0}, "config.steps=0"),
        ({"remat": "some"}, "remat='some' is not one of"),
        ({"lora__rank": 64}, "rank 64 is larger than the matrix"),
        ({"lora__target": "q_prj"}, "nearest: 'layers/q_proj/kernel'"),
        ({"data__source": ""}, "config.data.source is empty"),
        ({"eval__answers": 4, "eval__max_new": 120}, "config.eval.max_new=120 are more than the 128 positions"),
        ({"data__heldout": 99}, "25 different questions are too few to hold out 99"),
    ],
)
def test_bad_settings(model, tmp_path, changes, message):
    assert message in mistake(configured(model, tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_stops_and_keeps_the_last_good_checkpoint(model, tmp_path):
    config = configured(model, tmp_path, checkpoint__every=1)
    config.optim.lr = 1e30
    line = mistake(config, tmp_path / "run")
    assert "step 2: loss nan" in line and "lower config.optim.lr" in line
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") == 1
    assert [m["step"] for m in loop.read(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


@pytest.mark.slow
def test_full_disk_keeps_the_last_good_checkpoint(model, tmp_path, monkeypatch):
    folder, usage = tmp_path / "run", shutil.disk_usage

    def filling(path):
        full = (folder / "checkpoints" / "2").exists()
        return usage(path)._replace(free=1000) if full else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", filling)
    line = mistake(configured(model, tmp_path), folder)
    assert "No space left" in line and "the one of step 2 is kept; make room" in line
    assert checkpoint.newest(folder / "checkpoints", log=pytest.fail) == 2
    monkeypatch.undo()
    sft.train(configured(model, tmp_path), folder, "again")
    assert checkpoint.newest(folder / "checkpoints") == 4


def test_unwritable_record_names_the_file(model, tmp_path):
    folder = tmp_path / "run"
    record = loop.Record(make(folder), -1)
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics.jsonl: cannot be written .*No space left on device"):
        record.metrics(1, loss=1.0)


def make(folder):
    folder.mkdir()
    return folder


def test_resume_with_another_base_spec_or_data(model, tmp_path):
    folder = tmp_path / "run"
    sft.train(configured(model, tmp_path), folder, "first")
    files = sorted(folder.rglob("*"))
    other = tiny.write(tmp_path / "other", seed=1)
    for word, config in {
        "base": configured(other, tmp_path),
        "trained": configured(model, tmp_path, lora__rank=8),
        "data": configured(model, tmp_path, batch_size=4),
    }.items():
        line = mistake(config, folder)
        assert f"its {word} is" in line and "start a new run in another folder" in line
        assert sorted(folder.rglob("*")) == files
    sft.train(configured(model, tmp_path), folder, "same")


def test_unknown_setting_on_the_command_line(tmp_path):
    status, line = run("--config=configs/quickstart.py", "--config.optim.lrr=1", f"--config.run={tmp_path / 'run'}")
    assert (status, line) == (1, "error: no setting config.optim.lrr; did you mean config.optim.lr?")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "error: no config; give one, such as --config=configs/quickstart.py"),
        (("--config=configs/none.py",), "error: configs/none.py: no such config file"),
        (("--config=configs/quickstart.py", "--config.steps=ten"), "error: flag --config.steps=ten"),
        (("--config=configs/quickstart.py", "--confg.steps=1"), "error: Unknown command line flag 'confg.steps'"),
        (("--config=configs/quickstart.py", "steps=1"), "error: unexpected argument 'steps=1'"),
        (("--config=configs/quickstart.py", "--config.model=none"), "error: none: "),
    ],
)
def test_command_line(flags, message):
    status, line = run(*flags)
    assert status == 1 and line.startswith(message)


@pytest.mark.slow
def test_unknown_setting_in_a_config_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from train import config\n\ndef get_config():\n    c = config.sft()\n    c.optim.rate = 1.0\n    return c\n"
    )
    status, line = run(f"--config={file}")
    assert status == 1 and line.startswith(f"error: {file}: ") and '"rate" does not exist' in line


@pytest.mark.slow
def test_mistakes_found_while_running_have_no_traceback(model, tmp_path):
    config = configured(model, tmp_path)
    flags = ["--config=configs/quickstart.py", f"--config.model={model}", f"--config.data.source={config.data.source}"]
    flags += ["--config.data.heldout=4", "--config.eval.answers=0", "--config.lora.rank=4"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    status, line = run(*flags, f"--config.run={tmp_path / 'nan'}", "--config.optim.lr=1e30", **cache)
    assert status == 1 and line.startswith("error: step 2: loss nan")
    with contextlib.suppress(FileNotFoundError):
        os.remove(config.data.source)
    status, line = run(*flags, f"--config.run={tmp_path / 'run'}", **cache)
    assert status == 1 and line.startswith(f"error: {config.data.source}: no such file")
    assert not (tmp_path / "run").exists()
