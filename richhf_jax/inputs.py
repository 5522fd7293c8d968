"""What `python -m richhf_jax.predict INPUT...` reads -> a stream of records: an id, and how to load the rest.

    an image                  prompt: --prompt, or else <stem>.txt beside it
    a folder                  its images, recursively, by path; prompt: <stem>.txt, or else --prompt
    .csv .jsonl .parquet      columns `image` (a path; in parquet also bytes), `prompt`, optionally `id`
    .tar                      pairs <key>.<image extension> and <key>.txt

Nothing is held but names: of a folder those in it, of a tar those whose other half is still to come.
"""

import bisect
import csv
import dataclasses
import functools
import itertools
import json
import os
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NoReturn

from richhf_jax import errors

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

# More than any image that is decoded takes. It keeps a disk image of that name out of memory.
_MAX_BYTES = 1 << 30
# Of a CSV's field. A quote that is never closed swallows as much before the rows go on.
_MAX_FIELD = 1 << 24
# Rows of a parquet file that are read at once: names and prompts; images, of which some batches stay.
_NAME_ROWS = 1024
_IMAGE_ROWS = 16
_KEPT_BATCHES = 4
_GZIP = b"\x1f\x8b"
_PROMPT_FIX = "the image needs a prompt: write it into this file, or give --prompt"
_PATH_FIX = "paths are relative to the table's folder; URLs aren't fetched"


def _printable(text: str) -> str:
    """Text that any file takes: lone surrogates (in names that aren't UTF-8, in broken JSON) written out."""
    return text.encode("utf-8", "backslashreplace").decode()


class InputError(ValueError):
    """Why a record can't be scored: unreadable, no prompt, ... The message is one line, for the user."""

    def __init__(self, message: str):
        super().__init__(" ".join(_printable(message).splitlines()))


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An image to score.

    Attributes:
      id: its name for the user, the same in every run; two inputs may hold the same.
      load: reads the image file's bytes (not decoded) and the prompt (stripped, not empty). Any thread may
        call it, at any time, best in the records' order. Raises InputError.
    """

    id: str
    load: Callable[[], tuple[bytes, str]]


def records(inputs: Sequence[str], prompt: str | None = None) -> Iterator[Record]:
    """Streams the records of all inputs, in this order; what can't be read is a record that doesn't load.

    Args:
      inputs: paths of images, folders, tables and tars.
      prompt: of images that are named, and of those in folders that have no sidecar.

    Raises:
      errors.UserError: before the first record, if an input doesn't exist, can't be opened, is of an unknown
        kind, lacks a column or is empty, or if it has prompts of its own and `prompt` would be ignored.
    """
    readers = [_reader(path, prompt) for path in inputs]
    for path, reader in zip(inputs, readers, strict=True):  # A mistake in the last costs no hours of scoring.
        if next(_stream(path, reader), None) is None:
            raise _empty(path)
    for path, reader in zip(inputs, readers, strict=True):
        yield from _stream(path, reader)


def count(inputs: Sequence[str], prompt: str | None = None) -> int:
    """How many records there are, without reading images; of parquet, only the footer is read.

    Raises:
      errors.UserError: as `records` does.
    """
    total = 0
    for path, reader in [(path, _reader(path, prompt)) for path in inputs]:
        is_parquet = reader.func is _parquet
        found = _open_parquet(path).metadata.num_rows if is_parquet else sum(1 for _ in _stream(path, reader))
        if not found:
            raise _empty(path)
        total += found
    return total


def _reader(path: str, prompt: str | None) -> functools.partial:
    """What gives the input's records when it is called."""
    if prompt is not None:
        try:
            prompt = _prompt(prompt, "--prompt")
        except InputError as error:
            raise errors.UserError(str(error)) from error
    if os.path.isdir(path):
        return functools.partial(_folder, path, "", prompt, frozenset())
    if not os.path.exists(path):
        raise errors.UserError(f"{path}: no such file or folder")
    extension = os.path.splitext(path)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return functools.partial(_image, path, prompt)
    if extension in (".gz", ".tgz"):
        raise _compressed(path)
    if extension not in _READERS:
        kinds = " ".join([*IMAGE_EXTENSIONS, *_READERS])
        raise errors.UserError(f"{path}: unknown kind of file; taken are folders and {kinds}")
    if prompt is not None:
        raise errors.UserError(f"{path}: has prompts of its own, --prompt would be ignored; leave it out")
    return functools.partial(_READERS[extension], path)


def _stream(path: str, reader: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    try:
        yield from reader()
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror or error}") from error


def _empty(path: str) -> errors.UserError:
    if os.path.isdir(path):
        return errors.UserError(f"{path}: no image in this folder ({' '.join(IMAGE_EXTENSIONS)})")
    if path.lower().endswith(".tar"):
        return errors.UserError(f"{path}: no pairs <key>.jpg, <key>.txt")
    return errors.UserError(f"{path}: no rows")


