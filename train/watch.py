"""What a run watches: whether a step went wrong, which evaluation was the best, and whether it was asked to stop."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

from jax.experimental import multihost_utils

from train import hosts

WARM, MEMORY, IN_A_ROW = 20, 0.95, 10


class Guard:
    """Finds steps that went wrong. A spike is a loss > m + k·s over the running mean m and deviation s of good losses.

    The mean and deviation are exponential ones (0.95), and judged by after 20 losses.

    Args:
      spike: k; 0 looks for what is no number alone.
      skip: whether such a step is undone, and the run goes on; ten in a row end it all the same.
    """

    def __init__(self, spike: float, skip: bool):
        self.spike, self.skip = spike, skip
        self.seen, self.mean, self.variance = 0, 0.0, 0.0
        self.skipped = self.row = 0

    def state(self) -> dict[str, Any]:
        """What has been seen so far, as JSON."""
        return {name: getattr(self, name) for name in ("seen", "mean", "variance", "skipped", "row")}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state()`."""
        vars(self).update(state)

    def judge(self, numbers: dict[str, float]) -> str | None:
        """What is wrong with a step; None if nothing is.

        Args:
          numbers: of the step, `loss` among them.

        Returns:
          A few words with the numbers in question.
        """
        loss, limit = numbers["loss"], self.mean + self.spike * math.sqrt(self.variance)
        if not all(map(math.isfinite, numbers.values())):
            odd = {"loss": loss} | {name: value for name, value in numbers.items() if not math.isfinite(value)}
            return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in odd.items())
        if self.spike and self.seen >= WARM and loss > limit:
            return f"loss {loss:.4g} is a spike (above {limit:.4g}; the mean is {self.mean:.4g})"
        weight = max(1 - MEMORY, 1 / (self.seen + 1))
        change = loss - self.mean
        self.mean += weight * change
        self.variance = (1 - weight) * (self.variance + weight * change**2)
        self.seen, self.row = self.seen + 1, 0
        return None

    def undo(self) -> bool:
        """Counts a step that went wrong; returns whether the run may go on without it."""
        self.skipped, self.row = self.skipped + 1, self.row + 1
        return self.skip and self.row < IN_A_ROW


def check_first(numbers: dict[str, float]) -> None:
    """Raises ValueError if a run's first step moves nothing: its loss has no gradient."""
    if numbers["loss"] and numbers.get("gradient_norm") == 0:
        raise ValueError(
            f"step 1: the loss is {numbers['loss']:.4g}, and no gradient reaches what is trained: nothing would be "
            "learned; choose other targets, or factors of which one does not start at zero"
        )


class Best:
    """The best evaluation so far, and whether there was none better for long.

    Args:
      metric: a name of the evaluation's numbers.
      higher: whether more of it is better.
      patience: how many evaluations in a row may be no better than the best before a run ends; 0: any number.
    """

    def __init__(self, metric: str, higher: bool, patience: int):
        self.metric, self.higher, self.patience = metric, higher, patience
        self.step, self.score, self.since = -1, -math.inf, 0

    def state(self) -> dict[str, Any]:
        """What has been seen so far, as JSON."""
        return {"step": self.step, "score": self.score, "since": self.since}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state()`."""
        vars(self).update(state)

    def see(self, step: int, numbers: dict[str, float]) -> float:
        """Takes note of an evaluation; returns its score, of which more is better.

        Raises:
          ValueError: if it lacks the metric; names those it has.
        """
        if self.metric not in numbers:
            raise ValueError(f"config.eval.best={self.metric!r} is not measured; what is: {', '.join(numbers)}")
        score = numbers[self.metric] if self.higher else -numbers[self.metric]
        score = -math.inf if math.isnan(score) else score
        if score > self.score:
            self.step, self.score, self.since = step, score, 0
        else:
            self.since += 1
        return score

    def enough(self) -> bool:
        """Whether patience has come to an end."""
        return 0 < self.patience <= self.since


class Asked:
    """Whether the process was asked to stop."""

    noted, times = False, 0

    def here(self) -> bool:
        """Whether to stop here: of several hosts all do at the same place, whichever was asked.

        To be called before the first step and after every one.
        """
        self.times += 1
        # JAX's hosts stop at the number after their highest: one that begins at 1 everywhere is never passed over.
        return multihost_utils.reached_preemption_sync_point(self.times) if hosts.several() else self.noted


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Within it, SIGTERM, as sent before a machine is taken away, does not end the process but is noted."""
    asked = Asked()

    def note(*_: Any) -> None:
        asked.noted = True

    # The main thread alone may say what signals do; where there are several hosts, JAX does.
    if threading.current_thread() is not threading.main_thread() or hosts.several():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
