"""Configs, records and the progress line."""

import ast
from pathlib import Path

import numpy as np
import pytest

from train import config as settings
from train import distill_settings, dpo_settings, loop, rl_settings

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_say_what_to_expect_and_can_be_meant(path):
    source = path.read_text()
    for word in ("Reproduces:", "Command:", "Hardware:", "Expected:"):
        assert word in ast.get_docstring(ast.parse(source))
    names: dict = {}
    exec(compile(source, path, "exec"), names)
    config = names["get_config"]()
    if "variants" in config:  # of another config
        return
    config = config.get("sft", config)  # a comparison's experiment
    config.data.source = config.data.source or "planned for, before there is any"
    own = {"reward": rl_settings, "teacher": distill_settings, "reference": dpo_settings}
    next((module for name, module in own.items() if name in config), settings).check(config)
    with pytest.raises(AttributeError, match="locked"):
        config.optim.learning_rate = 1.0


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("constant", 0, [1, 1, 1, 1]),
        ("cosine", 0, [(1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("constant", 3, [1 / 3, 2 / 3, 1, 1]),
        ("cosine", 1, [1, 1, 0.75, 0.25]),
    ],
)
def test_schedules(kind, warmup, expected):
    config = settings.sft()
    config.steps, config.optim.schedule, config.optim.warmup = 4, kind, warmup
    np.testing.assert_allclose([settings.schedule(config, 2.0)(i) for i in range(4)], 2 * np.array(expected), rtol=1e-6)


def test_what_happened_after_a_checkpoint_is_recorded_once(tmp_path):
    first = loop.Record(tmp_path, -1)
    for step in range(5):
        first.metrics(step, loss=float(step))
        first.sample(step, said=str(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    again = loop.Record(tmp_path, 2)
    again.metrics(3, loss=30.0)
    again.close()
    assert [line["loss"] for line in loop.read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 30]
    assert [line["said"] for line in loop.read(tmp_path / "samples.jsonl")] == ["0", "1", "2"]
    assert not list(tmp_path.glob("*.part"))
    loop.Record(tmp_path, -1).close()
    assert loop.read(tmp_path / "metrics.jsonl") == []


def test_begin_tells_what_has_changed_and_remembers_when(tmp_path, capsys):
    config = {"optim": {"lr": 1.0}, "exclude": (), "steps": 3}
    loop.begin(tmp_path / "run", config)
    assert capsys.readouterr().out == ""
    started = loop.started(tmp_path / "run")
    loop.begin(tmp_path / "run", config)
    assert capsys.readouterr().out == ""
    loop.begin(tmp_path / "run", {**config, "optim": {"lr": 2.0}})
    assert capsys.readouterr().out == "changed since the last start: optim.lr 1.0 -> 2.0\n"
    assert loop.started(tmp_path / "run") == started
    assert loop.resolved(tmp_path / "run")["optim"] == {"lr": 2.0}


def test_speed_leaves_out_the_step_that_compiles_and_what_is_skipped(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 100.0, 101.0, 150.0, 152.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    with loop.Progress(steps=4, step=0) as progress:
        progress.update(1, {"loss": 1.0, "tokens": 60})  # 100 s
        assert progress.update(2, {"loss": 1.0, "tokens": 60})["tokens_per_second"] == 60  # 1 s
        progress.skip()
        assert progress.update(3, {"loss": 0.5, "tokens": 60})["tokens_per_second"] == 30  # 2 s
    assert "step 3/4  loss 0.5000  40 tokens/s  0:00:02 left" in capsys.readouterr().out


def test_waiting_for_input_is_measured(monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 2.0, 4.0, 4.0, 4.5, 6.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    with loop.Progress(steps=2, step=0) as progress:
        assert progress.fetch(iter("a")) == "a"  # from 1 to 2
        assert progress.update(1, {"loss": 1.0, "tokens": 8}) == {"tokens_per_second": 2.0, "input_share": 0.25}
        assert progress.fetch(iter("b")) == "b"  # from 4 to 4.5
        assert progress.update(2, {"tokens": 8}) == {"tokens_per_second": 4.0, "input_share": 0.25}