def _compressed(path: str) -> errors.UserError:
    return errors.UserError(f"{path}: compressed; unpack it first (`gunzip` for .gz and .tgz)")


# Loading. These are called from many threads.


def _fail(message: str) -> NoReturn:
    raise InputError(message)


def _read(path: str, where: str, fix: str = "", offset: int = 0, size: int | None = None) -> bytes:
    """A file's bytes, or a part of it; `where` and `fix` are what an error's message begins and ends with."""
    fix = fix and f" ({fix})"
    try:
        status = os.stat(path)
        is_file = stat.S_ISREG(status.st_mode)  # Opening a pipe would wait for ever.
        wanted = status.st_size if size is None else size
        data = b""
        if is_file and wanted <= _MAX_BYTES:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(wanted)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name.
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{where}: {reason}{fix}") from error
    if not is_file:
        raise InputError(f"{where}: not a file{fix}")
    if wanted > _MAX_BYTES:
        raise InputError(f"{where}: {wanted} bytes; at most {_MAX_BYTES} are taken")
    if len(data) < wanted:
        raise InputError(f"{where}: cut off, {len(data)} of {wanted} bytes are there")
    return data


def _prompt(text: str | bytes, where: str) -> str:
    """A prompt as it is scored: stripped, UTF-8, not empty."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        text.encode()
    except UnicodeError as error:
        raise InputError(f"{where}: the prompt isn't UTF-8; save it as UTF-8") from error
    if not text.strip():
        raise InputError(f"{where}: the prompt is empty")
    return text.strip()


def _load_file(path: str, prompt: str | None, fallback: str | None) -> tuple[bytes, str]:
    """An image with `prompt`, or else the sidecar's, or else `fallback`."""
    sidecar = f"{os.path.splitext(path)[0]}.txt"
    if prompt is None and fallback is not None and not os.path.lexists(sidecar):
        prompt = fallback
    if prompt is None:
        prompt = _prompt(_read(sidecar, sidecar, _PROMPT_FIX), sidecar)
    return _read(path, path), prompt


def _load_row(folder: str, image: str, prompt: str, where: str) -> tuple[bytes, str]:
    prompt = _prompt(prompt, where)
    path = os.path.join(folder, image)
    return _read(path, f"{where}: {path}", _PATH_FIX), prompt


def _load_pair(path: str, key: str, image: tuple[int, int], text: tuple[int, int]) -> tuple[bytes, str]:
    where = f"{path}, {key}"
    prompt = _prompt(_read(path, f"{where}.txt", "", *text), f"{where}.txt")
    return _read(path, where, "", *image), prompt


# Images and folders.


def _image(path: str, prompt: str | None) -> Iterator[Record]:
    yield Record(_printable(os.path.basename(path)), functools.partial(_load_file, path, prompt, None))


def _folder(root: str, inner: str, prompt: str | None, above: frozenset) -> Iterator[Record]:
    """The images in root/inner, where `inner` is '' or 'a/b/', by path; `above` are the folders it is in."""
    path = os.path.join(root, inner)
    try:
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:  # A link to a folder that it is in.
            return
        with os.scandir(path) as entries:
            names = sorted(name for entry in entries if (name := _wanted(entry)))
    except OSError as error:
        if not inner:
            raise
        yield Record(_printable(inner), functools.partial(_fail, f"{path}: {error.strerror or error}"))
        return
    for name in names:
        if name.endswith("/"):
            yield from _folder(root, inner + name, prompt, above | {here})
        else:
            load = functools.partial(_load_file, os.path.join(path, name), None, prompt)
            yield Record(_printable(inner + name), load)


def _wanted(entry: os.DirEntry) -> str:
    """The name of an image, that of a folder with a slash (paths sort by it), '' for all else."""
    if entry.name.startswith("."):
        return ""
    if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
        return f"{entry.name}/"
    return entry.name if os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS else ""


# Tables. Lines count from 1, parquet's rows from 0.


def _csv(path: str) -> Iterator[Record]:
    csv.field_size_limit(max(_MAX_FIELD, csv.field_size_limit()))
    # What isn't UTF-8 costs a row at most: a path may be so on disk, a prompt is found out on loading.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise errors.UserError(f"{path}: broken header: {error}") from error
        _check_columns(path, header)
        while True:
            line = rows.line_num + 1
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # The reader goes on with the next line.
                yield _broken_row(path, line, str(error))
                continue
            if len(values) == len(header):
                yield _row(path, line, dict(zip(header, values, strict=True)))
            elif values:
                problem = f"{len(values)} fields, but the header has {len(header)} (quote those with commas)"
                yield _broken_row(path, line, problem)


