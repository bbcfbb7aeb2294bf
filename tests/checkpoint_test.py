"""Checkpoints: what comes back, what is refused, and what a crash or a full disk leaves behind."""

import os
import shutil
import subprocess
import sys
import threading

import eight
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import checkpoint, manifest, sharding
from lora_jax.quant import quantize_leaf

IDENTITY = {"base": "abc", "spec": "rank 4"}


def state(step, value=1.0):
    trainable = {"layers/q": {"a": jnp.full((3, 4), value), "b": jnp.arange(4.0) * value}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(trainable)
    return checkpoint.State(step, trainable, optimizer, {"data": {"next_index": step}, "key": [0, step]})


def open_(tmp_path, log=print, **changes):
    return checkpoint.Checkpoints(tmp_path / "run", {**IDENTITY, **changes}, keep=2, log=log)


def save(checkpoints, *args):
    """Saves and waits for it."""
    checkpoints.save(*args)
    checkpoints.wait()


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_saved_comes_back(tmp_path):
    saved = state(10, 0.1)
    save(open_(tmp_path), saved)
    back = open_(tmp_path).restore(state(0))
    assert_equal((back.trainable, back.optimizer), (saved.trainable, saved.optimizer))
    assert (back.step, back.progress) == (10, saved.progress)
    assert not np.array_equal(back.trainable["layers/q"]["a"], state(0).trainable["layers/q"]["a"])


def test_optimizer_without_state(tmp_path):
    save(open_(tmp_path), state(10)._replace(optimizer=optax.sgd(0.1).init({"a": jnp.ones(3)})))
    like = state(0)._replace(optimizer=optax.sgd(0.1).init({"a": jnp.ones(3)}))
    assert open_(tmp_path).restore(like).step == 10


def test_nothing_to_restore(tmp_path):
    assert open_(tmp_path).restore(state(0)) is None


def test_the_newest_are_kept(tmp_path):
    checkpoints = open_(tmp_path)
    for step in (5, 10, 100):
        save(checkpoints, state(step, step))
    assert sorted(os.listdir(tmp_path / "run"), key=int) == ["10", "100"]
    assert checkpoints.restore(state(0)).trainable["layers/q"]["a"][0, 0] == 100


def test_the_best_is_kept_besides(tmp_path):
    checkpoints = open_(tmp_path)
    for step, score in ((5, 1.0), (10, 3.0), (15, None), (20, 2.0), (25, 3.0), (30, None)):
        save(checkpoints, state(step, step), score)
    assert sorted(os.listdir(tmp_path / "run"), key=int) == ["10", "25", "30"]
    assert checkpoint.best(tmp_path / "run") == 10  # the first of two
    like = jax.eval_shape(lambda: state(0).trainable)
    assert checkpoint.load(tmp_path / "run", like, "abc", 10)["layers/q"]["a"][0, 0] == 10
    assert checkpoint.load(tmp_path / "run", like, "abc")["layers/q"]["a"][0, 0] == 30
    flip_a_bit(tmp_path / "run" / "10")
    assert checkpoint.best(tmp_path / "run") == 25
    with pytest.raises(ValueError, match=r"10: cannot be read: .* has changed"):
        checkpoint.load(tmp_path / "run", like, "abc", 10)
    save(checkpoints, state(35), 4.0)
    assert sorted(os.listdir(tmp_path / "run"), key=int) == ["30", "35"]


def test_without_scores_there_is_no_best(tmp_path):
    save(open_(tmp_path), state(10))
    assert checkpoint.best(tmp_path / "run") is None


@pytest.mark.parametrize("changed", [{"base": "other"}, {"spec": "rank 8"}])
def test_another_identity_is_refused(tmp_path, changed):
    save(open_(tmp_path), state(10))
    (name, value) = changed.popitem()
    with pytest.raises(ValueError, match=f"its {name} is {IDENTITY[name]}, this run's is {value}"):
        open_(tmp_path, **{name: value}).restore(state(0))
    assert open_(tmp_path).restore(state(0)).step == 10


def biggest_file(folder):
    return max((f for f in (folder / "trainable").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(folder):
    file = biggest_file(folder)
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(folder):
    file = biggest_file(folder)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_on_eight_devices():
    eight.run("eight_devices_checkpoint.py")


def test_the_next_step_need_not_wait(tmp_path, monkeypatch):
    """A checkpoint that is being written does not count, nor do those before it go, until it is whole."""
    go_on, write = threading.Event(), manifest.write

    def held(*args, **options):
        assert go_on.wait(60)
        write(*args, **options)

    checkpoints = open_(tmp_path)
    for step in (10, 20):
        save(checkpoints, state(step))
    monkeypatch.setattr(manifest, "write", held)
    checkpoints.save(state(30))
    assert checkpoint.newest(tmp_path / "run", log=lambda line: None) == 20
    assert {"10", "20"} < {*os.listdir(tmp_path / "run")}
    go_on.set()
    checkpoints.wait()
    assert checkpoint.newest(tmp_path / "run", log=pytest.fail) == 30
    assert {*os.listdir(tmp_path / "run")} == {"20", "30"}


def test_what_goes_wrong_while_it_is_written_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "manifest.json")

    checkpoints = open_(tmp_path)
    save(checkpoints, state(10))
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        checkpoints.save(state(20))
        with pytest.raises(OSError, match=r"20: the checkpoint cannot be .*No space left.*step 10 is kept; make room"):
            checkpoints.save(state(30))  # whichever comes first: the next one, or the end
    assert os.listdir(tmp_path / "run") == ["10"]
    save(checkpoints, state(30))
    assert checkpoint.newest(tmp_path / "run", log=pytest.fail) == 30


def test_what_a_killed_write_leaves_is_removed(tmp_path):
    save(open_(tmp_path), state(10))
    left = tmp_path / "run" / "20.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "run" / "10", left)
    again = open_(tmp_path, log=pytest.fail)
    assert again.restore(state(0)).step == 10
    assert not left.exists()


DAMAGE = {
    "truncated": (truncate, "bytes of"),
    "changed": (flip_a_bit, "has changed"),
    "missing": (lambda folder: biggest_file(folder).unlink(), "is missing"),
    "half-written": (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "half-written"),
    "manifest": (lambda folder: os.truncate(folder / checkpoint.MANIFEST, 40), "manifest.json is damaged"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "half-written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_passed_over_and_replaced(tmp_path, kind):
    damage, message = DAMAGE[kind]
    first = open_(tmp_path)
    save(first, state(10, 1.0))
    save(first, state(20, 2.0))
    damage(tmp_path / "run" / "20")
    said = []
    again = open_(tmp_path, said.append)
    assert again.restore(state(0)).step == 10
    assert len(said) == 1 and message in said[0] and "20" in said[0] and "\n" not in said[0]
    save(again, state(20, 3.0))
    assert again.restore(state(0)).trainable["layers/q"]["a"][0, 0] == 3.0
    assert len(said) == 1


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    checkpoints = open_(tmp_path)
    save(checkpoints, state(10))
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(OSError, match=r"20: the checkpoint cannot be .*step 10 is kept; make room") as caught:
            save(checkpoints, state(20))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "run") == ["10"]
    save(checkpoints, state(20))
    assert checkpoints.restore(state(0)).step == 20


def test_write_error_inside_a_file_keeps_the_last_good_checkpoint(tmp_path):
    """No file may grow beyond 64 kB: a write fails half-way, as on a disk that fills up."""
    script = """if True:
        import resource, signal, sys
        import jax.numpy as jnp
        from lora_jax import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        small = checkpoint.State(1, {"a": jnp.ones(10)}, (), {})
        noise = jnp.sin(jnp.arange(1e6) ** 2)  # does not compress
        checkpoints = checkpoint.Checkpoints(sys.argv[1], {"base": "abc"})
        checkpoints.save(small)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            checkpoints.save(checkpoint.State(2, {"a": noise}, (), {}))
            checkpoints.wait()
        except OSError as error:
            print("ERROR", error)
    """
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("ERROR")]
    assert "cannot be written" in line and "step 1 is kept; mend that and run" in line  # a limit, and not the disk
    assert os.listdir(tmp_path / "run") == ["1"]
    assert checkpoint.newest(tmp_path / "run") == 1


def test_load_gives_what_was_trained(tmp_path):
    save(open_(tmp_path), state(10, 0.5))
    like = jax.eval_shape(lambda: state(0).trainable)
    assert_equal(checkpoint.load(tmp_path / "run", like, "abc"), state(10, 0.5).trainable)
    with pytest.raises(ValueError, match="trained over a base with fingerprint abc; this one has other"):
        checkpoint.load(tmp_path / "run", like, "other")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        checkpoint.load(tmp_path / "nowhere", like, "abc")


def test_fingerprint():
    base = {"layers": {"q": jnp.arange(3000.0).reshape(30, 100)}, "norm": jnp.ones(5), "step": jnp.zeros(())}
    mine = checkpoint.fingerprint(base)
    assert mine == checkpoint.fingerprint(jax.tree.map(jnp.array, base))
    others = [
        {**base, "norm": base["norm"].at[4].set(2.0)},
        {**base, "norm": base["norm"].astype(jnp.bfloat16)},
        {**base, "norm": base["norm"][None]},
        {**base, "layers": {"k": base["layers"]["q"]}},
        {**base, "layers": {"q": base["layers"]["q"] + 1}},
        {"layers": base["layers"]},
    ]
    assert len({mine, *map(checkpoint.fingerprint, others)}) == len(others) + 1


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantised_base_has_one_fingerprint_on_a_mesh_and_off_it(format, key):
    def quantised(kernel):
        return {"kernel": quantize_leaf(kernel, format, axis=0), "scale": jnp.ones(64)}

    base = quantised(jax.random.normal(key, (64, 64)))
    wrapped = sharding.gathered(base, {"kernel": ("fsdp", None), "scale": (None,)})
    assert type(wrapped["kernel"]) is not type(base["kernel"])
    assert checkpoint.fingerprint(wrapped) == checkpoint.fingerprint(base)
    other = sharding.gathered(quantised(jnp.ones((64, 64))), {"kernel": ("fsdp", None)})
    assert checkpoint.fingerprint(other) != checkpoint.fingerprint(base)
