"""Streams samples from shards of images with alt-text, in any storage that fsspec reaches.

A sample is a mapping of fields. They are, by the shard's format:

    TFRecord             the features of a tf.train.Example that hold bytes
    webdataset (tar)     the files <key>.<extension>, by extension, and the texts in <key>.json
    parquet              the columns; an image may be bytes or Hugging Face's struct with `bytes`

No TensorFlow is used: each process would have to import it.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, BinaryIO, cast

import fsspec

from richhf_jax import errors
from richhf_jax.datasets import tfrecord
from richhf_jax.inputs import row_groups, tars
from richhf_jax.inputs.record import MAX_IMAGE_BYTES, InputError, parsed_json

_BUFFER_BYTES = 1 << 20
# Rows of a parquet file that are in memory at once.
_ROWS = 16
# Threads that wait for a network's answers.
_THREADS = 16
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardError(tars.StorageError):
    """A shard can't be read: its storage fails, or nothing in it is good. The message says why."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of samples; `size` is in bytes, 0 if the storage doesn't tell."""

    url: str
    size: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """A shard's content at one place.

    Attributes:
      key: webdataset's key; for other formats the record's number, from 0.
      fields: name -> value.
      problem: why there are no fields, or ''.
    """

    key: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    problem: str = ""


def expand_range(pattern: str) -> list[str]:
    """Expands ranges: 'a-{08..10}.tar' -> ['a-08.tar', 'a-09.tar', 'a-10.tar']; several are combined."""
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    heads = (pattern[: match.start()] + number for number in numbers)
    return [head + tail for head in heads for tail in expand_range(pattern[match.end() :])]


def find(patterns: Sequence[str]) -> list[Shard]:
    """Finds the shards that globs and ranges name, each once, in the patterns' order; a glob's by name.

    Args:
      patterns: local paths or fsspec URLs with *, ?, [] or {00..12}.

    Raises:
      errors.UserError: a pattern names no file or one of an unknown format, or can't be looked up.
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
    except Exception as error:  # A storage may raise anything: see _Source.
        raise errors.UserError(f"{pattern}: {error or type(error).__name__}") from error
    if not infos:
        raise errors.UserError(f"{pattern}: no such file (folders, pipes and devices aren't read)")
    return [
        Shard(filesystem.unstrip_protocol(path).removeprefix("file://"), info.get("size") or 0)
        for path, info in sorted(infos)
    ]


def read(shard: Shard, wanted: Collection[str], count: Callable[[int], object]) -> Iterator[Sample]:
    """Streams a shard's samples.

    Args:
      shard: the file.
      wanted: names of the useful fields; others are left out where this saves reading.
      count: called with the number of bytes, whenever some are read; the sum is `shard.size`.

    Yields:
      Samples; where something can't be read, a sample with a problem.

    Raises:
      ShardError: the storage fails, or the file isn't of the format.
    """
    read_format = _reader(shard.url)
    try:
        file = cast(fsspec.core.OpenFile, fsspec.open(shard.url, "rb")).open()
    except Exception as error:  # See _Source.
        raise ShardError(f"{error or type(error).__name__}") from error
    source = _Source(file, count)
    with file, io.BufferedReader(cast(Any, source), _BUFFER_BYTES) as buffered:
        yield from read_format(buffered, wanted)
    count(shard.size - source.bytes_read)


class _Source(io.RawIOBase):
    """File of a storage. It raises a ShardError if the storage fails: the data may be good, so try again."""

    def __init__(self, file: BinaryIO, count: Callable[[int], object]):
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


def _read_tfrecord(file: io.BufferedReader, wanted: Collection[str]) -> Iterator[Sample]:
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
    tar = tars.Tar(file)
    key, fields, problem, end = None, {}, "", ""
    try:
        for member in tar:
            member_key, extension = _webdataset_name(member.name)
            if member_key != key:
                if key is not None:
                    yield _webdataset_sample(key, fields, problem)
                key, fields, problem = member_key, {}, ""
            if problem or not (extension in wanted or extension == "json"):
                continue
            if extension in fields:
                problem = f"{member.name}: the sample has two of these files"
            elif member.problem:
                problem = f"{member.name} {member.problem}"
            elif member.size + sum(map(len, fields.values())) > MAX_IMAGE_BYTES:
                problem = f"its files have more than {MAX_IMAGE_BYTES} bytes"
            else:
                fields[extension] = tar.read(member)
    except tars.TarError as error:
        end = f"cut off or broken here, the rest is lost: {error}"
    if key is not None:
        yield _webdataset_sample(key, fields, problem)
    if end:
        yield Sample(f"behind {key}" if key else "", problem=end)


def _webdataset_name(path: str) -> tuple[str, str]:
    """Returns the key and the extension: all to the first dot within the name, and all behind it."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name[1:].partition(".")
    return f"{folder}{slash}{name[:1]}{stem}", extension.lower()


def _webdataset_sample(key: str, fields: dict[str, Any], problem: str) -> Sample:
    """Makes a sample. Texts in its .json count as fields, behind files of the same name."""
    if problem or "json" not in fields:
        return Sample(key, {} if problem else fields, problem)
    try:
        entries = parsed_json(fields["json"])
    except InputError as error:
        return Sample(key, problem=f"{key}.json: {error}")
    if not isinstance(entries, dict):
        return Sample(key, problem=f"{key}.json: not a JSON object")
    texts = {name: value for name, value in entries.items() if isinstance(value, str)}
    return Sample(key, {**texts, **fields})


def _read_parquet(file: io.BufferedReader, wanted: Collection[str]) -> Iterator[Sample]:
    try:
        table = row_groups.Table(file)
    except row_groups.ParquetError as error:
        raise ShardError(f"no whole parquet file: {error}") from error
    columns = [name for name in table.schema.names if name in wanted]
    if len(set(columns)) < len(columns):
        raise ShardError(f"a column is there twice; those of use are {', '.join(columns)}")
    for row in table.rows([table.leaf(name, "bytes") for name in columns], _ROWS):
        key = str(row.number) if row.lost <= 1 else f"{row.number} to {row.number + row.lost - 1}"
        yield Sample(key, row.fields, row.problem)


_READERS = {
    # The ending may be .tfrecord-00000-of-00100, too.
    r"\.tfrec(ord)?s?(-\d+-of-\d+)?$": _read_tfrecord,
    r"\.(tar|tar\.gz|tgz)$": _read_webdataset,
    r"\.parquet$": _read_parquet,
}


def _reader(url: str) -> Callable[[io.BufferedReader, Collection[str]], Iterator[Sample]]:
    path = url.partition("?")[0]
    for ending, reader in _READERS.items():
        if re.search(ending, path):
            return reader
    raise errors.UserError(f"{url}: neither .tfrecord, .tar, .tar.gz, .tgz nor .parquet")
