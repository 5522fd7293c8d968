"""Random access to TFRecord files, so that a training stream can start anywhere at once."""

import struct
import threading
from collections.abc import Sequence

import numpy as np
from etils import epath

# TFRecord: uint64 length, uint32 CRC of the length; the data; uint32 CRC of the data.
# https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
_LENGTH = struct.Struct("<Q")
_HEADER_BYTES, _FOOTER_BYTES = 12, 4


class RecordFile:
    """Records of one TFRecord file (local or gs://), in any order and from any thread.

    The file is scanned once, header by header, for where its records are.
    """

    def __init__(self, path: str):
        """Scans the file.

        Raises:
          ValueError: the file ends within a record.
        """
        self._path = epath.Path(path)
        self._open_files = threading.local()
        size = self._path.stat().length
        starts, lengths = [], []
        position = 0
        with self._path.open("rb") as file:
            while position < size:
                file.seek(position)
                header = file.read(_HEADER_BYTES)
                length = _LENGTH.unpack(header[:8])[0] if len(header) == _HEADER_BYTES else size
                starts.append(position + _HEADER_BYTES)
                lengths.append(length)
                position += _HEADER_BYTES + length + _FOOTER_BYTES
                if position > size:
                    raise ValueError(f"{path}: record {len(starts) - 1} is cut off; build the data set again")
        self._starts, self._lengths = np.array(starts, np.int64), np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        file = getattr(self._open_files, "file", None)
        if file is None:  # Each thread has a file position of its own.
            file = self._open_files.file = self._path.open("rb")
        file.seek(int(self._starts[index]))
        return file.read(int(self._lengths[index]))


class RecordFiles:
    """Parts of several files in a row, as one sequence of records."""

    def __init__(self, parts: Sequence[tuple[str, int, int | None]]):
        """Args:
        parts: (path, records to skip, records to take or None for all).
        """
        self._files, numbers, within = [], [], []
        for number, (path, skip, take) in enumerate(parts):
            self._files.append(RecordFile(path))
            indices = np.arange(len(self._files[-1]))[skip:][:take]
            within.append(indices)
            numbers.append(np.full(len(indices), number))
        self._numbers, self._within = np.concatenate(numbers), np.concatenate(within)

    def __len__(self) -> int:
        return len(self._within)

    def __getitem__(self, index: int) -> bytes:
        return self._files[self._numbers[index]][self._within[index]]
