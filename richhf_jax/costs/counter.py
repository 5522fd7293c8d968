"""What a program costs a device, counted from XLA's text of it: FLOPs, bytes, collectives.

XLA's own `compiled.cost_analysis()` counts a loop's body once, whatever its trips. This counts through
loops, by XLA's rules otherwise (`HloCostAnalysis`): a multiply-add is 2 FLOPs, a convolution counts the
positions where kernel and input meet, an elementwise operation 1 an element and a transcendental one 0,
as XLA keeps these apart. Takes optimised text (`compiled.as_text()`, of one device of the mesh) and
unoptimised text (`lowered.as_text(dialect="hlo")`, of the whole mesh).
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
# Names for values: nothing is computed, nothing moves.
_FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "get-dimension-size", "get-tuple-element",
    "opt-barrier", "optimization-barrier", "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# `counter < limit`, or `<=`, which has one trip more.
_TRIPS_AT_THE_LIMIT = {"LT": 0, "GT": 0, "LE": 1, "GE": 1}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Transfers of one kind between devices.

    Attributes:
      count: how often one happens.
      bytes: of the whole arrays: as gathered, or as they are before they are reduced, split or sent.
      sent_bytes: what a device sends at least, n devices taking part: of the bytes (n-1)/n, and for an
        all-reduce twice as much (a reduce-scatter and an all-gather).
    """

    count: float = 0
    bytes: float = 0
    sent_bytes: float = 0


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a program, or of a part of it, costs a device.

    Attributes:
      flops: see the module.
      bytes_accessed: operands and results of every operation that isn't part of a fusion, in the device's
        main memory (a TPU's on-chip arrays don't count). Of a slice, only what is read or written.
      collectives: by kind.
      uncounted_loops: names of loops whose trips the text doesn't tell; their bodies count once.
    """

    flops: float = 0
    bytes_accessed: float = 0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)
    uncounted_loops: tuple[str, ...] = ()


def analyze(hlo_text: str) -> Costs:
    """Counts a program.

    A loop's trips are what XLA knows of it (`known_trip_count`), or the constant that its condition compares
    the counter with: an upper bound for a loop that may end early, such as decoding. Of the branches of a
    conditional the one with the most FLOPs counts.

    Args:
      hlo_text: optimised (costs are of one device) or not (of all devices together; there are no collectives
        in it yet).

    Raises:
      ValueError: the text is no HLO module.
    """
    return _Program(hlo_text).costs()


def model_flops(forward: jax.stages.Lowered, training: bool = False) -> float:
    """Of the model's mathematics for a whole batch: what is recomputed to save memory doesn't count.

    Args:
      forward: a forward pass, not compiled: the step "eval" or "predict".
      training: with the backward pass, which takes twice as many (PaLM, arXiv:2204.02311, appendix B).
    """
    return analyze(forward.as_text(dialect="hlo")).flops * (3 if training else 1)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Arrays of one shape that one line of the model makes.

    Attributes:
      bytes: of one of them.
      shape: "f32[8,16]".
      made_by: the line, as jax names it, or an argument's name.
      count: how many there are, one after the other or at once.
    """

    bytes: int
    shape: str
    made_by: str
    count: int


def largest_buffers(hlo_text: str, limit: int = 10) -> list[Buffer]:
    """The largest arrays in a device's main memory, by their size; not all of them live at once.

    Args:
      hlo_text: optimised.

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
    """A computation as it is called: where its parameters come from.

    Attributes:
      arguments: names in `caller`.
      loop_body: of the loop whose condition or body this is, if it is one.
    """

    computation: hlo.Computation
    caller: "_Frame | None" = None
    arguments: tuple[str, ...] = ()
    loop_body: hlo.Computation | None = None


class _Program:
    """One module."""

    def __init__(self, text: str):
        self._computations, self._entry = hlo.parse(text)
        header = text[: text.find("\n")]
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
        self._num_devices = math.prod(int(count) for count in counts)
        # Kept with the module, not with the class.
        self._fused_flops = functools.cache(self._count_fused_flops)
        self._parameter_bytes = functools.cache(self._count_parameter_bytes)
        self._root_bytes = functools.cache(self._count_root_bytes)
        self._users = functools.cache(self._find_users)

    def costs(self) -> Costs:
        return self._of(_Frame(self._computations[self._entry]))

    def _of(self, frame: _Frame) -> Costs:
        """Of a computation that isn't fused."""
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
            # jax counts by 1, from 0 where nothing else stands there.
            start = self._scalar(frame, counter, initially=True) or 0
            if end is not None and direction in _TRIPS_AT_THE_LIMIT:
                bounds.append(max(0, end - start + _TRIPS_AT_THE_LIMIT[direction]))
        return min(bounds, default=None)

    def _comparisons(self, frame: _Frame) -> Iterator[tuple[_Frame, hlo.Instruction]]:
        """Comparisons of single whole numbers in a loop's condition."""
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
        """A whole number (element `index` of a tuple), where it is a constant, else None.

        Args:
          initially: of what a loop changes, the value before the first trip will do.
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
        if opcode.endswith("-start"):  # Its result holds the operands again.
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
        """What a fused computation reads of a parameter: all of it, or the slices that it takes."""
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
            elif not (user.opcode == "dynamic-update-slice" and first):  # Which updates it in place.
                return math.inf
        return total

    def _find_users(self, name: str) -> Mapping[str, list[hlo.Instruction]]:
        users = collections.defaultdict(list)
        for instruction in self._computations[name].values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    def _count_root_bytes(self, name: str) -> list[float]:
        """What a fused computation writes, of each of its results."""
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
        """Those of an instruction, by kind.

        Args:
          channels: ids of the fused ones met so far, to which it adds. A TPU's asynchronous collective stands
            in several fusions, from the one that starts it to the one that waits for it, with work between.
          fused_in: the fused computation's name.
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
        if fused_in.startswith("all-reduce-scatter"):  # A TPU's: each device keeps its slice.
            kind = "reduce-scatter"
        size = sum(hlo.size(computation[name].shape) for name in instruction.operands)
        group = self._group_size(instruction)
        if kind == "all-gather":
            size *= group
        sent = size if kind == "collective-permute" else size * (group - 1) / group
        yield kind, Collective(1, size, 2 * sent if kind == "all-reduce" else sent)

    def _group_size(self, instruction: hlo.Instruction) -> int:
        """Devices that take part together; XLA has three ways to write which."""
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
    """Whether a loop leaves an element of the tuple that it carries as it was."""
    root = hlo.root(loop_body)
    if root.opcode != "tuple" or index is None:
        return False
    element = loop_body[root.operands[index]]
    return element.opcode == "get-tuple-element" and element.attribute("index") == str(index)


def _part(shape: str, size: float) -> float:
    """Bytes of a part of an array: they count where the array does."""
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
