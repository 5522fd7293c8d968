"""Parses XLA's text of a program into computations and instructions, and counts one instruction's FLOPs.

A shape is text as XLA writes it: `f32[2,3]{1,0}`, or `(f32[2,3]{1,0}, s32[])` for a tuple.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# `  ROOT %add.1 = f32[2,3]{1,0} add(%x, %y), metadata=...`: ROOT, name, shape, opcode, the rest.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# `%fused (x: f32[2]) -> f32[2] {`, `ENTRY main.5 {`
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_OPERAND = re.compile(r"%?([\w.\-]+)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_BITS = re.compile(r"[a-z]+(\d+)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")

# The second name is that before XLA splits a program over devices; the network has no other such call.
_FLASH_ATTENTION = re.compile(r'"(__cudnn\$fmha|CustomSPMDPartitioning")')

_ELEMENTWISE = {
    "abs", "add", "and", "bitcast-convert", "ceil", "clamp", "compare", "complex", "convert",
    "count-leading-zeros", "divide", "floor", "imag", "is-finite", "maximum", "minimum", "multiply",
    "negate", "not", "or", "popcnt", "real", "reduce-precision", "remainder", "round-nearest-afz",
    "round-nearest-even", "select", "shift-left", "shift-right-arithmetic", "shift-right-logical", "sign",
    "stochastic-convert", "subtract", "xor",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, shape, opcode: the parts of `%name = shape opcode(...)`.
      operands: the operands' names in the same computation.
      rest: the text from the operands on.
      is_root: whether it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Returns the value in `name=value`, `name=%value` or `name={values}`; "" if there is none."""
        found = re.search(rf"\b{name}=(?:%?([^\s,{{]+)|{{([^}}]*)}})", self.rest)
        return (found[1] or found[2] or "") if found else ""

    @property
    def number(self) -> int:
        """Number of a parameter, from 0."""
        return int(self.rest[: self.rest.find(")")])


Computation = dict[str, Instruction]


class Array(NamedTuple):
    """One array of a shape.

    Attributes:
      name: type and shape without the layout, such as `f32[2,3]`.
      dims: size of each dimension.
      bytes: bytes of all elements.
      in_main_memory: whether it is in the device's main memory, not on a TPU's chip (`S(1)` in the layout) or
        in the host's memory.
    """

    name: str
    dims: tuple[int, ...]
    bytes: int
    in_main_memory: bool


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns a module's computations by name, and the entry's name.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is not None and (found := _INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = found.groups()
            current[name] = Instruction(name, shape, opcode, _operands(opcode, rest), rest, bool(root))
        elif line.endswith("{") and (found := _COMPUTATION.match(line)):
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
        elif line == "}":
            current = None
    if not entry:
        raise ValueError("no HLO module: no line begins with ENTRY")
    return computations, entry


def root(computation: Computation) -> Instruction:
    """Returns the instruction that is a computation's result."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _operands(opcode: str, rest: str) -> tuple[str, ...]:
    if opcode in ("constant", "parameter"):  # Their brackets hold a value or a number, no name.
        return ()
    inside = rest[: rest.find(")")]
    return tuple(found[1] for part in inside.split(", ") if (found := _OPERAND.search(part)))


@functools.cache
def arrays(shape: str) -> tuple[Array, ...]:
    """Returns the array of a shape, or all arrays of a tuple."""
    found = []
    for dtype, sides, layout in _ARRAY.findall(shape):
        dims = tuple(int(side.lstrip("<=")) for side in sides.split(",") if side)
        bits = _BITS.match(dtype)
        width = int(bits[1]) if bits else {"pred": 8}.get(dtype, 0)
        space = _MEMORY_SPACE.search(layout)
        in_main_memory = space is None or space[1] == "0"
        name = f"{dtype}[{sides}]"
        found.append(Array(name, dims, math.prod(dims) * width // 8, in_main_memory))
    return tuple(found)


def size(shape: str) -> int:
    """Returns the bytes of a shape."""
    return sum(array.bytes for array in arrays(shape))


def main_memory_size(shape: str) -> int:
    """Returns the bytes of a shape that are in the device's main memory."""
    return sum(array.bytes for array in arrays(shape) if array.in_main_memory)


def elements(shape: str) -> int:
    """Returns the number of elements of a shape; of a tuple, those of its first array."""
    return math.prod(arrays(shape)[0].dims)


def flops(instruction: Instruction, operands: Sequence[str]) -> float:
    """Counts the FLOPs of an instruction by the rules of XLA's `HloCostAnalysis`, without what it calls.

    Args:
      instruction: the instruction.
      operands: the operands' shapes.
    """
    opcode, shape = instruction.opcode, instruction.shape
    if opcode in _ELEMENTWISE:
        return elements(shape)
    if opcode == "dot":
        dims = arrays(operands[0])[0].dims
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))
        return 2 * elements(shape) * math.prod(dims[int(i)] for i in contracted)
    if opcode == "convolution":
        return _convolution_flops(instruction, *operands[:2])
    if opcode == "sort":
        count = elements(operands[0])
        return count * math.ceil(math.log2(max(count, 2)))
    if opcode in ("all-reduce", "all-reduce-start"):
        return sum(map(elements, operands))
    if opcode == "custom-call" and _FLASH_ATTENTION.match(instruction.attribute("custom_call_target")):
        return _flash_attention_flops(shape, *operands[:2])
    return 0


