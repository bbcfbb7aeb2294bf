"""Traces of some steps, for TensorBoard or Perfetto."""

import contextlib
import re
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"


def steps(text: str) -> range:
    """The steps that are asked for.

    Args:
      text: "10:13" for the steps 10 to 13; "" for none.

    Raises:
      ValueError: it is something else.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise ValueError(f"config.profile={text!r} is not FIRST:LAST, such as '10:13' for the steps 10 to 13")
    return range(int(match[1]), int(match[2]) + 1)


class Profile:
    """Captures a trace of some steps of a run into its folder.

    Args:
      text: which steps, as `steps` reads it.
      folder: of the run.
    """

    def __init__(self, text: str, folder: Path):
        self.steps, self.folder, self.going = steps(text), folder / FOLDER, False
        self._marked = contextlib.ExitStack()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """A step begins."""
        if step in self.steps:
            if not self.going:
                jax.profiler.start_trace(self.folder)
                self.going = True
            self._marked.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def end(self, step: int) -> None:
        """A step has ended, on the device too."""
        self._marked.close()
        if step + 1 not in self.steps:
            self._stop()

    def _stop(self) -> None:
        self._marked.close()
        if self.going:
            jax.profiler.stop_trace()
            self.going = False
            print(
                f"profile of steps {self.steps[0]} to {self.steps[-1]}: {self.folder}; see it with "
                f"`xprof --logdir={self.folder}` (pip install xprof), or its .trace.json.gz on ui.perfetto.dev",
                flush=True,
            )
