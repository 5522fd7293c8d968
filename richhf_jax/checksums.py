"""Checksums of files and arrays: CRC-32C, as eight hexadecimal digits.

An array's checksum is that of its bytes in memory: row by row (C order), little-endian. So it is the same in
every format that keeps the numbers.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import google_crc32c
import numpy as np

_ONES = 0xFFFFFFFF
# CRC-32C's polynomial, and 1, both with the coefficient of 1 in the highest bit.
_POLYNOMIAL, _ONE = 0x82F63B78, 0x80000000


def of_bytes(data: bytes) -> str:
    """Returns the checksum of bytes.

    >>> of_bytes(b"123456789")  # The check value of CRC-32C, RFC 3720, B.4.
    'e3069283'
    """
    return f"{google_crc32c.value(data):08x}"


def of_array(array: np.ndarray) -> str:
    """Returns the checksum of an array in memory, of any type with a fixed size.

    >>> of_array(np.frombuffer(b"123456789", np.uint8))
    'e3069283'
    """
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # As plain bytes, because a buffer of bfloat16 has a format that no other library knows.
    flat = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    return f"{google_crc32c.value(flat):08x}"


def of_json(content: Any) -> str:
    """Returns the checksum of what JSON holds, whichever way its text is laid out.

    >>> of_json({"b": [1, 2.5], "a": None}) == of_json(json.loads('{"a":null,\\n"b":[1,2.5]}'))
    True
    """
    return of_bytes(json.dumps(content, sort_keys=True).encode())


class Pieces:
    """The checksum of an array of which pieces lie in several places, each piece by itself.

    CRC-32C is linear: the exclusive or of the pieces' contributions is the contribution of the whole.

    >>> array = np.arange(6, dtype=np.float32).reshape(2, 3)
    >>> pieces = Pieces(array.shape, 4)
    >>> left = pieces.contribution(array[:, :1], (slice(None), slice(0, 1)))
    >>> right = pieces.contribution(array[:, 1:], (slice(None), slice(1, 3)))
    >>> pieces.checksum(left ^ right) == of_array(array)
    True
    """

    def __init__(self, shape: Sequence[int], item_bytes: int):
        """Describes the whole array: its shape, and the bytes of an element."""
        self._shape = tuple(shape)
        # The bytes from an element to the next one along each axis.
        self._strides = [item_bytes * math.prod(self._shape[axis + 1 :]) for axis in range(len(self._shape))]
        self._bytes = item_bytes * math.prod(self._shape)

    def contribution(self, piece: np.ndarray, index: Sequence[slice]) -> int:
        """Returns a piece's contribution, 32 bits.

        Args:
          piece: the elements, little-endian.
          index: the piece's place, a slice of step 1 for each axis.
        """
        if not piece.size:
            return 0
        # Axes from this one on make one run of bytes in the whole array.
        cut = [axis for axis, size in enumerate(self._shape) if piece.shape[axis] != size]
        outer = cut[-1] if cut else 0
        runs = np.ascontiguousarray(piece).reshape(math.prod(piece.shape[:outer]), -1).view(np.uint8)
        folded = np.array([_register(run) for run in runs], np.uint32).reshape(piece.shape[:outer])
        for axis in reversed(range(outer)):
            folded = _fold(folded, self._strides[axis])
        starts = (part.indices(size)[0] for part, size in zip(index, self._shape, strict=True))
        end = sum(
            (start + size - 1) * stride
            for start, size, stride in zip(starts, piece.shape, self._strides, strict=True)
        )
        return int(_multiply(_shift(self._bytes - piece.itemsize - end), folded))

    def checksum(self, contributions: int) -> str:
        """Returns the array's checksum from the exclusive or of its pieces' contributions."""
        start = int(_multiply(_shift(self._bytes), np.uint32(_ONES)))
        return f"{contributions ^ start ^ _ONES:08x}"


def _register(run: np.ndarray) -> int:
    """Returns the register after the bytes of a run, from 0 and without the final inversion."""
    return google_crc32c.extend(_ONES, run) ^ _ONES


def _fold(registers: np.ndarray, stride: int) -> np.ndarray:
    """Joins registers [..., count] to [...], those of runs that begin `stride` bytes apart."""
    while registers.shape[-1] > 1:
        if registers.shape[-1] % 2:  # A register of 0 in front changes nothing.
            registers = np.concatenate([np.zeros_like(registers[..., :1]), registers], axis=-1)
        registers = _multiply(_shift(stride), registers[..., 0::2]) ^ registers[..., 1::2]
        stride *= 2
    return registers[..., 0]


@functools.cache
def _shift(count: int) -> int:
    """Returns the factor that moves a register over `count` bytes of 0: x to the power of 8 * count."""
    result, square = np.uint32(_ONE), np.uint32(_ONE >> 8)
    while count:
        if count & 1:
            result = _multiply(int(square), result)
        square = _multiply(int(square), square)
        count >>= 1
    return int(result)


def _multiply(factor: int, registers: np.ndarray | np.uint32) -> np.ndarray | np.uint32:
    """Multiplies polynomials modulo CRC-32C's. The highest bit is the coefficient of 1."""
    product = registers & np.uint32(0)
    while factor:
        if factor & _ONE:
            product = product ^ registers
        factor = factor << 1 & _ONES
        registers = registers >> np.uint32(1) ^ (registers & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return product
