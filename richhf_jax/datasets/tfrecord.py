"""TFRecord files from and to any file object, with their checksums; the examples in them. Free of TensorFlow.

A record: uint64 length, uint32 checksum of these 8 bytes; the data; uint32 checksum of the data.
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import google_crc32c
from google.protobuf import message
from tensorflow_datasets.proto import tf_example_pb2

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER_BYTES, _FOOTER_BYTES = _LENGTH.size + _CHECKSUM.size, _CHECKSUM.size
_CUT_OFF = "cut off: the file ends within this record"
# Of what is read at once: a length may be wrong.
_CHUNK_BYTES = 1 << 20


class RecordError(ValueError):
    """What is wrong with a record."""


def write(file: BinaryIO, data: bytes) -> None:
    """Appends a record."""
    length = _LENGTH.pack(len(data))
    file.write(length + _checksum(length) + data + _checksum(data))


def read(file: BinaryIO) -> Iterator[bytes | RecordError]:
    """Reads a file from where it stands to its end.

    Yields:
      Records in order; in place of one whose data is garbled, the error. Where a length is garbled or the
      file is cut off, the error is the last.
    """
    while header := _read_up_to(file, _HEADER_BYTES):
        try:
            size = _data_size(header)
        except RecordError as error:
            yield error
            return
        data = _read_up_to(file, size + _FOOTER_BYTES)
        if len(data) < size + _FOOTER_BYTES:
            yield RecordError(_CUT_OFF)
            return
        if data[size:] != _checksum(data[:size]):
            yield RecordError("garbled: its checksum is wrong")
        else:
            yield data[:size]


def offsets(file: BinaryIO, end: int) -> Iterator[int]:
    """Scans a file of `end` bytes, header by header.

    Yields:
      Where each record starts.

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
    """Makes a tf.train.Example with one value a feature; the same bytes for the same values."""
    example = tf_example_pb2.Example()
    for name, value in values.items():
        feature = example.features.feature[name]
        if isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
    return example.SerializeToString(deterministic=True)


def parse_example(data: bytes) -> Mapping[str, Any]:
    """Reads a serialised tf.train.Example -> its features (tf.train.Feature) by name.

    Raises:
      RecordError: it is none.
    """
    try:
        return tf_example_pb2.Example.FromString(data).features.feature
    except message.DecodeError as error:
        raise RecordError("no tf.train.Example") from error


def _data_size(header: bytes) -> int:
    """Reads a record's header -> bytes of its data.

    Raises:
      RecordError: the header isn't whole, or garbled.
    """
    if len(header) < _HEADER_BYTES:
        raise RecordError(_CUT_OFF)
    length = header[: _LENGTH.size]
    if header != length + _checksum(length):
        raise RecordError("its length is garbled; this record and the rest of the file are lost")
    return _LENGTH.unpack(length)[0]


def _read_up_to(file: BinaryIO, size: int) -> bytes:
    """`size` bytes, or what there is before the file's end; files of a network may give less at a time."""
    chunks = []
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def _checksum(data: bytes) -> bytes:
    """TFRecord's masked CRC-32C, little-endian."""
    crc = google_crc32c.value(data)
    return _CHECKSUM.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
