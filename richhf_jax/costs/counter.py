"""Counts the FLOPs, bytes and collectives of a program from XLA's text of it.

XLA's own `compiled.cost_analysis()` counts a loop's body once. This module multiplies it by the number of
trips. Otherwise it follows XLA's rules (`HloCostAnalysis`): a multiply-add is 2 FLOPs; a convolution counts
the positions where kernel and input meet; an elementwise operation is 1 FLOP an element; a transcendental one
is 0, because XLA counts these separately. It takes optimised text (`compiled.as_text()`, for one device of
the mesh) and unoptimised text (`lowered.as_text(dialect="hlo")`, for the whole mesh).
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import jax

from richhf_jax.costs import hlo

_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# These operations only name values; they compute and move nothing.
_FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "get-dimension-size", "get-tuple-element",
    "opt-barrier", "optimization-barrier", "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# Trips that a loop makes at the limit itself: none with `counter < limit`, one with `<=`.
_TRIPS_AT_THE_LIMIT = {"LT": 0, "GT": 0, "LE": 1, "GE": 1}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Transfers of one kind between devices.

    Attributes:
      count: number of transfers.
      bytes: bytes of the whole arrays, after a gather, or before they are reduced, split or sent.
      sent_bytes: bytes that a device sends at least. With n devices this is (n-1)/n of `bytes`, and twice as
        much for an all-reduce (a reduce-scatter and an all-gather).
    """

    count: float = 0
    bytes: float = 0
    sent_bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one run of a program, or of a part of it, for a device.

    Attributes:
      flops: floating-point operations, counted as the module says.
      bytes_accessed: bytes of operands and results of every operation outside fusions, in the device's main
        memory (a TPU's on-chip arrays don't count). A slice counts only the bytes that it reads or writes.
      collectives: kind -> transfers between devices.
      uncounted_loops: names of loops whose number of trips is unknown; their bodies count once.
    """

    flops: float = 0
    bytes_accessed: float = 0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)
    uncounted_loops: tuple[str, ...] = ()


def analyze(hlo_text: str) -> Costs:
    """Counts the costs of a program.

    A loop's number of trips is XLA's `known_trip_count`, or the constant that its condition compares the
    counter with. That is an upper bound for a loop that may end early, such as decoding. A conditional counts
    as its branch with the most FLOPs.

    Args:
      hlo_text: XLA's text. Optimised text gives the costs of one device. Unoptimised text gives those of all
        devices together; it has no collectives yet.

    Raises:
      ValueError: the text is no HLO module.
    """
    return _Program(hlo_text).costs()


def model_flops(forward: jax.stages.Lowered, training: bool = False) -> float:
    """Counts the FLOPs of the model's mathematics for a whole batch, without recomputation.

    Args:
      forward: a forward pass, not compiled: the step "eval" or "predict".
      training: whether to add the backward pass, which takes twice as many FLOPs (PaLM, arXiv:2204.02311,
        appendix B).
    """
    return analyze(forward.as_text(dialect="hlo")).flops * (3 if training else 1)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Arrays of one shape that one line of the model makes.

    Attributes:
      bytes: size of one array.
      shape: type and shape, such as "f32[8,16]".
      made_by: jax's name of the line, or an argument's name.
      count: number of such arrays, alive at different times or at once.
    """

    bytes: int
    shape: str
    made_by: str
    count: int


def largest_buffers(hlo_text: str, limit: int = 10) -> list[Buffer]:
    """Returns the largest arrays in a device's main memory, the largest first; not all live at once.

    Args:
      hlo_text: XLA's optimised text.
      limit: number of kinds of arrays.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations, _ = hlo.parse(hlo_text)
    called = (_called_name(i) for c in computations.values() for i in c.values() if i.opcode == "fusion")
    counts: collections.Counter[tuple[int, str, str]] = collections.Counter()
    for name in computations.keys() - set(called):
        for instruction in computations[name].values():
            line = re.search(r'op_name="([^"]*)"', instruction.rest)
            opcode = instruction.opcode
            if opcode == "parameter" and line:
                opcode = "argument"  # of the whole program
            if opcode in (*_FREE, "while", "call", "conditional") or opcode.endswith(("-done", "-update")):
                continue
            made_by = line[1] if line else instruction.name
            for array in hlo.arrays(instruction.shape):
                if array.in_main_memory:
                    counts[array.bytes, array.name, made_by] += 1
    largest = sorted(counts, reverse=True)[:limit]
    return [Buffer(*key, counts[key]) for key in largest]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A call of a computation, which tells where its parameters come from.

    Attributes:
      computation: the called computation.
      caller: the call that contains this one; None for the program's entry.
      arguments: the arguments' names in `caller`.
      loop_body: the loop's body, if this is a loop's body or condition.
    """

    computation: hlo.Computation
    caller: "_Frame | None" = None
    arguments: tuple[str, ...] = ()
    loop_body: hlo.Computation | None = None


