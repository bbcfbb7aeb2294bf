"""What `--help` prints: every setting and flag with its value and its meaning."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
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
    return "\n".join([script.strip(), "", "Settings, as --config.NAME=VALUE:", "", *_table(rows)])


def own_flags(modules: Sequence[str]) -> str:
    """The help of the flags that a script has besides settings; "" where it has none.

    Args:
      modules: that define them, besides the script itself.
    """
    known = flags.FLAGS.flags_by_module_dict()
    found = [flag for name in (sys.argv[0], *modules) for flag in known.get(name, ()) if flag.name != "config"]
    rows = [(f"--{flag.name}", _short(flag.default), flag.help) for flag in found]
    return "\n".join(["Flags, as --NAME=VALUE:", "", *_table(rows)]) if rows else ""


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


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"{name:<{first}}  {value:<{second}}  {meaning}".rstrip() for name, value, meaning in rows]


def _find(explained: dict[str, str], name: str) -> str:
    """The meaning of a setting, or of the group that it is in."""
    while name and name not in explained:
        name = name.rpartition(".")[0]
    return explained.get(name, "")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 24 else f"{shown[:23]}…"
