"""Runs rewards in processes of their own, so that one that hangs or crashes costs one answer.

python -m train.judge '[["gsm8k", 1.0]]'   reads pickled (answer, entry) pairs, writes pickled Scores: a worker
"""

import concurrent.futures
import contextlib
import json
import os
import pickle
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from train import rewards

Named = Sequence[tuple[str, float]]


class Score(NamedTuple):
    """What an answer is worth: NaN where its reward failed, and why it did."""

    value: float
    failure: str = ""


class Judges:
    """Workers that judge answers, several at once; a context manager.

    Args:
      named: names of rewards, as `rewards.find` takes them, and their weights.
      limit: seconds that an answer may take. Then its worker is ended, and another started in its place.
      workers: how many processes.

    Raises:
      ValueError: there is no reward of a name.
    """

    def __init__(self, named: Named, limit: float, workers: int):
        for name, _ in named:
            rewards.find(name)  # here already: a worker could only say that it ended
        self.named, self.limit = [list(pair) for pair in named], limit
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = concurrent.futures.ThreadPoolExecutor(workers)
        for _ in range(workers):
            self._idle.put(_Worker(self.named))

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().end()

    def __call__(self, answers: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> list[Score]:
        """Judges every answer to its entry.

        Raises:
          ValueError: if every one fails.
        """
        scores = list(self._threads.map(self._one, answers, entries))
        if scores and all(score.failure for score in scores):
            names = ", ".join(name for name, _ in self.named)
            raise ValueError(f"reward {names}: fails for all of {len(scores)} answers, first with: {scores[0].failure}")
        return scores

    def _one(self, answer: str, entry: Mapping[str, Any]) -> Score:
        worker = self._idle.get()
        try:
            score = worker.ask((answer, entry), self.limit)
        except TimeoutError:
            score = Score(float("nan"), f"took longer than {self.limit:g} s")
        except (EOFError, OSError, pickle.UnpicklingError):
            score = Score(float("nan"), f"its process ended with status {worker.end()}")
        except Exception as error:  # an entry that cannot be sent
            score = Score(float("nan"), _said(error))
        else:
            self._idle.put(worker)
            return score
        worker.end()
        self._idle.put(_Worker(self.named))
        return score


class _Worker:
    """A process that judges one answer at a time."""

    def __init__(self, named: Named):
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train.judge", json.dumps(named)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
        )
        self.ready = False

    def ask(self, pair: tuple[str, Mapping[str, Any]], limit: float) -> Score:
        """Sends a pair and waits for its score; importing the rewards does not count."""
        source, sink = self.process.stdout, self.process.stdin
        assert source and sink
        if not self.ready:
            self.ready = pickle.load(source)
        sink.write(pickle.dumps(pair))
        sink.flush()
        if not select.select([source], [], [], limit)[0]:
            raise TimeoutError
        return Score(*pickle.load(source))

    def end(self) -> int:
        """Ends the process, whatever it does; returns its status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(OSError):  # what was not yet sent has nowhere to go
                pipe.close()
        return status


def work(source: BinaryIO, sink: BinaryIO, named: Named) -> None:
    """Judges what it reads until there is no more."""
    found = [(rewards.find(name), weight) for name, weight in named]
    pickle.dump(True, sink)
    sink.flush()
    while True:
        try:
            answer, entry = pickle.load(source)
        except EOFError:
            return
        try:
            score = (rewards.total(found, answer, entry),)
        except Exception as error:  # whatever a user's function does
            score = (float("nan"), _said(error))
        pickle.dump(score, sink)
        sink.flush()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _leave_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, even if a reward hangs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as sink:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a reward prints is no answer
        work(sys.stdin.buffer, sink, json.loads(sys.argv[1]))
