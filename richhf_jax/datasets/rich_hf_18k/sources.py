"""Sources of images and prompts: Pick-a-Pic's shards, the joined mirror, or a folder.

A source lists its shards and gives a shard's rows; only images that are still missing are read.
"""

import abc
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import BinaryIO, cast

import pyarrow as pa

from richhf_jax import errors, feedback
from richhf_jax.datasets.rich_hf_18k import remote
from richhf_jax.datasets.rich_hf_18k.labels import LFS_POINTER, SPLITS, BadRecordError, Record, uid_of
from richhf_jax.inputs import row_groups
from richhf_jax.inputs.record import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    InputError,
    bounded_lines,
    checked_prompt,
    parsed_json,
)

# Most rows that are read at once: of uids and prompts, and of images.
_KEY_ROWS, _BATCH_ROWS = 1024, 16
# Bytes that are read at once within a column of a row group; at least a page. So a long column of small pages
# is never in memory as a whole.
_BUFFER = 16 << 20
# The files of a folder of images are split into this many shards, by a hash of their uid.
_FOLDER_SHARDS = 64
# Most bytes of a file of prompts.
_MAX_PROMPTS = 1 << 30


class BadShard(Exception):
    """A shard is cut off or corrupt; the message names it."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of a source that is read at once.

    Attributes:
      name: identifies the shard in its source.
      size: in bytes.
      version: changes with the content, as far as that can be told without reading it.
    """

    name: str
    size: int
    version: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """An image and its prompt.

    Attributes:
      uid, prompt: the image's id, and what it was to show.
      where: names the row in messages.
      image: the file's bytes; None if it wasn't missing.
      problem: why the row can't be used, or ''.
    """

    uid: str
    prompt: str
    where: str
    image: bytes | None
    problem: str = ""


class Source(abc.ABC):
    """Shards with images and prompts.

    Attributes:
      description: identifies the source, from what was given.
      problems: what can't be used of it, or is there twice, as far as is known before the shards are read.
    """

    description: str
    problems: Sequence[str] = ()

    @abc.abstractmethod
    def shards(self) -> list[Shard]:
        """Lists all shards, in the order in which they are to be read."""

    def label_splits(self, shard: Shard) -> Collection[str]:
        """Returns the splits of the labels whose images may be in a shard."""
        del shard
        return SPLITS

    @abc.abstractmethod
    def rows(
        self, shard: Shard, wanted: Collection[str], missing: Collection[str], passed: Callable[[int], None]
    ) -> Iterator[Row]:
        """Yields the rows of a shard whose uid is wanted, in order.

        Args:
          shard: one of `shards`.
          wanted: uids.
          missing: uids whose images are to be read; it may shrink meanwhile.
          passed: called with numbers of bytes that were read or left out.

        Raises:
          BadShard: the shard is cut off or corrupt; raised after the rows that can be read.
          errors.UserError: the shard isn't of this source's form, or reading it fails.
        """