def _check_columns(path: str, names: Sequence[str]) -> None:
    counts = {name: list(names).count(name) for name in ("image", "prompt", "id")}
    wrong = [name for name, number in counts.items() if number > 1 or (number == 0 and name != "id")]
    if wrong:
        there = _printable(", ".join(map(repr, names[:20])))
        needed = "needed are `image` and `prompt`, and `id` may be there, each once"
        commas = " (UTF-8, separated by commas)" if path.lower().endswith(".csv") else ""
        raise errors.UserError(f"{path}: column `{wrong[0]}`: {needed}{commas}; the columns are {there}")


def _jsonl(path: str) -> Iterator[Record]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield _broken_row(path, number, f"no JSON: {getattr(error, 'msg', error)}")
                continue
            yield _row(path, number, fields)


def _place(table: str, number: int) -> str:
    return f"{table}, {'row' if table.lower().endswith('.parquet') else 'line'} {number}"


def _broken_row(table: str, number: int, problem: str) -> Record:
    load = functools.partial(_fail, f"{_place(table, number)}: {problem}")
    return Record(_printable(f"{os.path.basename(table)}:{number}"), load)


def _row(table: str, number: int, fields: Any, images: "_ParquetImages | None" = None) -> Record:
    """A row of a table. Where `images` load the image, `fields` may lack it."""
    if not isinstance(fields, dict):
        return _broken_row(table, number, "not a JSON object")
    image, prompt, row_id = (fields.get(name) for name in ("image", "prompt", "id"))
    for name in ("prompt",) if images else ("image", "prompt"):
        value = fields.get(name)
        if name not in fields:
            there = ", ".join(map(repr, list(fields)[:20]))
            return _broken_row(table, number, f"no `{name}`; there are {there}")
        if value is None or (name == "image" and value == ""):
            return _broken_row(table, number, f"`{name}` is empty")
        if not isinstance(value, str):
            return _broken_row(table, number, f"`{name}` is a {type(value).__name__}, not a string")
    if row_id is not None and type(row_id) not in (str, int):  # A bool is an int.
        return _broken_row(table, number, f"`id` is a {type(row_id).__name__}, not a string or whole number")
    place = _place(table, number)
    if images:
        load = functools.partial(images.load, number, prompt, place)
    else:
        load = functools.partial(_load_row, os.path.dirname(table), image, prompt, place)
    if row_id in (None, ""):
        row_id = image or f"{os.path.basename(table)}:{number}"
    return Record(_printable(str(row_id)), load)


def _open_parquet(path: str):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise errors.UserError(f"{path}: parquet needs pyarrow: `pip install pyarrow`") from error
    try:
        # Pages are read as they are asked for, not whole columns of a row group.
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (ValueError, OSError) as error:
        raise errors.UserError(f"{path}: no parquet file, or cut off; copy it again: {error}") from error
    _check_columns(path, file.schema_arrow.names)
    return file


def _batches(file: Any, rows: int, group: int, columns: Sequence[str]) -> Iterator:
    """Batches of a row group; those columns that aren't there are left out. InputError where it is broken."""
    import pyarrow as pa

    try:
        yield from file.iter_batches(rows, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"row group {group} is broken: {error}") from error


def _parquet(path: str) -> Iterator[Record]:
    file = _open_parquet(path)
    kind = str(file.schema_arrow.field("image").type)
    # Images that are in the table stay on disk until they are loaded; of {bytes, path}, the path is read.
    images = _ParquetImages(path) if "binary" in kind or kind.startswith("struct") else None
    columns = ["prompt", "id", "image.path" if images else "image"]
    row = end = 0
    for group in range(file.num_row_groups):
        end, problem = end + file.metadata.row_group(group).num_rows, ""
        try:
            for batch in _batches(file, _NAME_ROWS, group, columns):
                for index in range(len(batch)):
                    yield _parquet_row(path, row, batch.slice(index, 1), images)
                    row += 1
        except InputError as error:
            problem = str(error)
        for lost in range(row, end):
            yield _broken_row(path, lost, problem)
        row = end


def _parquet_row(path: str, row: int, batch: Any, images: "_ParquetImages | None") -> Record:
    try:
        (fields,) = batch.to_pylist()
    except ValueError as error:  # No UTF-8.
        return _broken_row(path, row, str(error))
    if images:
        fields["image"] = (fields.get("image") or {}).get("path")
    return _row(path, row, fields, images)


