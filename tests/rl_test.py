"""Reinforcement learning on a tiny model: it learns what is rewarded, by every method and objective, and says so."""

import json
import textwrap

import jax
import numpy as np
import pytest
import tiny

from lora_jax.interop import hf
from train import launch, loop, methods, policy, rl, rl_settings, rollout

pytestmark = pytest.mark.usefixtures("quick_module")

LEARNERS = ("lora", "full")


@pytest.fixture(autouse=True)
def own_rewards(tmp_path, monkeypatch):
    """What is good is plain ASCII: something that a random model can learn at once."""
    source = """
        def plain(answer, entry):
            return sum(letter.isascii() for letter in answer) / max(len(answer), 1)

        def equal(answer, entry):
            return 0.5

        def sometimes(answer, entry):
            if len(answer) % 2:
                raise KeyError("odd")
            return plain(answer, entry)

        def never(answer, entry):
            raise KeyError("no")
        """
    (tmp_path / "tiny_rewards.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)


def configured(model, tmp_path, **changes):
    lines = [{"prompt": f"{a} + {b}", "answer": str(a + b)} for a in range(6) for b in range(6)]
    config = rl_settings.rl()
    config.model = str(model)
    config.data.source = str(tiny.write_jsonl(tmp_path / "sums.jsonl", lines))
    config.data.heldout = 8
    config.steps = 6
    config.sampler.prompts, config.sampler.samples, config.sampler.max_new = 4, 4, 5
    config.batch_size = 16
    config.optim.lr = 2e-2
    config.reward.functions = (("tiny_rewards:plain", 1.0),)
    config.checkpoint.every = 3
    config.lora.rank = 4
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        setattr(config[group] if group else config, key, value)
    return config


def trained(folder):
    return [line for line in loop.read(folder / loop.METRICS) if "learning_rate" in line]


def rewards(folder):
    return [line["heldout_reward"] for line in loop.read(folder / loop.METRICS) if "heldout_reward" in line]


@pytest.mark.parametrize(
    "method", [m if m == "lora" else pytest.param(m, marks=pytest.mark.slow) for m in methods.METHODS]
)
def test_it_learns_what_is_rewarded(method, model, tmp_path, capsys):
    config = configured(model, tmp_path, method=method, steps=12)
    config.lora.rank = 0 if method in ("ia3", "norms") else 4
    rate = 1.0 if method == "full" else methods.METHODS[method].rate
    config.optim.lr = 2e-2 * min(max(rate, 0.3), 10)
    rl.train(config, tmp_path / "run", method)
    before, after = rewards(tmp_path / "run")
    lines = trained(tmp_path / "run")
    # Twelve steps change the likeliest answers of a random model for some methods; every method has a gradient.
    assert after > before if method in LEARNERS else all(line["gradient_norm"] > 0 for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        # One update on what was just sampled: the learner finds the sampler's probabilities.
        assert abs(line["ratio"] - 1) < 1e-4 and abs(line["ratio_max"] - 1) < 1e-3 and line["sampler_gap"] < 1e-3
        assert 0 < line["entropy"] < 6 and 0 <= line["equal_groups"] <= 1 and line["failed_rewards"] == 0
    assert "held-out reward" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [o if o == "ppo" else pytest.param(o, marks=pytest.mark.slow) for o in policy.OBJECTIVES]
)
def test_every_objective_learns_over_several_updates(objective, model, tmp_path):
    changes = {
        "policy__epochs": 2,
        "batch_size": 8,
        "policy__kl": 0.02,
        "policy__clip": 0.02,
        "accumulate": 2,
        "sampler__rows": 8,
    }
    config = configured(model, tmp_path, policy__objective=objective, steps=8, optim__lr=2e-2, **changes)
    rl.train(config, tmp_path / "run", objective)
    before, after = rewards(tmp_path / "run")
    assert after > before
    lines = trained(tmp_path / "run")
    assert lines[0]["sampler_gap"] < 1e-4 < lines[0]["ratio_max"] - 1
    assert lines[-1]["kl"] > lines[0]["kl"] >= 0
    assert any(line["clipped"] > 0 for line in lines) == (objective != "policy_gradient")


@pytest.mark.slow
def test_parts_and_rows_of_a_step_change_nothing(model, tmp_path):
    """Answers do not depend on how many are drawn at once, nor an update on the parts that it is computed in."""
    first = {}
    for name, changes in {"whole": {}, "parts": {"accumulate": 4, "sampler__rows": 4, "loss_chunk": 7}}.items():
        config = configured(model, tmp_path, steps=2, policy__kl=0.1, **changes)
        rl.train(config, tmp_path / name, name)
        first[name] = trained(tmp_path / name)
    for one, other in zip(first["whole"], first["parts"], strict=True):
        for key in ("reward", "length", "loss", "gradient_norm", "entropy", "kl", "ratio_max"):
            np.testing.assert_allclose(one[key], other[key], rtol=1e-3, atol=1e-5, err_msg=key)
    config = configured(model, tmp_path, steps=2, seed=1)
    rl.train(config, tmp_path / "other", "other")
    assert trained(tmp_path / "other")[1]["loss"] != first["whole"][1]["loss"]


def test_equal_rewards_teach_nothing(model, tmp_path):
    config = configured(model, tmp_path, steps=2, reward__functions=(("tiny_rewards:equal", 1.0),), method="full")
    start = hf.load(model).params
    rl.train(config, tmp_path / "run", "equal")
    assert [line["equal_groups"] for line in trained(tmp_path / "run")] == [1, 1]
    from sft_test import final

    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(final(tmp_path / "run")), strict=True):
        np.testing.assert_array_equal(old, new)


