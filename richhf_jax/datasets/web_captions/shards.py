"""Shards of images with alt-text -> samples, streamed from any storage that fsspec reaches.

A sample is a mapping of fields, whatever the shard's format:

    TFRecord             the features of a tf.train.Example (of bytes)
    webdataset (tar)     the files <key>.<extension>, by extension, and the entries of <key>.json
    parquet              the columns; an image may be bytes or Hugging Face's struct with `bytes`

Free of TensorFlow, which each process would have to import.
"""

import dataclasses
import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from richhf_jax import errors
from richhf_jax.datasets import tfrecord

_BUFFER_BYTES = 1 << 20
# Rows of a parquet file that are in memory at once.
_ROWS = 16
_GZIP = b"\x1f\x8b"
# They wait for answers of a network.
_THREADS = 16
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardError(Exception):
    """Why a shard can't be read: its storage fails, or nothing in it is good."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of samples. `size` in bytes; 0 where the storage doesn't tell."""

    url: str
    size: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a shard holds at one place.

    Attributes:
      key: webdataset's key; for other formats the record's number, from 0.
      fields: name -> value.
      problem: why there is nothing, or ''.
    """

    key: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""


def expand_range(pattern: str) -> list[str]:
    """'a-{08..10}.tar' -> ['a-08.tar', 'a-09.tar', 'a-10.tar']; several ranges give all combinations."""
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    heads = (pattern[: match.start()] + number for number in numbers)
    return [head + tail for head in heads for tail in expand_range(pattern[match.end() :])]


def find(patterns: Sequence[str]) -> list[Shard]:
    """The shards that globs and ranges name, in this order (a glob's by name), each once.

    Args:
      patterns: local paths or fsspec URLs with *, ?, [] or {00..12}.

    Raises:
      errors.UserError: a pattern names no file, one of an unknown format, or can't be looked up.
    """
    names = [name for pattern in patterns for name in expand_range(pattern)]
    with futures.ThreadPoolExecutor(_THREADS) as threads:
        found = {shard.url: shard for shards in threads.map(_glob, names) for shard in shards}
    for url in found:
        _reader(url)
    return list(found.values())


def _glob(pattern: str) -> list[Shard]:
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        # A name without wildcards is looked up, not searched for in a folder of thousands.
        glob = fsspec.core.has_magic(path)
        infos = filesystem.glob(path, detail=True).items() if glob else [(path, filesystem.info(path))]
        infos = [(path, info) for path, info in infos if info["type"] == "file"]
    except FileNotFoundError:
        infos = []
    except Exception as error:  # What a storage raises isn't bounded: see _Source.
        raise errors.UserError(f"{pattern}: {error or type(error).__name__}") from error
    if not infos:
        raise errors.UserError(f"{pattern}: no such file")
    return [
        Shard(filesystem.unstrip_protocol(path).removeprefix("file://"), info.get("size") or 0)
        for path, info in sorted(infos)
    ]


def read(shard: Shard, wanted: Collection[str], count: Callable[[int], None]) -> Iterator[Sample]:
    """Streams a shard's samples.

    Args:
      shard: what to read.
      wanted: the fields of use; others are left out where this saves reading.
      count: called with numbers of bytes, in all `shard.size`, as they are read.

    Yields:
      Samples, and problems in the place of what can't be read.

    Raises:
      ShardError: the storage fails, or it isn't a file of the format.
    """
    read_format = _reader(shard.url)
    try:
        file = fsspec.open(shard.url, "rb").open()
    except Exception as error:  # See _Source.
        raise ShardError(f"{error or type(error).__name__}") from error
    source = _Source(file, count)
    with file, io.BufferedReader(source, _BUFFER_BYTES) as buffered:
        yield from read_format(buffered, wanted)
    count(shard.size - source.bytes_read)


class _Source(io.RawIOBase):
    """A file of a storage. What the storage raises is a ShardError: no broken data, but worth another try."""

    def __init__(self, file: BinaryIO, count: Callable[[int], None]):
        self._file = file
        self._count = count
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # OSError, aiohttp's, botocore's, requests', ...
            raise ShardError(f"{error or type(error).__name__}") from error
        buffer[: len(data)] = data
        self.bytes_read += len(data)
        self._count(len(data))
        return len(data)


def _read_tfrecord(file: BinaryIO, wanted: Collection[str]) -> Iterator[Sample]:
    for number, record in enumerate(tfrecord.read(file)):
        key = str(number)
        try:
            if isinstance(record, tfrecord.RecordError):
                raise record
            features = tfrecord.parse_example(record)
        except tfrecord.RecordError as error:
            yield Sample(key, problem=str(error))
            continue
        values = {name: features[name].bytes_list.value for name in wanted if name in features}
        yield Sample(key, {name: value[0] for name, value in values.items() if value})


def _read_webdataset(file: io.BufferedReader, wanted: Collection[str]) -> Iterator[Sample]:
    key, fields, problem, bufsize = None, {}, "", tarfile.RECORDSIZE
    if file.peek(len(_GZIP))[: len(_GZIP)] == _GZIP:
        # tarfile's own gzip takes a stream that is cut off for a whole one.
        file, bufsize = (
            gzip.GzipFile(fileobj=file),
            tarfile.BLOCKSIZE,
        )  # Of the last buffer nothing is seen then.
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=bufsize) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                member_key = f"{folder}/{stem}" if folder else stem
                if member_key != key and key is not None:
                    yield _webdataset_sample(key, fields)
                    fields = {}
                key, extension = member_key, extension.lower()
                if extension in wanted or extension == "json":
                    fields[extension] = tar.extractfile(member).read()
            # To tarfile, a header that is absent or garbled ends the file as well as a block of zeros.
            if tar.fileobj.tell() - tar.offset < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no mark of the end")
            while chunk := tar.fileobj.read(_BUFFER_BYTES):
                if chunk.strip(b"\0"):
                    raise tarfile.ReadError("garbled header")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        problem = f"cut off or broken here, the rest is lost: {error}"
    if key is not None:
        yield _webdataset_sample(key, fields)
    if problem:
        yield Sample(f"behind {key}" if key else "", problem=problem)


def _webdataset_sample(key: str, fields: dict[str, Any]) -> Sample:
    if "json" not in fields:
        return Sample(key, fields)
    try:
        return Sample(key, {**json.loads(fields["json"]), **fields})
    except (ValueError, TypeError):
        return Sample(key, problem=f"{key}.json isn't a JSON object")


def _read_parquet(file: BinaryIO, wanted: Collection[str]) -> Iterator[Sample]:
    try:
        table = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"no whole parquet file: {error}") from error
    columns = [name for name in table.schema_arrow.names if name in wanted]
    end = 0
    for group in range(table.num_row_groups):
        row, end = end, end + table.metadata.row_group(group).num_rows
        try:
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=columns):
                for fields in batch.to_pylist():
                    yield Sample(str(row), fields)
                    row += 1
        except (pa.ArrowException, OSError) as error:
            yield Sample(f"{row} to {end - 1}", problem=f"row group {group} is broken: {error}")


_READERS = {
    # Also .tfrecord-00000-of-00100.
    r"\.tfrec(ord)?s?(-\d+-of-\d+)?$": _read_tfrecord,
    r"\.(tar|tar\.gz|tgz)$": _read_webdataset,
    r"\.parquet$": _read_parquet,
}


def _reader(url: str) -> Callable[[BinaryIO, Collection[str]], Iterator[Sample]]:
    path = url.partition("?")[0]
    for ending, reader in _READERS.items():
        if re.search(ending, path):
            return reader
    raise errors.UserError(f"{url}: neither .tfrecord, .tar, .tar.gz, .tgz nor .parquet")
