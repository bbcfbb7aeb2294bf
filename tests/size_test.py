"""Training at size on a tiny model: the same numbers in less memory, one program, and no waiting for input."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import sft_test
import tiny
import tiny_trainer

import lora_jax as lora
from lora_jax.models import decoder, loss
from lora_jax.models.config import DecoderConfig
from train import config as settings
from train import loop, methods, profiling, sft

pytestmark = pytest.mark.usefixtures("quick_module")
ROOT = Path(__file__).parent.parent


# In a process of its own: the profiler of one that has loaded libtpu, to compile for TPUs, crashes without a TPU.
PROFILED = """
import sys
import tiny_trainer
tiny_trainer.train(tiny_trainer.configured(steps=4, profile=sys.argv[2]), sys.argv[1])
"""


def run_alone(code, *arguments, **environment):
    """What the code prints in a process of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps_of(folder):
    return [line for line in loop.read(folder / loop.METRICS) if "learning_rate" in line]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Two runs, plain and with every saving of memory: folder, what was said, and the compiled step."""
    found = {}
    saving = {"remat": "offload", "loss_chunk": 8, "accumulate": 2}
    for name, changes in {"plain": {}, "saving": saving}.items():
        folder, steps = tmp_path_factory.mktemp(name), []
        config = sft_test.configured(model, folder, eval__answers=0, **changes)
        lines = [{"prompt": f"{i} and " * (i % 5 + 1), "completion": "two " * (i % 7 + 1) + str(i)} for i in range(64)]
        tiny.write_jsonl(folder / "sums.jsonl", lines)
        with pytest.MonkeyPatch.context() as patch:
            make = sft.make_update
            patch.setattr(sft, "make_update", lambda *x, make=make, steps=steps: steps.append(make(*x)) or steps[0])
            said = []
            patch.setattr("builtins.print", lambda *x, said=said, **_: said.append(" ".join(map(str, x))))
            sft.train(config, folder / "run", name)
        found[name] = folder / "run", "\n".join(said), steps[0]
    return found


@pytest.mark.slow
def test_the_numbers_are_the_same(runs):
    plain, saving = ([line["loss"] for line in steps_of(runs[name][0])] for name in ("plain", "saving"))
    np.testing.assert_allclose(saving, plain, rtol=1e-5)
    assert abs(plain[0] - plain[-1]) > 1e-2


@pytest.mark.slow
def test_one_program_for_all_batches(runs):
    for folder, _, step in runs.values():
        assert step._cache_size() == 1
        assert len({line["tokens"] for line in steps_of(folder)}) > 2  # which are filled up differently


@pytest.mark.slow
def test_what_was_chosen_is_said(runs):
    _, said, _ = runs["saving"]
    assert "attention: chunked (there is no kernel for cpu)" in said
    assert "loss: logits of 8 tokens at a time, computed once" in said
    assert "loss: logits" not in runs["plain"][1]


def test_an_adapter_of_the_head_has_its_logits_computed_again(capsys):
    config, shape = settings.sft(), DecoderConfig("llama", 61, 16, 24, 1, 2, 1, 8, context=64)
    for chunk, path, once in ((8, "head/kernel", False), (8, "layers/q_proj/kernel", True), (0, "head/kernel", False)):
        config.loss_chunk = chunk
        assert methods.once(config, {path: None}, shape) == once
    assert capsys.readouterr().out.splitlines() == [
        "loss: logits of 8 tokens at a time, computed again for gradients: head/kernel has an adapter",
        "loss: logits of 8 tokens at a time, computed once",
    ]
    # Computed once they would not be its own.
    params = jax.eval_shape(lambda key: decoder.init(key, shape), jax.random.key(0))
    tokens, weights = np.zeros((1, 8), np.int32), np.ones((1, 8), np.float32)

    def nll(params, **how):
        return loss.cross_entropy(params, decoder.hidden(params, tokens, shape), tokens, weights, shape, 4, **how)[0]

    spec = lora.Spec(lora.Rule("head/kernel", rank=2))
    adapters = jax.eval_shape(lambda key: lora.init(key, params, lora.trace(nll, params), spec), jax.random.key(0))
    gradient = jax.grad(lambda adapters, params, **how: lora.lift(nll)(lora.attach(params, adapters), **how))
    assert jax.eval_shape(gradient, adapters, params)
    with pytest.raises(lora.LiftError, match=r"the adapted weight 'head/kernel' .* reaches `custom_vjp_call"):
        jax.eval_shape(lambda *x: gradient(*x, once=True), adapters, params)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["3:4", "2:9", ""], ids=["some", "to the last", "none"])
def test_profile(steps, tmp_path):
    said = run_alone(PROFILED, tmp_path / "run", steps)
    if not steps:
        assert not (tmp_path / "run" / "profile").exists() and "profile of" not in said
        return
    first, last = steps.split(":")
    assert f"profile of steps {first} to {last}: {tmp_path}/run/profile; see it with `xprof --logdir=" in said
    (trace,) = (tmp_path / "run" / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    seen = {event["args"]["step_num"] for event in events if event.get("name") == "step"}
    assert seen == set("1234"[int(first) - 1 : int(last)])  # of four steps
    assert any("PjitFunction(update)" in event.get("name", "") for event in events)


@pytest.mark.parametrize("text", ["3", "4:3", "0:2", "a:b"])
def test_steps_that_cannot_be_meant(text):
    config = settings.sft()
    config.profile, config.data.source = text, "x.jsonl"
    with pytest.raises(ValueError, match=f"config.profile='{text}' is not FIRST:LAST, such as '10:13'"):
        settings.check(config)
    assert list(profiling.steps("3:5")) == [3, 4, 5] and not profiling.steps("")


@pytest.mark.slow
def test_input_does_not_starve_the_step(runs, tmp_path):
    """Even of a step of some milliseconds; from a source that is slower than the step, it does, and shows."""
    tiny_trainer.train(tiny_trainer.configured(steps=4), tmp_path / "slow", seconds=0.1)
    real, slow = (
        np.median([line["input_share"] for line in steps_of(folder)])
        for folder in (runs["plain"][0], tmp_path / "slow")
    )
    assert real < 0.2 and slow > 0.6


SECOND = """
import sys
from pathlib import Path
import jax
import sft_test
from train import launch, sft
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
launch.quiet()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
folder = Path(sys.argv[1])
folder.mkdir()
changes = {"steps": 2, "eval__answers": 0, "loss_chunk": 8, "remat": "dots"}
sft.train(sft_test.configured(sys.argv[2], folder, **changes), folder / "run", "cached")
print(*(sum(event.endswith(name) for event in seen) for name in ("cache_misses", "cache_hits")))
"""


@pytest.mark.slow
def test_the_second_start_compiles_nothing(model, tmp_path):
    counts = []
    for start in ("first", "second"):
        said = run_alone(SECOND, tmp_path / start, model, XDG_CACHE_HOME=str(tmp_path / "cache"))
        counts.append([int(n) for n in said.splitlines()[-1].split()])
    (misses, _), (again, hits) = counts
    assert misses > 10 and again == 0 and hits >= misses
