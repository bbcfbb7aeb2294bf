"""Starts a script: its config from the command line, and its mistakes in one line."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from lora_jax.tree import nearest
from train import help, hosts, loop
from train.config import Config

# What a user can cause. Anything else is a fault of the program, and shows where it happened.
MISTAKES = (ValueError, OSError, ArithmeticError)


def run(main: Callable[[Any], None], defaults: Callable[[], Config] | None = None) -> None:
    """Runs `main(argv)` as a script: a mistake is printed as one line, and the exit status is 1.

    A trainer, which has settings, may be run by several hosts.

    With `--verbosity=1` the line is followed by the place in the code.

    Args:
      main: of the script.
      defaults: makes the script's settings, for `--help`; None if it has flags alone.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; settings are written --config.name=value")
        quiet()
        if defaults:
            hosts.join()
        main(argv)
        hosts.leave()

    try:
        app.run(guarded, flags_parser=functools.partial(_parse, defaults))
    except Exception as error:
        if not (isinstance(error, MISTAKES) or hosts.lost(error)):
            raise
        fail(error)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from the last checkpoint")


def fail(error: BaseException) -> NoReturn:
    """Prints an error as one line and exits with status 1."""
    if logging.get_verbosity() > logging.INFO:
        traceback.print_exception(error)
    sys.stdout.flush()
    who = f"host {jax.process_index()}: " if hosts.several() else ""
    line = " ".join(str(error).split()) or type(error).__name__
    if hosts.lost(error):
        then = "see why, and the same command goes on from the last checkpoint"
        line = f"another host is gone or cannot be reached ({line}); {then}"
    print(f"error: {who}{line}", file=sys.stderr, flush=True)
    # Not sys.exit: the threads of a library whose write has failed would still print, or wait for ever.
    os._exit(1)


def quiet() -> None:
    """Compiled programs are kept for the next start, and libraries keep their remarks to themselves."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if logging.get_verbosity() <= logging.INFO:
        logging.set_verbosity(logging.FATAL)


def settings(flag: flags.FlagHolder) -> tuple[Config, str]:
    """The config a flag holds, the same on every host, and the name of its file without folder and ending."""
    hosts.agree(dict(loop.flat(flag.value.to_dict())), "config.")
    file = config_flags.get_config_filename(flags.FLAGS[flag.name])
    return flag.value, Path(file.partition(":")[0]).stem


def _parse(defaults: Callable[[], Config] | None, argv: list[str]) -> list[str]:
    file = next((match[1] for a in argv if (match := re.fullmatch(r"--?config=([^:]*).*", a))), None)
    asked = any(re.match("--?help", argument) for argument in argv)
    if "config" in flags.FLAGS and file is None and not asked:
        fail(ValueError("no config; give one, such as --config=configs/quickstart.py"))
    if file is not None and not Path(file).is_file():
        fail(FileNotFoundError(f"{file}: no such config file"))
    if asked:
        script = sys.modules["__main__"].__doc__ or ""
        text = help.text(script, defaults, _alone(file) if file else defaults()) if defaults else script.strip()
        print("\n\n".join(filter(None, [text, help.own_flags(["train.hosts"] if defaults else ["train.source"])])))
        sys.exit()
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(error)
    except (AttributeError, KeyError) as error:
        fail(ValueError(_unknown_key(argv, file) or f"{file}: {error}"))


def _unknown_key(argv: list[str], file: str | None) -> str | None:
    """Names the first setting on the command line that the config file does not have."""
    try:
        known = [name for name, _ in help.keys(_alone(file))]
    except (AttributeError, KeyError):  # the mistake is in the file
        return None
    for argument in argv:
        match = re.match(r"--?config\.([\w.]+)", argument)
        if match and match[1] not in known:
            return f"no setting config.{match[1]}; did you mean config.{nearest(match[1], known, 1).strip(chr(39))}?"
    return None


def _alone(file: str | None) -> Config:
    """The config of a file, without what the command line says."""
    alone = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=[])
    alone(["", f"--config={file}"])
    return config.value