def window_size(instruction: Instruction) -> int:
    """Returns the number of elements of an instruction's window."""
    return math.prod(side.size for side in _window(instruction))


def _flash_attention_flops(shape: str, query: str, key: str) -> float:
    """Counts the products of cuDNN's flash attention: two forward; five backward, one of them again."""
    batch, q_length, heads, width = arrays(query)[0].dims
    # The backward pass returns three gradients at least, the forward pass one array of four axes.
    is_backward = sum(len(array.dims) == 4 for array in arrays(shape)) > 1
    return (5 if is_backward else 2) * 2 * batch * heads * q_length * arrays(key)[0].dims[1] * width


class _Side(NamedTuple):
    """A window in one dimension.

    Attributes:
      size: elements of the window.
      stride: distance of consecutive windows.
      pad: zeros before the first element; a negative number leaves out so many elements.
      lhs_dilate: distance of the input's elements, with zeros between them.
      rhs_dilate: distance of the kernel's elements.
    """

    size: int
    stride: int
    pad: int
    lhs_dilate: int
    rhs_dilate: int


def _window(instruction: Instruction) -> list[_Side]:
    """Parses `window={size=3x3 stride=2x2 pad=0_1x0_1}`. A missing field is 1, or 0 for padding."""
    fields = dict(part.split("=") for part in instruction.attribute("window").split())
    if "size" not in fields:
        return []
    count = fields["size"].count("x") + 1
    columns = []
    for name in _Side._fields:
        default = "x".join(["0_0" if name == "pad" else "1"] * count)
        columns.append([int(value.split("_")[0]) for value in fields.get(name, default).split("x")])
    return [_Side(*values) for values in zip(*columns, strict=True)]


def _convolution_flops(instruction: Instruction, input_shape: str, kernel_shape: str) -> float:
    """Counts 2 for each pair of kernel and input elements that meet; padding and gaps don't count."""
    labels = re.split("_|->", instruction.attribute("dim_labels"))  # Such as `b01f_01io->b01f`.
    shapes = (input_shape, kernel_shape, instruction.shape)
    inputs, kernel, outputs = (
        dict(zip(names, arrays(shape)[0].dims, strict=True))
        for names, shape in zip(labels, shapes, strict=True)
    )
    meetings = math.prod(
        _meetings(inputs[str(i)], outputs[str(i)], side) for i, side in enumerate(_window(instruction))
    )
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    # The kernel's "i" is the number of features of one group.
    return 2 * meetings * kernel["i"] * kernel["o"] * (inputs["b"] // batch_groups)


@functools.cache
def _meetings(input_size: int, output_size: int, side: _Side) -> int:
    """Counts the pairs of output position and kernel position that meet an element of the input."""
    places = np.arange(output_size)[:, None] * side.stride + np.arange(side.size) * side.rhs_dilate - side.pad
    inside = (places >= 0) & (places <= (input_size - 1) * side.lhs_dilate)
    return int(np.sum(inside & (places % side.lhs_dilate == 0)))
