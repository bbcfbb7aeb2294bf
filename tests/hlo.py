"""Reads the text of a compiled XLA program: what it computes, and how often."""

import dataclasses
import math
import re
from collections.abc import Iterator

# Instructions that move an array or hand it on, and compute nothing.
PLUMBING = re.compile(
    r"(parameter|get-tuple-element|tuple|bitcast|copy|transpose|reshape|convert|slice|dynamic-slice|while|call"
    r"|conditional|fusion|optimization-barrier|(copy|slice|async|fusion)-(start|update|done))$"
)
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shapes opcode(operands), attributes`; a tuple has several shapes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = [name.strip(" %") for group in _BRANCHES.findall(self.attributes) for name in group.split(",")]
        return _CALLS.findall(self.attributes) + branches

    @property
    def trips(self) -> int:
        """How often a `while` runs its body; 1 for everything else."""
        found = _TRIPS.search(self.attributes)
        assert found or self.opcode != "while", f"the trip count of {self.name} is not known"
        return int(found[1]) if found else 1

    def axes(self, name: str) -> list[int]:
        """An attribute that lists axes."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return [int(axis) for axis in found[1].split(",") if axis] if found else []


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each of them instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def __iter__(self) -> Iterator[tuple[Instruction, list[Instruction]]]:
        """Every instruction, and those that it takes its operands from."""
        for instructions in self.computations.values():
            for instruction in instructions.values():
                yield instruction, [instructions[name] for name in instruction.operands if name in instructions]

    def flops(self) -> int:
        """Multiplications and additions in all `dot`s, those of a loop's body as often as it runs."""
        return self._flops(self.entry)

    def _flops(self, name: str) -> int:
        total = 0
        for instruction in self.computations[name].values():
            if instruction.opcode == "dot":
                (lhs,) = self.computations[name][instruction.operands[0]].shapes
                contracted = math.prod(lhs[axis] for axis in instruction.axes("lhs_contracting_dims"))
                total += 2 * math.prod(instruction.shapes[0]) * contracted
            if instruction.called:
                total += instruction.trips * sum(self._flops(called) for called in instruction.called)
        return total

    def computed(self, sizes: set[int], tokens: int = 0) -> list[Instruction]:
        """Instructions, within fusions and loops too, that compute an array of so many elements.

        Args:
          sizes: numbers of elements.
          tokens: an array with an axis of this size is data, whatever its size.
        """
        return [
            instruction
            for instruction, operands in self
            if any(math.prod(shape) in sizes and tokens not in shape for shape in instruction.shapes)
            and not _moves(instruction, operands)
        ]


def _moves(instruction: Instruction, operands: list[Instruction]) -> bool:
    if instruction.opcode == "reduce":  # over axes of size 1 it is a reshape
        return math.prod(instruction.shapes[0]) == math.prod(operands[0].shapes[0])
    return bool(PLUMBING.match(instruction.opcode)) or "ConcatBitcast" in instruction.attributes


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` returns."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    shape, rest = _split(line[head.end() :], " ")
    opcode, rest = rest.split("(", 1)
    operands, attributes = _split("(" + rest, ",")
    shapes = re.findall(r"\b[a-z]\w*\[([\d,<=]*)\]", shape)
    return Instruction(
        head[1],
        tuple(tuple(int(n.lstrip("<=")) for n in dims.split(",") if n) for dims in shapes),
        opcode.strip(),
        tuple(re.findall(r"%?([\w.\-]+)(?=[,)])", re.sub(r"/\*.*?\*/", "", operands))),
        attributes,
    )


def _split(text: str, mark: str) -> tuple[str, str]:
    """The text up to the first mark outside brackets, and what follows it."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == mark and not depth:
            return text[:i], text[i + 1 :]
    return text, ""
