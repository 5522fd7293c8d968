"""Sources of images and prompts: Pick-a-Pic's shards, the joined mirror, or a folder.

A source lists its shards and gives a shard's rows; only images that are still missing are read.
"""

import abc
import csv
import dataclasses
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from richhf_jax import errors, feedback
from richhf_jax.datasets.rich_hf_18k import remote
from richhf_jax.datasets.rich_hf_18k.labels import LFS_POINTER, SPLITS, Record, uid_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Rows of images that are decoded at once.
_BATCH_ROWS = 16
# Bytes that are read at once within a column of a row group; at least a page. So a long column of small pages
# is never in memory as a whole.
_BUFFER = 16 << 20
# The files of a folder of images are split into this many shards, by a hash of their uid.
_FOLDER_SHARDS = 64
# pyarrow raises these at broken files. A failed read raises a UserError (`remote`), which passes through.
_BROKEN = (pa.ArrowException, OSError, UnicodeDecodeError)


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
    """An image and its prompt. `image` is None if it wasn't missing. `where` names the row in messages."""

    uid: str
    prompt: str
    where: str
    image: bytes | None


class Source(abc.ABC):
    """Shards with images and prompts.

    Attributes:
      description: identifies the source, from what was given.
    """

    description: str

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
            parquet = _open_parquet(file, where)
            self._check_columns(parquet.schema_arrow, self._columns(), where)
            start, broken = 0, None
            for group in range(parquet.num_row_groups):
                try:
                    yield from self._group_rows(parquet, group, f"{where}: row", start, wanted, missing)
                except _BROKEN as error:
                    broken = f"{where}: row group {group} is corrupt ({_first_line(error)})"
                start += parquet.metadata.row_group(group).num_rows
                passed(_stored_bytes(parquet, group))
            if broken:
                raise BadShard(broken)

    def _columns(self) -> dict[str, str]:
        """Returns name -> kind of the columns that are read for images and prompts."""
        columns = {self.prompt_column: "string"}
        for uid_column, image_column in self.image_columns:
            columns |= {uid_column: "string", image_column: "binary"}
        return columns

    def _group_rows(self, parquet, group, where, start, wanted, missing) -> Iterator[Row]:
        """Yields the rows of a row group: all of the first image column, then those of the second."""
        uid_columns = [column for column, _ in self.image_columns]
        keys = parquet.read_row_group(group, columns=[*uid_columns, self.prompt_column], use_threads=False)
        prompts = keys[self.prompt_column]
        for uid_column, image_column in self.image_columns:
            uids = [self._uid(name) for name in keys[uid_column].to_pylist()]
            _check_uids(uids, uid_column, where, start)
            found = {row: uid for row, uid in enumerate(uids) if uid is not None and uid in wanted}
            needed = [row for row, uid in found.items() if uid in missing]
            images = dict.fromkeys(found)
            # One image is in memory at a time: each is passed on before the next one is read.
            for row, image in _cells(parquet, group, image_column, needed):
                images.pop(row)
                yield Row(found[row], prompts[row].as_py(), f"{where} {start + row}, {image_column}", image)
            for row in images:
                yield Row(found[row], prompts[row].as_py(), f"{where} {start + row}, {image_column}", None)

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

    def label_records(self) -> dict[str, Iterator[tuple[str, Record]]]:
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

    def _records(self, shards: list[Shard]) -> Iterator[tuple[str, Record]]:
        for shard in shards:
            where = self._folder.where(shard.name)
            with self._folder.open(shard.name) as file:
                try:
                    parquet = _open_parquet(file, where)
                    schema = parquet.schema_arrow
                    self._check_columns(schema, self._LABEL_COLUMNS, where)
                    names = [_leaf(schema, name) for name in self._LABEL_COLUMNS]
                    row = 0
                    for batch in parquet.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
                        for record in batch.to_pylist():
                            values = {name: _bytes_of(value) for name, value in record.items()}
                            yield f"{where}: row {row}", {k: v for k, v in values.items() if v is not None}
                            row += 1
                except (BadShard, *_BROKEN) as error:
                    raise errors.UserError(
                        f"{where}: the labels in it can't be read ({_first_line(error)})."
                        " Get the file again, or give --labels"
                    ) from error