class _ParquetImages:
    """The images in a parquet file. It is read forwards: cheap where rows are loaded about in order.

    The last few batches stay in memory, and those that a thread waits for; a row before them costs reading
    its row group from the start.
    """

    def __init__(self, path: str):
        self._path = path
        self._file = _open_parquet(path)
        groups = (self._file.metadata.row_group(group) for group in range(self._file.num_row_groups))
        self._starts = list(itertools.accumulate((group.num_rows for group in groups), initial=0))[:-1]
        self._group, self._batches = -1, iter(())
        self._next_row = 0  # The first of the next batch.
        self._kept = []  # (first row, images)
        self._lock = threading.Lock()
        self._waiting = set()  # Rows. A lock isn't fair: the others may read on for hundreds of rows.

    def load(self, row: int, prompt: str, place: str) -> tuple[bytes, str]:
        """A row's image and checked prompt."""
        prompt = _prompt(prompt, place)
        self._waiting.add(row)
        with self._lock:
            image = self._image(row, place)
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if data is None and isinstance(path, str) and path:
            return _load_row(os.path.dirname(self._path), path, prompt, place)
        if not isinstance(data, bytes):
            raise InputError(f"{place}: no image; needed is a path, bytes, or a struct of `bytes` and `path`")
        return data, prompt

    def _image(self, row: int, place: str) -> Any:
        self._waiting.discard(row)
        for first, images in self._kept:
            if first <= row < first + len(images):
                return images[row - first].as_py()
        group = bisect.bisect_right(self._starts, row) - 1
        if group != self._group or row < self._next_row:
            self._group, self._next_row = group, self._starts[group]
            self._batches = _batches(self._file, _IMAGE_ROWS, group, ["image"])
        while self._next_row <= row:
            try:
                images = next(self._batches).column("image")
            except (InputError, StopIteration) as error:  # It stops behind the first error.
                problem = f"row group {group} is broken from row {self._next_row} on"
                raise InputError(f"{place}: {problem}") from error
            first, self._next_row = self._next_row, self._next_row + len(images)
            late = [batch for batch in self._kept[:-_KEPT_BATCHES] if self._is_waited_for(*batch)]
            self._kept = [*late, *self._kept[-_KEPT_BATCHES:], (first, images)]
        return images[row - first].as_py()

    def _is_waited_for(self, first: int, images: Any) -> bool:
        return not self._waiting.isdisjoint(range(first, first + len(images)))


# Archives.


def _tar(path: str) -> Iterator[Record]:
    """Pairs, as their second half comes; then the halves, then the end, where it isn't whole."""
    waiting: dict[str, tuple[str, tuple[int, int]]] = {}
    problem = ""
    with open(path, "rb") as file:
        if file.read(len(_GZIP)) == _GZIP:
            raise _compressed(path)
        file.seek(0)
        try:
            for key, extension, place in _tar_members(file):
                other_extension, other_place = waiting.setdefault(key, (extension, place))
                if place == other_place:
                    continue
                if (extension == ".txt") == (other_extension == ".txt"):
                    yield _broken_member(path, key, f"both {other_extension} and {extension} are there")
                    continue
                del waiting[key]
                image, text = (other_place, place) if extension == ".txt" else (place, other_place)
                yield Record(_printable(key), functools.partial(_load_pair, path, key, image, text))
        except Exception as error:  # tarfile raises what it likes at garbled headers.
            problem = f"cut off or broken behind the last member found, the rest is lost: {error}"
    for key, (extension, _) in waiting.items():
        lacks = "image" if extension == ".txt" else ".txt with its prompt"
        yield _broken_member(path, key, f"{key}{extension} has no {lacks} beside it in the tar")
    if problem:
        yield Record(
            _printable(f"{os.path.basename(path)}:end"), functools.partial(_fail, f"{path}: {problem}")
        )


def _broken_member(path: str, key: str, problem: str) -> Record:
    return Record(_printable(key), functools.partial(_fail, f"{path}, {key}: {problem}"))


def _tar_members(file: BinaryIO) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Key, extension, (offset, size) of each image and text; tarfile.ReadError where the tar isn't whole."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # Else it remembers them all.
            if member.size < 0 or tar.offset <= end:  # A negative size would send it round for ever.
                raise tarfile.ReadError("garbled header")
            end = tar.offset
            folder, slash, name = member.name.removeprefix("./").rpartition("/")
            stem, extension = os.path.splitext(name)
            extension = extension.lower()
            # Hidden files are left out, among them macOS's '._a.jpg'.
            wanted = not name.startswith(".") and extension in (*IMAGE_EXTENSIONS, ".txt")
            if wanted and member.isfile() and not member.issparse():
                yield f"{folder}{slash}{stem}", extension, (member.offset_data, member.size)
        # To tarfile, a header that is absent or garbled ends the file as well as a block of zeros.
        file.seek(tar.offset)
        if len(file.read(tarfile.BLOCKSIZE).strip(b"\0")) or file.tell() - tar.offset < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("no mark of the end")
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise tarfile.ReadError("something follows the mark of the end (joined tars?)")


_READERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet, ".tar": _tar}
