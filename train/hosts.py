"""Several hosts that run one training: how they begin, what they agree on, what each reads, and how they part.

All run the same command. What is printed and written, the first one prints and writes.
"""

import contextlib
import datetime
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from lora_jax import sharding
from train import meeting

COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of the first of several hosts, any free port of it")
PROCESSES = flags.DEFINE_integer("processes", 0, "how many hosts there are; 0: as the cluster says", lower_bound=0)
PROCESS = flags.DEFINE_integer("process", -1, "which of them this is, from 0; -1: as the cluster says", lower_bound=-1)
ARRIVAL = flags.DEFINE_integer("arrival", 300, "seconds to wait for all of them", lower_bound=1)
DISTRIBUTED = flags.DEFINE_boolean("distributed", False, "there are several hosts, and the cluster says which")

SEEN = 60  # seconds until what one host writes is there for all; NFS looks again after 30

Tree = Any


def join() -> None:
    """Begins as one of several hosts, if the flags or a cluster's environment say so; otherwise does nothing.

    Raises:
      ValueError: if the flags say half of it, or nothing knows the rest.
      TimeoutError: if a host never arrives.
    """
    given = COORDINATOR.value, PROCESSES.value, PROCESS.value
    if given == ("", 0, -1) and not DISTRIBUTED.value and not _detected(os.environ):
        return
    try:
        address, count, number = _found(*given)
    except (ValueError, RuntimeError) as error:
        raise _cannot(error) from None
    if address and count and number is not None:
        if number >= count:
            raise ValueError(f"--process={number}: with --processes={count} it is one of 0 to {count - 1}")
        meeting.wait(address, count, number, ARRIVAL.value)
    try:
        jax.distributed.initialize(address, count, number, initialization_timeout=ARRIVAL.value)
    except (ValueError, RuntimeError) as error:
        raise _cannot(error) from None
    if not first():
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _found(coordinator: str, processes: int, process: int) -> tuple[str | None, int | None, int | None]:
    """The first host's address, how many there are and which this is: what flags leave open, as JAX finds it out."""
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = address, processes or None, process if process >= 0 else None
    if None not in given:
        return given
    # JAX has no public way to ask. Where this one is gone, it begins all the same, but nobody says who does not come.
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        from jax._src.clusters import ClusterEnv

        return ClusterEnv.auto_detect_unset_distributed_params(*given, None, None, ARRIVAL.value)[:3]
    return given


def _cannot(error: Exception) -> ValueError:
    return ValueError(
        f"several hosts cannot begin ({' '.join(str(error).split())}); start all of them, or give --coordinator, "
        "--processes, --process"
    )


def _detected(environment: Mapping[str, str]) -> bool:
    """Whether a cluster's launcher started this as one of several: SLURM's srun, GKE or XPK on TPUs, JAX's own."""
    return (
        ("SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1)
        or any("," in environment.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
        or "JAX_COORDINATOR_ADDRESS" in environment
    )


def leave() -> None:
    """Waits for the others at the end: none goes before all are done."""
    if several():
        multihost_utils.sync_global_devices("done")
        jax.distributed.shutdown()


def several() -> bool:
    """Whether there are others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def lost(error: BaseException) -> bool:
    """Whether an error is that of an exchange with a host that is gone: those who exchange for JAX say so in words."""
    return several() and re.search(r"Gloo|NCCL|by peer|UNAVAILABLE|barrier|heartbeat", str(error)) is not None


def first() -> bool:
    """Whether this is the one that writes."""
    return not several() or jax.process_index() == 0


def agree(values: Mapping[str, Any], what: str) -> None:
    """Compares what must be the same on every host.

    Args:
      values: JSON by name.
      what: they are, such as "config."; stands before a name.

    Raises:
      ValueError: on every host, naming the first that differs, and where.
    """
    if not several():
        return
    mine = json.dumps(values, default=str).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    one, *others = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    for host, other in enumerate(others, 1):
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                raise ValueError(
                    f"{what}{name} is {one.get(name)!r} on host 0 and {other.get(name)!r} on host {host}; "
                    "start all of them with the same command and the same files"
                )


def share(folder: Path) -> None:
    """Finds a run's folder that is another one on another host: what one of them writes, all must see.

    Args:
      folder: of the run; made if it is not there.

    Raises:
      ValueError: on every host, naming those that do not see it.
    """
    if not several():
        return
    mark = folder / f".seen-{told(lambda: secrets.token_hex(4))}"  # no host has looked for this name before
    if first():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    multihost_utils.sync_global_devices("written")
    deadline = time.monotonic() + SEEN
    while not mark.is_file() and time.monotonic() < deadline:
        time.sleep(1)
    seen = multihost_utils.process_allgather(np.bool_(mark.is_file()))
    if first():
        mark.unlink()
    if missing := ", ".join(f"host {host}" for host in np.flatnonzero(~seen)):
        raise ValueError(
            f"config.run={folder}: {missing} cannot see what host 0 writes there ({folder.absolute()} here); "
            "give a folder of a file system that all hosts share"
        )


def told(make: Callable[[], Any]) -> Any:
    """What the first host makes, for all: JSON where there are several."""
    if not several():
        return make()
    text = np.frombuffer(json.dumps(make()).encode() if first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def moment(own: datetime.datetime) -> datetime.datetime:
    """The first host's time, without fractions of a second, for all."""
    if not several():
        return own
    since = own - datetime.datetime.min
    days, seconds = multihost_utils.broadcast_one_to_all(np.array([since.days, since.seconds], np.int32))
    return datetime.datetime.min + datetime.timedelta(int(days), int(seconds))


def whole(tree: Tree) -> Tree:
    """Arrays that are divided over hosts as NumPy arrays, on every host."""
    return multihost_utils.process_allgather(tree, tiled=True) if several() else tree


def part(batch_size: int) -> slice:
    """The rows of a batch that devices of this host hold, on the mesh in context; all where there is one host."""
    if not several():
        return slice(0, batch_size)
    bounds = [index[0].indices(batch_size) for index in _rows().addressable_devices_indices_map((batch_size,)).values()]
    return slice(min(start for start, *_ in bounds), max(stop for _, stop, _ in bounds))


class Joined:
    """Batches of which every host makes a part, as arrays of all of them.

    Args:
      batches: of this host's `part` of the rows, with a place that is the same on every host.
      batch_size: rows of all.
    """

    def __init__(self, batches: Any, batch_size: int):
        self._batches, self._size = batches, batch_size
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __iter__(self) -> Iterator[Tree]:
        return self

    def __next__(self) -> Tree:
        """The next batch."""
        batch = next(self._batches)
        return jax.tree.map(self._join, batch) if several() else batch

    def _join(self, x: np.ndarray) -> jax.Array:
        begin = part(self._size).start

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(self._size)
            return x[start - begin : stop - begin]

        return jax.make_array_from_callback((self._size, *x.shape[1:]), _rows(), rows)


def _rows() -> jax.sharding.NamedSharding:
    return sharding.rows(jax.sharding.get_mesh())