class _Parquet(Source):
    """Shards in parquet. A row has a prompt and one or several images, each with a uid."""

    prompt_column: str
    # (column of the uids, column of the images)
    image_columns: tuple[tuple[str, str], ...]

    def __init__(self, path: str):
        """Opens the folder or file.

        Raises:
          errors.UserError: no such path.
        """
        self._folder = remote.Folder(path)
        self.description = f"{type(self).__name__} {self._folder}"

    def shards(self) -> list[Shard]:
        return [Shard(name, size) for name, size in self._folder.files([".parquet"]).items()]

    def rows(self, shard, wanted, missing, passed):
        where = self._folder.where(shard.name)
        with self._folder.open(shard.name) as file:
            table = _open_parquet(file, where)
            self._check_columns(table.schema, self._columns(), where)
            rows, broken = max(table.starts[-1], 1), None
            for group, (start, end) in enumerate(itertools.pairwise(table.starts)):
                try:
                    yield from self._group_rows(table, group, f"{where}: row", wanted, missing)
                except row_groups.GroupError as error:
                    broken = f"{where}: row group {group} is corrupt ({error})"
                passed(shard.size * end // rows - shard.size * start // rows)
            if broken:
                raise BadShard(broken)

    def _columns(self) -> dict[str, str]:
        """Returns name -> kind of the columns that are read for images and prompts."""
        columns = {self.prompt_column: "string"}
        for uid_column, image_column in self.image_columns:
            columns |= {uid_column: "string", image_column: "binary"}
        return columns

    def _group_rows(self, table: row_groups.Table, group: int, where, wanted, missing) -> Iterator[Row]:
        """Yields the rows of a row group: all of the first image column, then those of the second."""
        start, uid_columns = table.starts[group], [column for column, _ in self.image_columns]
        batches = list(table.batches(group, [*uid_columns, self.prompt_column], _KEY_ROWS))
        if not batches:
            return
        keys = pa.Table.from_batches(batches)
        prompts = keys[self.prompt_column]
        for uid_column, image_column in self.image_columns:
            uids = [self._uid(_text(name)) for name in keys[uid_column]]
            _check_uids(uids, uid_column, where, start)
            found = {row: uid for row, uid in enumerate(uids) if uid is not None and uid in wanted}
            needed = [row for row, uid in found.items() if uid in missing]
            images = dict.fromkeys(found)
            # One image is in memory at a time: each is passed on before the next one is read.
            for row, image in _cells(table, group, image_column, needed):
                images.pop(row)
                yield _row(found[row], prompts[row], f"{where} {start + row}, {image_column}", image)
            for row in images:
                yield _row(found[row], prompts[row], f"{where} {start + row}, {image_column}", None)

    def _uid(self, name: str | None) -> str | None:
        return name

    def _check_columns(self, schema: pa.Schema, columns: Mapping[str, str], where: str) -> None:
        if all(
            schema.get_field_index(name) >= 0 and _KINDS[kind](schema.field(name).type)
            for name, kind in columns.items()
        ):
            return
        expected = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise errors.UserError(
            f"{where}: these aren't the columns of {type(self).__name__}.\n"
            f"    expected: {expected}\n"
            f"    found: {found}"
        )


class PickAPic(_Parquet):
    """Pick-a-Pic v1 (https://huggingface.co/datasets/yuvalkirstain/pickapic_v1), 190 GB of image pairs."""

    prompt_column = "caption"
    image_columns = (("image_0_uid", "jpg_0"), ("image_1_uid", "jpg_1"))

    # First part of a shard's name -> splits of the labels. RichHF-18K's train and dev images are in
    # Pick-a-Pic's train split, its test images in the test split. Other shards are read last.
    _LABEL_SPLITS = {"train": ("train", "dev"), "test": ("test",)}

    def shards(self):
        return sorted(super().shards(), key=lambda shard: _first_part(shard) not in self._LABEL_SPLITS)

    def label_splits(self, shard):
        return self._LABEL_SPLITS.get(_first_part(shard), SPLITS)


class Joined(_Parquet):
    """The mirror: one table with labels, images and prompts."""

    prompt_column = feedback.PROMPT_FIELD
    image_columns = ((feedback.FILENAME_FIELD, feedback.IMAGE_FIELD),)

    # First part of a shard's name -> split of the labels.
    _LABEL_SPLIT = {"train": "train", "dev": "dev", "validation": "dev", "test": "test"}
    _LABEL_COLUMNS = {
        feedback.FILENAME_FIELD: "string",
        feedback.KEYWORDS_FIELD: "string",
        **dict.fromkeys(feedback.SCORE_FIELDS.values(), "number"),
        **dict.fromkeys(feedback.HEATMAP_FIELDS.values(), "binary"),
    }

    def _uid(self, name):
        return uid_of(name) if name else None

    def label_inputs(self) -> dict[str, str]:
        """Returns name -> size of the shards; a change means that their labels may have changed."""
        return {shard.name: str(shard.size) for shard in self.shards()}

    def label_records(self) -> dict[str, Iterator[tuple[str, Record | BadRecordError]]]:
        """Returns split -> the mirror's own labels, as `labels.prepare` takes them.

        Raises:
          errors.UserError: a split has no shard, or a shard's name doesn't tell its split.
        """
        by_split = {split: [] for split in SPLITS}
        for shard in self.shards():
            split = self._LABEL_SPLIT.get(_first_part(shard))
            if split is None:
                names = ", ".join(self._LABEL_SPLIT)
                raise errors.UserError(
                    f"{self._folder.where(shard.name)}: its split is unknown. Let its name begin with one of"
                    f" {names}, and a dash; or give --labels"
                )
            by_split[split].append(shard)
        if empty := [split for split, shards in by_split.items() if not shards]:
            raise errors.UserError(
                f"{self._folder.path}: no shard of {', '.join(empty)}; add it or give --labels"
            )
        return {split: self._records(shards) for split, shards in by_split.items()}

    def _records(self, shards: list[Shard]) -> Iterator[tuple[str, Record | BadRecordError]]:
        for shard in shards:
            where = self._folder.where(shard.name)
            with self._folder.open(shard.name) as file:
                try:
                    table = _open_parquet(file, where)
                except BadShard as error:
                    raise _unreadable_labels(where, str(error)) from error
                self._check_columns(table.schema, self._LABEL_COLUMNS, where)
                names = [table.leaf(name, "bytes") for name in self._LABEL_COLUMNS]
                for row in table.rows(names, _BATCH_ROWS):
                    place = f"{where}: row {row.number}"
                    if row.lost:
                        raise _unreadable_labels(where, row.problem)
                    if row.problem:
                        yield place, BadRecordError(row.problem)
                        continue
                    values = {name: _bytes_of(value) for name, value in row.fields.items()}
                    yield place, {k: v for k, v in values.items() if v is not None}


def _unreadable_labels(where: str, reason: str) -> errors.UserError:
    return errors.UserError(
        f"{where}: the labels in it can't be read ({reason}). Get the file again, or give --labels"
    )


class Images(Source):
    """A folder of <uid>.jpg, .png, ..., and a CSV or JSON Lines file of prompts (uid, prompt)."""

    def __init__(self, images: str, prompts: str):
        """Reads the prompts and lists the images.

        Raises:
          errors.UserError: there is no such folder or file, or no line of the prompts is of this form.
        """
        self._folder = remote.Folder(images)
        self.description = f"Images {self._folder}"
        self._prompts, digest, problems = _read_prompts(prompts)
        self._groups: dict[Shard, list[str]] = {}
        groups: dict[int, dict[str, int]] = {}
        first: dict[str, str] = {}
        for name, size in self._folder.files(IMAGE_EXTENSIONS).items():
            uid = uid_of(name)
            if first.setdefault(uid, name) != name:
                others = f"{uid} has {first[uid]}, too; the first of its files that is good is taken"
                problems.append(f"{self._folder.where(name)}: {others}")
            groups.setdefault(zlib.crc32(uid.encode()) % _FOLDER_SHARDS, {})[name] = size
        self.problems = problems
        for number, sizes in sorted(groups.items()):
            version = hashlib.sha256(json.dumps([sizes, digest]).encode()).hexdigest()
            self._groups[Shard(f"images-{number:02}", sum(sizes.values()), version)] = list(sizes)

    def shards(self):
        return list(self._groups)

    def rows(self, shard, wanted, missing, passed):
        for name in self._groups[shard]:
            uid = uid_of(name)
            if uid not in wanted:
                continue
            image, problem = None, ""
            if uid in missing:
                try:
                    image = self._folder.read(name, MAX_IMAGE_BYTES)
                    passed(len(image))
                except (ValueError, remote.UnreadableError) as error:
                    problem = str(error)
            yield Row(uid, self._prompts.get(uid) or "", self._folder.where(name), image, problem)


def _first_part(shard: Shard) -> str:
    """Returns the part before the dash: 'data/train-00000-of-00002.parquet' -> 'train'."""
    return pathlib.PurePosixPath(shard.name).name.partition("-")[0]


def _open_parquet(file: io.RawIOBase, where: str) -> row_groups.Table:
    """Opens a parquet file; reads only its footer."""
    try:
        return row_groups.Table(cast(BinaryIO, file), _BUFFER)
    except row_groups.ParquetError as error:
        file.seek(0)
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise errors.UserError(
                f"{where} is a pointer of Git LFS, not the file: run `git lfs pull` in that clone"
            ) from None
        raise BadShard(f"{where}: cut off or corrupt ({error})") from error


def _is_bytes(kind: pa.DataType) -> bool:
    """Tells whether a type is bytes, or Hugging Face's struct of an image, which has bytes."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


_KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "number": lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    "binary": _is_bytes,
}


def _bytes_of(value):
    """Returns the bytes of an image's struct, or another cell as it is."""
    return value["bytes"] if isinstance(value, dict) else value


def _text(cell: pa.Scalar) -> str | None:
    """Returns a cell's text; None where there is none, or it isn't UTF-8."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return None


def _row(uid: str, prompt: pa.Scalar, where: str, image: bytes | None) -> Row:
    text = _text(prompt)
    problem = "the prompt isn't UTF-8" if text is None and prompt.is_valid else ""
    return Row(uid, text or "", where, image, problem)


def _check_uids(uids: list[str | None], column: str, where: str, start: int) -> None:
    """Checks that most uids aren't prompts."""
    wrong = [row for row, uid in enumerate(uids) if uid is not None and _has_space(uid)]
    if 2 * len(wrong) > len(uids):
        raise errors.UserError(
            f"{where} {start + wrong[0]}: {column} is {uids[wrong[0]]!r:.80}, which is no uid; check the"
            " columns' order"
        )


def _has_space(uid: str) -> bool:
    return any(character.isspace() for character in uid)


def _cells(
    table: row_groups.Table, group: int, column: str, rows: list[int]
) -> Iterator[tuple[int, bytes | None]]:
    """Yields some cells of an image column, one by one; without rows, nothing is read."""
    if not rows:
        return
    needed = iter(rows)
    row: int | None = next(needed)
    start = 0
    for batch in table.batches(group, [table.leaf(column, "bytes")], _BATCH_ROWS):
        cells = batch.column(0)
        while row is not None and row < start + len(cells):
            yield row, _bytes_of(cells[row - start].as_py())
            row = next(needed, None)
        if row is None:
            return
        start += len(cells)


def _read_prompts(path: str) -> tuple[dict[str, str | None], str, list[str]]:
    """Reads prompts by uid (None where two differ), a digest of their file, and what is wrong with lines.

    Raises:
      errors.UserError: there is no such file, or no line is good.
    """
    folder = remote.Folder(path)
    names = list(folder.files([".csv", ".jsonl"]))
    if len(names) != 1:
        raise errors.UserError(f"{path}: no such file, or its name ends in neither .csv nor .jsonl")
    try:
        data = folder.read(names[0], _MAX_PROMPTS)
    except ValueError as error:
        raise errors.UserError(f"{path}: {error}") from error
    prompts: dict[str, str | None] = {}
    problems: list[str] = []
    rows = _csv_rows(data) if names[0].lower().endswith(".csv") else _jsonl_rows(data)
    for number, row in rows:
        try:
            uid, prompt = _uid_and_prompt(row)
        except InputError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        if prompts.setdefault(uid, prompt) != prompt:
            prompts[uid] = None
            problems.append(
                f"{path}:{number}: its prompt for {uid} differs from an earlier one: none is taken"
            )
    if problems and not any(prompts.values()):
        raise errors.UserError(problems[0])
    return prompts, hashlib.sha256(data).hexdigest(), problems


def _uid_and_prompt(row: object) -> tuple[str, str]:
    """Returns both texts of a row; raises InputError where they aren't there."""
    if isinstance(row, InputError):
        raise row
    uid, prompt = (row.get("uid"), row.get("prompt")) if isinstance(row, dict) else (None, None)
    if not isinstance(uid, str) or not isinstance(prompt, str) or not uid or _has_space(uid):
        raise InputError(f"expected uid and prompt, got {row!r:.200}")
    return uid, checked_prompt(prompt, uid) and prompt


def _csv_rows(data: bytes) -> Iterator[tuple[int, object]]:
    """Yields each row's last line and its fields, or what is wrong with it."""
    reader = csv.reader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""), strict=True)
    header: list[str] = []
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # The reader goes on with the next line.
            yield reader.line_num, InputError(str(error))
            continue
        if not header:
            header = values
        elif len(values) == len(header):
            yield reader.line_num, dict(zip(header, values, strict=True))
        elif values:
            there = f"{len(values)} fields, but the header has {len(header)} (quote those with commas)"
            yield reader.line_num, InputError(there)


def _jsonl_rows(data: bytes) -> Iterator[tuple[int, object]]:
    """Yields each line's number and content, or what is wrong with it."""
    for number, line in enumerate(bounded_lines(io.BytesIO(data)), start=1):
        if not line.strip():
            continue
        try:
            yield number, parsed_json(line)
        except InputError as error:
            yield (
                number,
                InputError(f"expected uid and prompt, got {line[:100].decode(errors='replace')}: {error}"),
            )
