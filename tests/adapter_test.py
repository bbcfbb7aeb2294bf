"""What a run leaves on disk: an adapter apart from the training state, neither with anything of the base."""

import jax
import numpy as np
import pytest
import sft_test
import tiny
import tiny_run

from lora_jax import checkpoint
from lora_jax.interop import hf, peft
from lora_jax.tree import nbytes
from train import adapter, methods, sft

pytestmark = pytest.mark.usefixtures("quick_module")


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_bytes_on_disk(tmp_path, capsys):
    model = tiny.write(tmp_path / "model", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    config = sft_test.configured(model, tmp_path, steps=2, checkpoint__every=1, lora__rank=16, eval__answers=0)
    run, loaded = tmp_path / "run", hf.load(model)
    sft.train(config, run, "bytes")
    _, start = methods.start(jax.random.key(0), config, loaded)
    found = checkpoint.load(run / "checkpoints", start, checkpoint.fingerprint(loaded.params))
    trained = nbytes(found)
    assert 3 * nbytes(loaded.params) > 9 * trained  # with the base, or a part of it, the bounds below would not hold
    for step in "12":
        assert size(run / "checkpoints" / step) < 1.05 * 3 * trained  # Adam's moments are two
    assert size(run / "checkpoints" / "2") > 0.9 * 3 * trained  # those of the first step are zeros, in part
    assert trained < size(run / adapter.FOLDER) < 1.05 * trained
    assert size(run / "checkpoints") + size(run / adapter.FOLDER) < 1.05 * (2 * 3 + 1) * trained
    assert f"{run / 'adapter'}: 0.5 MB, what was trained, in PEFT's files" in capsys.readouterr().out
    # It is what was trained last.
    plain = peft.load(run / adapter.FOLDER, loaded.config, loaded.params)
    assert plain.keys() == found.keys() and len(plain) == 7
    for path in found:
        np.testing.assert_array_equal(plain[path].a, found[path].a)
        np.testing.assert_array_equal(plain[path].b, found[path].b)
        assert plain[path].scale == found[path].scale and np.abs(found[path].b).max() > 0


@pytest.mark.parametrize(("method", "writes"), [("full", False), ("lora", True)])
def test_of_a_run_that_trains_everything_there_is_no_adapter(method, writes, model, tmp_path):
    config = sft_test.configured(model, tmp_path, method=method)
    assert (adapter.writer(config, hf.load(model), None) is not None) == writes


def test_where_peft_has_no_such_adapter(model, tmp_path, capsys):
    base, trained, _ = tiny_run.write(tmp_path / "run", model, "bottleneck")
    config = sft_test.configured(model, tmp_path, method="bottleneck")
    adapter.writer(config, hf.load(model), base)(tmp_path / "run", 6, trained)
    assert "not written: the adapter of" in capsys.readouterr().out
    assert not (tmp_path / "run" / adapter.FOLDER).exists()


def test_the_last_one_replaces_one_that_is_there(model, tmp_path):
    base, trained, shape = tiny_run.write(tmp_path / "run", model)
    config = sft_test.configured(model, tmp_path)
    for factor in (1, 2):
        now = jax.tree.map(lambda x: factor * x, trained)  # noqa: B023
        adapter.write(tmp_path / "run", 6, now, config=config, model=hf.load(model), base=base)
    found = peft.load(tmp_path / "run" / adapter.FOLDER, shape, base)
    for path in trained:
        np.testing.assert_array_equal(found[path].a, 2 * trained[path].a)
    assert not list((tmp_path / "run").glob("*.part"))
