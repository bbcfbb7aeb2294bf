"""What a compiled program does, by its text: what chips exchange, and a TPU compiler's estimate of the time."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# name = shape opcode(operands), attributes; a tuple's shape is in brackets.
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SOURCE = re.compile(r'\bop_name="([^"]*)"')
_ENDLESS = 2**50  # days: what the compiler says of an instruction whose cycles it does not know
_SHAPE = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
      opcode: what it does.
      bytes: of its results.
      operands: the names of its operands.
      called: the computations that it runs.
      condition: the computation that ends a loop.
      trips: how often it runs, where it says so.
      channel: of a collective; its parts have the same, and all those of `shard_map`s.
      source: the operation of the program that it is of.
      cycles: the compiler's estimate; 0 where it gives none.
      constant: what it is; 0 for what is no whole number.
    """

    opcode: str
    bytes: int
    operands: tuple[str, ...]
    called: tuple[str, ...]
    condition: str
    trips: int | None
    channel: str
    source: str
    cycles: int
    constant: int


class Exchange(NamedTuple):
    """Collectives of a kind: how many run in a step, and the larger of the bytes that each chip gives and gets."""

    count: int
    bytes: int


class Program:
    """The text of a compiled program, as `compiled.as_text()` gives it."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                current = self._computations.setdefault(head[2], {})
                self._entry = head[2] if head[1] else getattr(self, "_entry", head[2])
            elif found := _LINE.match(line):
                name, shape, opcode, rest = found.groups()
                current[name] = _instruction(shape, opcode, rest)

    def collectives(self) -> dict[str, Exchange]:
        """What chips exchange in a step, those in a loop as often as it runs."""
        found, seen = dict.fromkeys(KINDS, Exchange(0, 0)), set()
        for computation, instruction, times in self._run(self._entry, 1):
            kind = re.sub(r"-start$", "", instruction.opcode)
            given = sum(computation[name].bytes for name in instruction.operands if name in computation)
            got = instruction.bytes - (given if instruction.opcode.endswith("-start") else 0)
            which = instruction.channel, kind, got, instruction.source
            if kind not in found or (instruction.channel and which in seen):
                continue
            seen.add(which)
            found[kind] = Exchange(found[kind].count + times, found[kind].bytes + times * max(given, got))
        return {kind: exchange for kind, exchange in found.items() if exchange.count}

    def cycles(self) -> int:
        """The sum of the compiler's estimates; 0 if it gives none, or cannot tell of an instruction.

        Exchanges between chips are not in it, and of several branches only the cheapest: others are for what is rare,
        such as more rows for an expert than it has room for.
        """
        cycles = self._cycles(self._entry)
        return 0 if cycles > _ENDLESS else cycles

    def _cycles(self, name: str) -> int:
        total = 0
        for instruction in self._computations[name].values():
            inside = () if re.match("fusion|async-", instruction.opcode) else map(self._cycles, instruction.called)
            several = min(inside) if instruction.opcode == "conditional" else sum(inside)
            total += instruction.cycles + self._trips(instruction) * several
        return total

    def _run(self, name: str, times: int) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
        """Every instruction that runs, its computation, and how often."""
        computation = self._computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            for called in instruction.called:
                yield from self._run(called, times * self._trips(instruction))

    def _trips(self, instruction: Instruction) -> int:
        """How often a loop runs: a TPU's does not say it, and counts from 0 to the constant in its condition."""
        if instruction.opcode != "while" or instruction.trips:
            return instruction.trips or 1
        return max(found.constant for found in self._computations[instruction.condition].values()) or 1


def _instruction(shape: str, opcode: str, rest: str) -> Instruction:
    operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
    called = () if re.search("-(done|update)$", opcode) else tuple(_called(rest))
    patterns = _CHANNEL, _SOURCE, _CONDITION, _TRIPS, _CYCLES
    channel, source, condition, trips, cycles = (pattern.search(rest) for pattern in patterns)
    number = re.match(r"(\d+)\)", rest) if opcode == "constant" else None
    return Instruction(
        opcode,
        _bytes(shape),
        tuple(operands),
        called,
        condition[1] if condition else "",
        int(trips[1]) if trips else None,
        channel[1] if channel else "",
        source[1] if source else "",
        int(cycles[1]) if cycles else 0,
        int(number[1]) if number else 0,
    )


def _called(rest: str) -> Iterator[str]:
    yield from _CALLS.findall(rest)
    for group in _BRANCHES.findall(rest):
        yield from (name.strip(" %") for name in group.split(","))


def _bytes(shape: str) -> int:
    """Of an array or a tuple of arrays; the layouts in braces are left out of it."""
    total = 0
    for kind, bits, sizes in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape)):
        elements = math.prod(int(size) for size in sizes.split(",") if size)
        total += math.ceil(elements * (8 if kind == "pred" else int(bits)) / 8)
    return total
