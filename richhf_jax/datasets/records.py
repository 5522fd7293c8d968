"""Where the records of TFRecord files are, so that they can be read in any order."""

import struct
from collections.abc import Sequence

import numpy as np
from etils import epath

# TFRecord: uint64 length, uint32 CRC of the length; the data; uint32 CRC of the data.
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_LENGTH = struct.Struct("<Q")
_HEADER_BYTES, _FOOTER_BYTES = 12, 4


def record_offsets(path: str) -> np.ndarray:
    """Scans a TFRecord file (local or gs://), header by header -> int64 [records], where each one starts.

    Raises:
      ValueError: the file ends within a record.
    """
    path = epath.Path(path)
    size = path.stat().length
    offsets = []
    position = 0
    with path.open("rb") as file:
        while position < size:
            offsets.append(position)
            file.seek(position)
            header = file.read(_HEADER_BYTES)
            length = _LENGTH.unpack(header[: _LENGTH.size])[0] if len(header) == _HEADER_BYTES else size
            position += _HEADER_BYTES + length + _FOOTER_BYTES
    if position > size:
        raise ValueError(f"{path}: record {len(offsets) - 1} is cut off; build the data set again")
    return np.array(offsets, np.int64)


def locate(parts: Sequence[tuple[str, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Parts of files in a row, as one sequence of records.

    Args:
      parts: (path, records to skip, records to take), as TFDS's file instructions.

    Returns:
      The number of its part and its offset in the file for each record, int64 [records].
    """
    offsets = [record_offsets(path)[skip:][:take] for path, skip, take in parts]
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in offsets])
    return numbers, np.concatenate(offsets)
