"""Rewards, and the processes that run them: what hangs, throws or crashes costs one answer and is told."""

import math
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from lora_jax.data import kinds, sources
from train import judge, rewards


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a user's rewards."""
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            import os, time, math

            def length(answer, entry):
                print("a reward may print")
                return len(answer)

            def moody(answer, entry):
                if answer == "hang":
                    while True:
                        pass
                if answer == "sleep":
                    time.sleep(1000)
                if answer == "throw":
                    raise RuntimeError("no mood\\nfor this")
                if answer == "crash":
                    os._exit(7)
                return {"nan": math.nan, "text": "1", "nothing": None}.get(answer, 0.25)

            number = 3
            """
        )
    )
    (tmp_path / "broken_rewards.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_gsm8k_takes_the_final_number():
    entry = {"answer": "She has 2 * 36 = 72.\n#### 1,072"}
    for answer in ("1072", "so it is 1,072.", "#### 1072", "#### 1,072 eggs, 3 a day", "7 + 1065 = 1072.0"):
        assert rewards.gsm8k(answer, entry) == 1
    for answer in ("72", "", "no number", "1072 or 1073", "#### 5\n1072", "-1072", "1.072"):
        assert rewards.gsm8k(answer, entry) == 0
    assert rewards.gsm8k("-.5", {"answer": "-0.5"}) == 1


def test_format_is_one_tag_at_the_end():
    for answer in ("<answer>7</answer>", "well\n<answer>\n7</answer> "):
        assert rewards.tagged(answer, {}) == 1
    for answer in ("7", "<answer></answer>", "<answer>7</answer> I think", "<answer>7</answer><answer>8</answer>"):
        assert rewards.tagged(answer, {}) == 0


@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "letter_counting", "gcd", "leg_counting"])
def test_reasoning_gym_scores_as_the_task_does(task):
    import reasoning_gym

    tasks = sources.load(f"reasoning_gym:{task}?size=8&seed=3", kind=kinds.Task)
    made = reasoning_gym.create_dataset(task, size=8, seed=3)
    for one, theirs in zip(tasks, made, strict=True):
        for answer in (str(theirs["answer"]), "1", "nonsense"):
            expected = made.score_answer(answer, theirs)
            assert rewards.reasoning_gym(answer, one.values) == expected
            assert rewards.reasoning_gym(f"thus\n<answer> {answer} </answer>", one.values) == expected
    assert rewards.reasoning_gym(tasks[0].answer, tasks[0].values) == 1


def test_several_rewards_are_weighted():
    both = [(rewards.exact, 1.0), (rewards.tagged, 0.5)]
    assert rewards.total(both, "<answer>7</answer>", {"answer": "7"}) == 0.5
    assert rewards.total(both, "7", {"answer": "7"}) == 1.0
    assert rewards.total([(lambda answer, entry: np.float32(2), 0.5)], "", {}) == 1.0


def test_what_fails_costs_one_answer(mine):
    said = ["fine", "hang", "throw", "crash", "fine", "nan", "text", "nothing", "sleep", "fine"]
    with judge.Judges([("my_rewards:moody", 2.0)], limit=1.5, workers=2) as judges:
        scores = judges(said, [{}] * len(said))
        assert [s.value for s in scores if s.value == s.value] == [0.5] * 3
        failures = {answer: s.failure for answer, s in zip(said, scores, strict=True) if s.failure}
        assert failures == {
            "hang": "took longer than 1.5 s",
            "sleep": "took longer than 1.5 s",
            "throw": "RuntimeError: no mood for this",
            "crash": "its process ended with status 7",
            "nan": "ValueError: the reward is nan, not a finite number",
            "text": "ValueError: the reward is '1', not a finite number",
            "nothing": "ValueError: the reward is None, not a finite number",
        }
        with pytest.raises(ValueError, match="my_rewards:moody: fails for all of 2 answers, first with: RuntimeError"):
            judges(["throw", "nan"], [{}, {}])
        # Whatever happened, all workers are there again.
        assert [s.value for s in judges(["x"] * 6, [{}] * 6)] == [0.5] * 6


def test_answers_keep_their_order_and_entries_arrive(mine):
    with judge.Judges([("my_rewards:length", 1.0), ("exact", 10.0)], limit=30, workers=2) as judges:
        answers = ["x" * (i % 7) for i in range(40)]
        scores = judges(answers, [{"answer": "xx"}] * 40)
    assert [s.value for s in scores] == [len(a) + 10 * (a == "xx") for a in answers]


def test_an_entry_that_cannot_be_sent(mine):
    with judge.Judges([("exact", 1.0)], limit=30, workers=1) as judges:
        good, bad = judges(["a", "a"], [{"answer": "a"}, {"answer": "a", "entry": lambda: 0}])
    assert good.value == 1 and math.isnan(bad.value) and "pickle" in bad.failure


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm8", "reward 'gsm8' is not one of exact, gsm8k, tagged, reasoning_gym; your own is 'module:function'"),
        ("my_rewards:none", "my_rewards has no function 'none'"),
        ("my_rewards:number", "my_rewards has no function 'number'"),
        ("no_such:reward", "importing no_such fails: ModuleNotFoundError"),
        ("broken_rewards:x", "importing broken_rewards fails: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_names_that_mean_nothing(mine, name, message):
    with pytest.raises(ValueError, match=message):
        judge.Judges([(name, 1.0)], limit=1, workers=1)


def test_a_worker_that_hangs_does_not_outlive_its_parent(mine):
    script = (
        "import sys, os\n"
        "from train import judge\n"
        "judges = judge.Judges([('my_rewards:moody', 1.0)], 1000, 1)\n"
        "worker = judges._idle.get(); judges._idle.put(worker)\n"
        "print(worker.process.pid, flush=True)\n"
        "judges(['hang'], [{}])\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}
    )
    pid = int(parent.stdout.readline())
    time.sleep(2)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}")


def test_workers_need_no_jax():
    code = "import sys, train.judge; print('jax' in sys.modules)"
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