class _Program:
    """An HLO module with cached counts."""

    def __init__(self, text: str):
        self._computations, self._entry = hlo.parse(text)
        header = text[: text.find("\n")]
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
        self._num_devices = math.prod(int(count) for count in counts)
        # These caches live as long as the object, not as long as the class.
        self._fused_flops = functools.cache(self._count_fused_flops)
        self._parameter_bytes = functools.cache(self._count_parameter_bytes)
        self._root_bytes = functools.cache(self._count_root_bytes)
        self._users = functools.cache(self._find_users)

    def costs(self) -> Costs:
        return self._of(_Frame(self._computations[self._entry]))

    def _of(self, frame: _Frame) -> Costs:
        """Counts the costs of a computation that isn't fused."""
        channels: set[str] = set()
        parts = []
        for instruction in frame.computation.values():
            if instruction.opcode == "while":
                parts.append(self._loop(instruction, frame))
            elif instruction.opcode in ("call", "async-start"):
                parts.append(self._of(_Frame(self._called(instruction), frame, instruction.operands)))
            elif instruction.opcode == "conditional":
                parts.append(self._conditional(instruction, frame))
            else:
                flops = self._flops(instruction, frame.computation)
                parts.append(Costs(flops, self._bytes(instruction, frame.computation)))
                for kind, one in self._collectives(instruction, frame.computation, channels):
                    parts.append(Costs(collectives={kind: one}))
        return _sum(parts)

    def _called(self, instruction: hlo.Instruction) -> hlo.Computation:
        return self._computations[_called_name(instruction)]

    def _conditional(self, instruction: hlo.Instruction, frame: _Frame) -> Costs:
        names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.rest)
        names = names or re.findall(r"[\w.\-]+", instruction.attribute("branch_computations"))
        branches = [
            self._of(_Frame(self._computations[name], frame, (operand,)))
            for name, operand in zip(names, instruction.operands[1:], strict=True)
        ]
        return max(branches, key=lambda branch: (branch.flops, branch.bytes_accessed))

    # --- Loops -------------------------------------------------------------------------------------------

    def _loop(self, loop: hlo.Instruction, frame: _Frame) -> Costs:
        body = self._computations[loop.attribute("body")]
        inside = _Frame(body, frame, loop.operands, body)
        trips = self._trips(loop, inside)
        once = self._of(inside)
        if trips is None:
            return dataclasses.replace(once, uncounted_loops=(loop.name, *once.uncounted_loops))
        return _times(once, trips)

    def _trips(self, loop: hlo.Instruction, inside: _Frame) -> int | None:
        if known := _KNOWN_TRIPS.search(loop.rest):
            return int(known[1])
        condition = dataclasses.replace(inside, computation=self._computations[loop.attribute("condition")])
        bounds = []
        for frame, compare in self._comparisons(condition):
            direction = compare.attribute("direction")
            counter, limit = compare.operands[:: -1 if direction in ("GT", "GE") else 1]
            end = self._scalar(frame, limit)
            # jax's counters rise by 1, from 0 if no other start is known.
            start = self._scalar(frame, counter, initially=True) or 0
            if end is not None and direction in _TRIPS_AT_THE_LIMIT:
                bounds.append(max(0, end - start + _TRIPS_AT_THE_LIMIT[direction]))
        return min(bounds, default=None)

    def _comparisons(self, frame: _Frame) -> Iterator[tuple[_Frame, hlo.Instruction]]:
        """Yields the comparisons of single whole numbers in a loop's condition."""
        for instruction in frame.computation.values():
            if instruction.opcode in ("fusion", "call"):
                yield from self._comparisons(_Frame(self._called(instruction), frame, instruction.operands))
            elif instruction.opcode == "compare":
                compared = frame.computation[instruction.operands[0]].shape
                if re.match(r"[su]\d+\[\]", compared):
                    yield frame, instruction

    def _scalar(
        self, frame: _Frame, name: str, index: int | None = None, initially: bool = False
    ) -> int | None:
        """Returns the whole number that a name stands for, if it is a constant, else None.

        Args:
          frame: the call in which the name stands.
          name: the instruction's name.
          index: element of the instruction's tuple; None: it is no tuple.
          initially: whether a value that a loop changes may be taken as it is before the first trip.
        """
        instruction = frame.computation[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            value = re.match(r"-?\d+(?=\))", instruction.rest)
            return int(value[0]) if value else None
        if opcode in ("copy", "bitcast", "convert", "reshape"):
            return self._scalar(frame, operands[0], index, initially)
        if opcode == "get-tuple-element":
            return self._scalar(frame, operands[0], int(instruction.attribute("index")), initially)
        if opcode == "tuple" and index is not None:
            return self._scalar(frame, operands[index], None, initially)
        if opcode == "parameter" and frame.caller:
            if frame.loop_body and not initially and not _passes_on(frame.loop_body, index):
                return None
            return self._scalar(frame.caller, frame.arguments[instruction.number], index, initially)
        return None

    # --- FLOPs -------------------------------------------------------------------------------------------

    def _flops(self, instruction: hlo.Instruction, computation: hlo.Computation) -> float:
        operands = [computation[name].shape for name in instruction.operands]
        match instruction.opcode:
            case "fusion":
                return self._fused_flops(_called_name(instruction))
            case "map":
                repeats = hlo.elements(instruction.shape)
            case "reduce":
                repeats = hlo.elements(operands[0]) - hlo.elements(instruction.shape)
            case "reduce-window":
                repeats = hlo.elements(instruction.shape) * (hlo.window_size(instruction) - 1)
            case "scatter":
                repeats = hlo.elements(operands[-1])
            case "select-and-scatter":
                repeats = hlo.elements(operands[1]) * hlo.window_size(instruction)
            case _:
                return hlo.flops(instruction, operands)
        return repeats * self._fused_flops(_called_name(instruction))

    def _count_fused_flops(self, name: str) -> float:
        computation = self._computations[name]
        return sum(self._flops(instruction, computation) for instruction in computation.values())

    # --- Bytes -------------------------------------------------------------------------------------------

    def _bytes(self, instruction: hlo.Instruction, computation: hlo.Computation) -> float:
        opcode, shape = instruction.opcode, instruction.shape
        operands = [computation[name].shape for name in instruction.operands]
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        if opcode == "fusion":
            return self._fusion_bytes(instruction, operands)
        if opcode.endswith("-start"):  # The result contains the operands.
            return hlo.main_memory_size(shape)
        if opcode in _SLICES:
            read = [_part(operands[0], hlo.size(shape)), *map(hlo.main_memory_size, operands[1:])]
            return sum(read) + hlo.main_memory_size(shape)
        if opcode == "dynamic-update-slice":
            return hlo.main_memory_size(operands[1]) + _part(shape, hlo.size(operands[1]))
        return hlo.main_memory_size(shape) + sum(map(hlo.main_memory_size, operands))

    def _fusion_bytes(self, fusion: hlo.Instruction, operands: list[str]) -> float:
        name = _called_name(fusion)
        read = (_part(shape, self._parameter_bytes(name, i)) for i, shape in enumerate(operands))
        results = zip(hlo.arrays(fusion.shape), self._root_bytes(name), strict=True)
        return sum(read) + sum(written for array, written in results if array.in_main_memory)

    def _count_parameter_bytes(self, name: str, number: int) -> float:
        """Counts the bytes that a fused computation reads of a parameter: all of it, or its slices."""
        parameters = (p for p in self._computations[name].values() if p.opcode == "parameter")
        (parameter,) = (parameter for parameter in parameters if parameter.number == number)
        return min(hlo.size(parameter.shape), self._bytes_read(name, parameter.name))

    def _bytes_read(self, name: str, value: str) -> float:
        total = 0
        for user in self._users(name)[value]:
            first = user.operands[0] == value
            if user.opcode in _SLICES and first:
                total += hlo.size(user.shape)
            elif user.opcode == "bitcast":
                total += self._bytes_read(name, user.name)
            elif user.opcode == "fusion":
                numbers = (i for i, operand in enumerate(user.operands) if operand == value)
                total += sum(self._parameter_bytes(_called_name(user), i) for i in numbers)
            elif not (user.opcode == "dynamic-update-slice" and first):  # This one updates in place.
                return math.inf
        return total

    def _find_users(self, name: str) -> Mapping[str, list[hlo.Instruction]]:
        users = collections.defaultdict(list)
        for instruction in self._computations[name].values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    def _count_root_bytes(self, name: str) -> list[float]:
        """Counts the bytes that a fused computation writes of each of its results."""
        computation = self._computations[name]
        root = hlo.root(computation)
        results = [computation[value] for value in root.operands] if root.opcode == "tuple" else [root]
        written = []
        for result in results:
            while result.opcode == "bitcast":
                result = computation[result.operands[0]]
            if result.opcode == "fusion":
                written += self._root_bytes(_called_name(result))
            elif result.opcode == "dynamic-update-slice":
                written.append(hlo.size(computation[result.operands[1]].shape))
            else:
                written += [array.bytes for array in hlo.arrays(result.shape)]
        return written

    # --- Collectives -------------------------------------------------------------------------------------

    def _collectives(
        self,
        instruction: hlo.Instruction,
        computation: hlo.Computation,
        channels: set[str],
        fused_in: str = "",
    ) -> Iterator[tuple[str, Collective]]:
        """Yields the kind and the costs of each collective of an instruction.

        Args:
          instruction: the instruction.
          computation: the computation that contains it.
          channels: ids of the fused collectives met so far; this function adds to it. A TPU's asynchronous
            collective stands in several fusions, from the one that starts it to the one that waits for it.
          fused_in: name of the fused computation; '' outside fusions.
        """
        kind = instruction.opcode.removesuffix("-start")
        if kind == "fusion":
            name = _called_name(instruction)
            fused = self._computations[name]
            for inner in fused.values():
                yield from self._collectives(inner, fused, channels, name)
        if kind not in _COLLECTIVES:
            return
        if fused_in and (channel := instruction.attribute("channel_id")):
            if channel in channels:
                return
            channels.add(channel)
        if fused_in.startswith("all-reduce-scatter"):  # On a TPU; each device keeps its slice.
            kind = "reduce-scatter"
        size = sum(hlo.size(computation[name].shape) for name in instruction.operands)
        group = self._group_size(instruction)
        if kind == "all-gather":
            size *= group
        sent = size if kind == "collective-permute" else size * (group - 1) / group
        yield kind, Collective(1, size, 2 * sent if kind == "all-reduce" else sent)

    def _group_size(self, instruction: hlo.Instruction) -> int:
        """Returns the number of devices in a group; XLA has three notations for groups."""
        if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", instruction.rest):
            return int(groups[1])
        if groups := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction.rest):
            sizes = dict(re.findall(r"('[^']*')=(\d+)", groups[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'[^']*'", groups[2]))
        if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.rest):
            return groups[1].count(",") + 1
        return self._num_devices


def _called_name(instruction: hlo.Instruction) -> str:
    names = (instruction.attribute(key) for key in ("calls", "to_apply", "scatter"))
    return next(name for name in names if name)


def _passes_on(loop_body: hlo.Computation, index: int | None) -> bool:
    """Tells whether a loop passes on an element of its tuple unchanged."""
    root = hlo.root(loop_body)
    if root.opcode != "tuple" or index is None:
        return False
    element = loop_body[root.operands[index]]
    return element.opcode == "get-tuple-element" and element.attribute("index") == str(index)


def _part(shape: str, size: float) -> float:
    """Returns the bytes of a part of an array; 0 if the array isn't in main memory."""
    return size if hlo.main_memory_size(shape) else 0


def _sum(parts: list[Costs]) -> Costs:
    collectives: dict[str, Collective] = {}
    for part in parts:
        for kind, collective in part.collectives.items():
            so_far = dataclasses.astuple(collectives.get(kind, Collective()))
            both = zip(so_far, dataclasses.astuple(collective), strict=True)
            collectives[kind] = Collective(*map(sum, both))
    return Costs(
        sum(part.flops for part in parts),
        sum(part.bytes_accessed for part in parts),
        collectives,
        tuple(name for part in parts for name in part.uncounted_loops),
    )


def _times(costs: Costs, trips: int) -> Costs:
    collectives = {
        kind: Collective(*(trips * value for value in dataclasses.astuple(collective)))
        for kind, collective in costs.collectives.items()
    }
    return Costs(trips * costs.flops, trips * costs.bytes_accessed, collectives, costs.uncounted_loops)
