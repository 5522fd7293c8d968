"""Reads and writes TFRecord files and the tf.train.Examples in them, without TensorFlow.

A record is: uint64 length, uint32 checksum of these 8 bytes; the data; uint32 checksum of the data.
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import functools
import struct
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

import google_crc32c
from google.protobuf import message

from richhf_jax import errors

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES, _FOOTER_BYTES = _LENGTH.size + _CHECKSUM.size, _CHECKSUM.size
_CUT_OFF = "cut off: the file ends within this record"
# Most bytes of a record: more than any image that is decoded has.
_MAX_BYTES = 1 << 30
# No more is read at once: a length may be huge, and the file short.
_CHUNK_BYTES = 1 << 20


class RecordError(ValueError):
    """A record is cut off, garbled or no tf.train.Example; the message says which."""


class RestLostError(RecordError):
    """The records behind this one can't be found, or aren't there."""


def write(file: IO[bytes], data: bytes) -> None:
    """Appends a record with its checksums to a file."""
    length = _LENGTH.pack(len(data))
    file.write(length + _checksum(length) + data + _checksum(data))


def read(file: IO[bytes]) -> Iterator[bytes | RecordError]:
    """Reads records from a file's current position to its end.

    Yields:
      Records in order. An error takes the place of a record whose data is garbled. A RestLostError is the
      last item if a length is garbled or the file is cut off.
    """
    while header := _read_up_to(file, _HEADER_BYTES):
        try:
            size = _data_size(header)
        except RecordError as error:
            yield error
            return
        if size > _MAX_BYTES:
            yield RestLostError(f"it claims {size} bytes; this record and the rest of the file are lost")
            return
        data = _read_up_to(file, size + _FOOTER_BYTES)
        if len(data) < size + _FOOTER_BYTES:
            yield RestLostError(_CUT_OFF)
            return
        if data[size:] != _checksum(data[:size]):
            yield RecordError("garbled: its checksum is wrong")
        else:
            yield data[:size]


def offsets(file: IO[bytes], end: int) -> Iterator[int]:
    """Scans a file of `end` bytes, header by header.

    Yields:
      The byte at which each record starts.

    Raises:
      RecordError: the next record's length is garbled, or the file ends within that record.
    """
    start = 0
    while start < end:
        file.seek(start)
        behind = start + _HEADER_BYTES + _data_size(file.read(_HEADER_BYTES)) + _FOOTER_BYTES
        if behind > end:
            raise RecordError(_CUT_OFF)
        yield start
        start = behind


def serialize_example(values: Mapping[str, str | float | bytes]) -> bytes:
    """Serialises a tf.train.Example with one value per feature; equal values give equal bytes."""
    example = _example_class()()
    for name, value in values.items():
        feature = example.features.feature[name]
        if isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
    return example.SerializeToString(deterministic=True)


def parse_example(data: bytes) -> Mapping[str, Any]:
    """Parses a serialised tf.train.Example into its features (tf.train.Feature) by name.

    Raises:
      RecordError: the data is no tf.train.Example.
    """
    try:
        return _example_class().FromString(data).features.feature
    except message.DecodeError as error:
        raise RecordError("no tf.train.Example") from error


@functools.cache
def _example_class() -> Any:
    """Imports tf.train.Example, which only those need who read or write examples.

    Raises:
      errors.UserError: TFDS, which has it, is missing.
    """
    try:
        from tensorflow_datasets.proto import tf_example_pb2
    except ImportError as error:
        raise errors.UserError(
            "records need TensorFlow Datasets: `pip install tensorflow-datasets`"
        ) from error
    # The generated module makes its classes at run time, unseen by type checkers.
    return cast(Any, tf_example_pb2).Example


def _data_size(header: bytes) -> int:
    """Returns the size in bytes of a record's data, as its header says.

    Raises:
      RecordError: the header is cut off or garbled.
    """
    if len(header) < _HEADER_BYTES:
        raise RestLostError(_CUT_OFF)
    length = header[: _LENGTH.size]
    if header != length + _checksum(length):
        raise RestLostError("its length is garbled; this record and the rest of the file are lost")
    return _LENGTH.unpack(length)[0]


def _read_up_to(file: IO[bytes], size: int) -> bytes:
    """Reads `size` bytes, fewer only at the file's end. One read of a network's file may return too few."""
    chunks = []
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _checksum(data: bytes) -> bytes:
    """Computes TFRecord's masked CRC-32C, little-endian."""
    crc = google_crc32c.value(data)
    return _CHECKSUM.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
