"""What an answer is worth: plain functions `reward(answer, entry) -> float`.

`answer` is the text that the model said. `entry` is the record that the prompt came from, with the answer that is
expected under "answer" whatever the column was called, and under "entry" what a reasoning-gym task made.

A config names them: "gsm8k", or "module:function" for one of your own.
"""

import functools
import importlib
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any

Reward = Callable[[str, Mapping[str, Any]], float]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def exact(answer: str, entry: Mapping[str, Any]) -> float:
    """1 if the answer is the expected one, but for space around it."""
    return float(answer.strip() == entry["answer"].strip())


def gsm8k(answer: str, entry: Mapping[str, Any]) -> float:
    """1 if the final number is the expected one: what follows the last ####, or else the last number said."""
    said, expected = _final_number(answer), _final_number(entry["answer"])
    return float(said is not None and said == expected)


def tagged(answer: str, entry: Mapping[str, Any]) -> float:
    """1 if the answer ends with its result between <answer> and </answer>, said once: a reward for the format."""
    found = TAGGED.findall(answer)
    return float(len(found) == 1 and bool(found[0].strip()) and answer.rstrip().endswith("</answer>"))


def reasoning_gym(answer: str, entry: Mapping[str, Any]) -> float:
    """The score that the reasoning-gym task gives, from 0 to 1, to what is in <answer> tags, or else to all of it.

    Raises:
      KeyError: if the prompt was not made by a reasoning-gym task.
    """
    found, made = TAGGED.findall(answer), entry["entry"]
    return float(_scorer(made["metadata"]["source_dataset"])(found[-1].strip() if found else answer, made))


BUILT_IN = {reward.__name__: reward for reward in (exact, gsm8k, tagged, reasoning_gym)}


def find(name: str) -> Reward:
    """The reward of a name; what it imports is imported here, so that its first call takes no longer than others.

    Args:
      name: one of `BUILT_IN`, or "module:function".

    Returns:
      The function.

    Raises:
      ValueError: there is none.
    """
    if name == "reasoning_gym":
        importlib.import_module("reasoning_gym")
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"reward {name!r} is not one of {', '.join(BUILT_IN)}; your own is 'module:function'")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever a user's module does
        raise ValueError(f"reward {name!r}: importing {module} fails: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ValueError(f"reward {name!r}: {module} has no function {function!r}")
    return found


def total(rewards: list[tuple[Reward, float]], answer: str, entry: Mapping[str, Any]) -> float:
    """Σ weight · reward(answer, entry).

    Raises:
      ValueError: if a reward is no finite number. And whatever a reward raises.
    """
    values = [(weight, reward(answer, entry)) for reward, weight in rewards]
    for _, value in values:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"the reward is {value!r}, not a finite number")
    return sum(weight * float(value) for weight, value in values)


@functools.cache
def _scorer(task: str) -> Callable[..., float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)


def _final_number(text: str) -> float | None:
    found = NUMBER.findall(text.rpartition("####")[2]) if "####" in text else NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None