class Images(Source):
    """A folder of <uid>.{jpg,jpeg,png,webp}, and a CSV or JSON Lines file of prompts (uid, prompt)."""

    def __init__(self, images: str, prompts: str):
        """Reads the prompts and lists the images.

        Raises:
          errors.UserError: there is no such folder or file, or the prompts aren't of this form.
        """
        self._folder = remote.Folder(images)
        self.description = f"Images {self._folder}"
        self._prompts, digest = _read_prompts(prompts)
        self._groups: dict[Shard, list[str]] = {}
        groups: dict[int, dict[str, int]] = {}
        for name, size in self._folder.files(IMAGE_SUFFIXES).items():
            groups.setdefault(zlib.crc32(uid_of(name).encode()) % _FOLDER_SHARDS, {})[name] = size
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
            image = None
            if uid in missing:
                with self._folder.open(name) as file:
                    image = file.read()
                passed(len(image))
            yield Row(uid, self._prompts.get(uid, ""), self._folder.where(name), image)


def _first_part(shard: Shard) -> str:
    """Returns the part before the dash: 'data/train-00000-of-00002.parquet' -> 'train'."""
    return pathlib.PurePosixPath(shard.name).name.partition("-")[0]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _open_parquet(file: io.RawIOBase, where: str) -> pq.ParquetFile:
    """Opens a parquet file; reads only its footer."""
    try:
        return pq.ParquetFile(file, buffer_size=_BUFFER, page_checksum_verification=True)
    except _BROKEN as error:
        file.seek(0)
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise errors.UserError(
                f"{where} is a pointer of Git LFS, not the file: run `git lfs pull` in that clone"
            ) from None
        raise BadShard(f"{where}: cut off or corrupt ({_first_line(error)})") from error


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


def _leaf(schema: pa.Schema, column: str) -> str:
    """Names what to read of a column: only the bytes of an image's struct, else all of it."""
    return f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column


def _bytes_of(value):
    """Returns the bytes of an image's struct, or another cell as it is."""
    return value["bytes"] if isinstance(value, dict) else value


def _check_uids(uids: list[str | None], column: str, where: str, start: int) -> None:
    """Checks that uids aren't prompts."""
    for row, uid in enumerate(uids):
        if uid is not None and any(character.isspace() for character in uid):
            raise errors.UserError(
                f"{where} {start + row}: {column} is {uid[:80]!r}, which is no uid; check the columns' order"
            )


def _stored_bytes(parquet: pq.ParquetFile, group: int) -> int:
    metadata = parquet.metadata.row_group(group)
    return sum(metadata.column(i).total_compressed_size for i in range(metadata.num_columns))


def _cells(
    parquet: pq.ParquetFile, group: int, column: str, rows: list[int]
) -> Iterator[tuple[int, bytes | None]]:
    """Yields some cells of an image column, one by one; without rows, nothing is read."""
    if not rows:
        return
    columns = [_leaf(parquet.schema_arrow, column)]
    batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)
    needed = iter(rows)
    row: int | None = next(needed)
    start = 0
    for batch in batches:
        cells = batch.column(0)
        while row is not None and row < start + len(cells):
            yield row, _bytes_of(cells[row - start].as_py())
            row = next(needed, None)
        if row is None:
            return
        start += len(cells)


def _read_prompts(path: str) -> tuple[dict[str, str], str]:
    """Reads prompts by uid, and a digest of their file."""
    folder = remote.Folder(path)
    names = list(folder.files([".csv", ".jsonl"]))
    if len(names) != 1:
        raise errors.UserError(f"{path}: no such file, or its name ends in neither .csv nor .jsonl")
    with folder.open(names[0]) as file:
        data = file.read()
    prompts = {}
    try:
        for number, row in _prompt_rows(data.decode("utf-8-sig"), names[0].endswith(".csv")):
            uid, prompt = (row.get("uid"), row.get("prompt")) if isinstance(row, dict) else (None, None)
            if not isinstance(uid, str) or not isinstance(prompt, str) or any(c.isspace() for c in uid):
                raise errors.UserError(f"{path}:{number}: expected uid and prompt, got {str(row)[:200]}")
            if prompts.setdefault(uid, prompt) != prompt:
                raise errors.UserError(f"{path}:{number}: its prompt for {uid} differs from an earlier one")
    except (UnicodeDecodeError, csv.Error) as error:
        raise errors.UserError(f"{path}: {error}") from error
    return prompts, hashlib.sha256(data).hexdigest()


def _prompt_rows(text: str, is_csv: bool) -> Iterator[tuple[int, object]]:
    """Yields each line's number and content; a broken line of JSON stays text."""
    if is_csv:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, line