def test_failed_rewards_are_left_out_and_told(model, tmp_path, capsys):
    config = configured(model, tmp_path, steps=2, reward__functions=(("tiny_rewards:sometimes", 1.0),))
    rl.train(config, tmp_path / "run", "sometimes")
    failed = [line["failed_rewards"] for line in trained(tmp_path / "run")]
    assert sum(failed) > 0
    told = f"{failed[0]:.0f} of 16 rewards failed, and their answers are left out: KeyError: 'odd'"
    assert told in capsys.readouterr().out
    config.reward.functions = (("tiny_rewards:never", 1.0),)
    with pytest.raises(ValueError, match="tiny_rewards:never: fails for all of 8 answers, first with: KeyError: 'no'"):
        rl.train(config, tmp_path / "never", "never")


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_run_that_did_not_stop(model, tmp_path):
    config = configured(model, tmp_path)
    rl.train(config, tmp_path / "whole", "x")
    config.steps = 3
    rl.train(config, tmp_path / "parts", "x")
    config.steps = 6
    rl.train(config, tmp_path / "parts", "x")
    whole, parts = ({line["step"]: line["loss"] for line in trained(tmp_path / n)} for n in ("whole", "parts"))
    assert whole == parts and len(set(whole.values())) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 7}, "config.batch_size=7 does not divide the 16 answers of a step"),
        ({"policy__objective": "trpo"}, "config.policy.objective='trpo' is not one of 'policy_gradient', 'ppo'"),
        ({"sampler__samples": 1}, "config.sampler.samples=1 must be at least 2"),
        ({"sampler__temperature": 0.0}, "config.sampler.temperature=0.0 must be more than 0"),
        ({"lora__dropout": 0.1}, "the policy that learns must be the one that was sampled"),
        ({"data__source": ""}, "config.data.source is empty"),
        ({"data__length": 3}, "no prompt is left with at most 3 tokens"),
        ({"sampler__max_new": 127}, "no prompt is left with at most 1 tokens"),
        ({"reward__functions": (("gsm", 1.0),)}, "reward 'gsm' is not one of exact, gsm8k"),
        ({"data__columns": {"answer": "result"}}, "no text 'result'|'result'"),
    ],
)
def test_refusals(changes, message, model, tmp_path):
    config = configured(model, tmp_path)
    for name, value in changes.items():
        group, _, key = name.rpartition("__")
        if isinstance(value, dict):
            config[group][key].update(value)
        else:
            setattr(config[group] if group else config, key, value)
    with pytest.raises(ValueError, match=message):
        rl.train(config, tmp_path / "run", "x")
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_told(model, tmp_path, capsys):
    config = configured(model, tmp_path)
    lines = [{"prompt": "1 + " * (20 if i == 3 else 1) + str(i), "answer": "0"} for i in range(20)]
    config.data.source = str(tiny.write_jsonl(tmp_path / "long.jsonl", lines))
    config.data.length = 20
    model = hf.load(model)
    format = rollout.chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(tmp_path))
    prompts = rollout.prepare(config, format, 128)
    assert len(prompts.training) + len(prompts.heldout) == 19 and prompts.width <= 20
    assert f"1 are longer than 20 and left out, such as {tmp_path / 'long.jsonl'}:4" in capsys.readouterr().out
    assert not {p.question for p in prompts.training} & {p.question for p in prompts.heldout}


def test_settings_are_locked():
    with pytest.raises(AttributeError, match="locked"):
        rl_settings.rl().sampler.sample = 3
    assert launch.help.text("", rl_settings.rl, rl_settings.rl()).count("\n") > 30
    json.dumps(rl_settings.rl().to_dict())
