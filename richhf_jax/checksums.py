"""Checksums of files and arrays: CRC-32C, as eight hexadecimal digits.

An array's checksum is that of its bytes in memory: row by row (C order), little-endian. So it is the same in
every format that keeps the numbers.
"""

import google_crc32c
import numpy as np


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
