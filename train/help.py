"""What `--help` prints: every setting with its value and its meaning."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from train import config as settings


def text(script: str, defaults: Callable[[], Any], config: Any) -> str:
    """The help of a script.

    Args:
      script: what it does, in words.
      defaults: makes its settings; its source says what they mean.
      config: the settings to list.

    Returns:
      Lines of at most 120 characters, where names and values are short.
    """
    explained = meanings(inspect.getsource(settings), inspect.getsource(inspect.getmodule(defaults)))
    rows = [(f"--config.{name}", _short(value), _find(explained, name)) for name, value in keys(config)]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{name:<{first}}  {value:<{second}}  {meaning}".rstrip() for name, value, meaning in rows]
    return "\n".join([script.strip(), "", "Settings, as --config.NAME=VALUE:", "", *lines])


def keys(config: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of settings, with their values."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from keys(value, f"{before}{name}.")
        else:
            yield before + name, value


def meanings(*sources: str) -> dict[str, str]:
    """What settings mean: the comments beside them where their defaults are written.

    Args:
      sources: Python, with `config.GROUP = {` or `config.GROUP.update(` before the lines of a group.

    Returns:
      By dotted name.
    """
    found, group = {}, ""
    for line in "\n".join(sources).splitlines():
        if match := re.match(r"\s*config(\.\w+)?( = |\.update\()", line):
            group = f"{match[1][1:]}." if match[1] else ""
        elif match := re.match(r'\s*"(\w+)": .*,  # (.*)', line):
            found[group + match[1]] = match[2]
    return found


def _find(explained: dict[str, str], name: str) -> str:
    """The meaning of a setting, or of the group that it is in."""
    while name and name not in explained:
        name = name.rpartition(".")[0]
    return explained.get(name, "")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 24 else f"{shown[:23]}…"
