"""What a compiled program will take: bytes on each chip, what chips exchange, and the least time."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from train import hlo
from train.programs import Program, bytes_per_chip
from train.topology import Topology

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_TEMPORARIES = re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)")  # where these alone are too many
_HOST = re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) host")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TWICE = "all-reduce"  # scatters sums and gathers them: what it exchanges goes over the links twice


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one program on one mesh; bytes are those of one chip.

    Attributes:
      topology, chip: where it runs.
      chips: how many.
      mesh: their number along each axis that has more than one.
      bytes: by what they are for: the program's parts, then `activations` (kept for the backward pass), `temporaries`
        (all else that comes and goes) and `program` (its own code).
      arguments: bytes of the parts by the compiler's count; None where it ran out of memory.
      state: bytes that stay between two steps: all parts but the batch.
      peak: all of them.
      host: bytes of its host's memory that hold activations.
      room: what a chip has.
      collectives: by kind, how many run and their bytes; None where the compiler ran out of memory, or wrote a program
        that this JAX cannot read.
      flops: of products, on all chips together.
      seconds: the least that each of these takes: `compute`, `memory`, `links`, `host`, the way there and back; and
        `compiler`, its own estimate, without exchanges, where it gives one. Without what is not known.
      tokens: that the program goes through.
      compiled: seconds of this machine's processors that compiling took.
    """

    topology: str
    chip: str
    chips: int
    mesh: Mapping[str, int]
    bytes: Mapping[str, int]
    arguments: int | None
    state: int
    peak: int
    host: int
    room: int
    collectives: Mapping[str, hlo.Exchange] | None
    flops: int
    seconds: Mapping[str, float]
    tokens: int
    compiled: float

    @property
    def fits(self) -> bool:
        """Whether a chip has room for the peak."""
        return self.peak <= self.room

    @property
    def step(self) -> float | None:
        """The least seconds that the program takes; None where nothing is known of the chip."""
        return max(self.seconds.values()) if self.seconds else None

    @property
    def tokens_per_hour(self) -> float | None:
        """The most tokens in an hour."""
        return 3600 * self.tokens / self.step if self.step else None


def make(program: Program, mesh: Mesh, topology: Topology) -> Forecast:
    """Compiles a program.

    Args:
      program: from `programs`.
      mesh: what it was lowered for.
      topology: whose devices these are.

    Returns:
      The forecast. Where the compiler refuses for want of memory, it says what the program would take.

    Raises:
      ValueError: the host's memory is too small for what is kept there.
    """
    parts = {name: bytes_per_chip(tree, topology.platform == "tpu") for name, tree in program.parts.items()}
    began, chip, chips = time.process_time(), topology.chip, mesh.devices.size
    arguments = collectives = None
    code, host, moved, cycles, links = 0, 0, 0, 0, 0.0
    try:
        compiled = program.lowered.compile(topology.options)
    except jax.errors.JaxRuntimeError as error:
        peak = _refused(error, sum(parts.values()))
    else:
        memory, text = compiled.memory_analysis(), _text(compiled)
        arguments, code = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = arguments + new + memory.temp_size_in_bytes + code
        host = memory.host_temp_size_in_bytes
        moved = arguments + memory.output_size_in_bytes + memory.temp_size_in_bytes
        if text:
            collectives, cycles = text.collectives(), text.cycles()
            links = sum(exchange.bytes * (2 if kind == _TWICE else 1) for kind, exchange in collectives.items())
    held = sum(parts.values()) if arguments is None else arguments
    rest = max(0, peak - held - code)
    kept = min(program.kept, rest)
    amounts = {
        "compute": (program.flops / chips, chip.flops),
        "memory": (moved, chip.memory),
        "links": (links, chip.links),
        "host": (2 * program.away, chip.host),
        "compiler": (cycles, chip.hertz),
    }
    return Forecast(
        topology.name,
        chip.name,
        chips,
        {axis: size for axis, size in mesh.shape.items() if size > 1},
        {**parts, "activations": kept, "temporaries": rest - kept, "program": code},
        arguments,
        sum(size for name, size in parts.items() if name not in ("batch", "cache")),
        peak,
        host,
        chip.bytes,
        collectives,
        program.flops,
        {name: amount / most for name, (amount, most) in amounts.items() if amount and most},
        program.tokens,
        time.process_time() - began,
    )


def _text(compiled: Any) -> hlo.Program | None:
    """What was compiled; None where libtpu is newer than JAX and writes instructions that it does not know."""
    try:
        return hlo.Program(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        return None


def _refused(error: Exception, held: int) -> int:
    """The bytes that the compiler found a program to take beside what is held, or with it, from its refusal."""
    if found := _HOST.search(str(error)):
        raise ValueError(
            f"does not fit: {found[1]} of its host's memory for a chip, of {found[2]}; try another config.remat than "
            "'offload', or a smaller config.batch_size"
        ) from None
    for pattern, more in ((_USED, 0), (_TEMPORARIES, held)):
        if found := pattern.search(str(error)):
            return more + math.ceil(float(found[1]) * _UNITS[found[2]])
    raise error
