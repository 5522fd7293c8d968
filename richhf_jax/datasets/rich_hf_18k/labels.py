"""Reads RichHF-18K's labels from its three TFRecords or from the joined mirror, checks and keeps them.

WORK_DIR/labels/{train,dev,test}.tfrecord   checked records with all eight fields; an unknown score is NaN
WORK_DIR/labels/index.json                  their contents and problems, and the files that they are from
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping

import tqdm

from richhf_jax import errors, feedback, reading, writing
from richhf_jax.datasets import consolidate, tfrecord
from richhf_jax.inputs import images

SPLITS = ("train", "dev", "test")
LFS_POINTER = b"version https://git-lfs"
_INDEX = "index.json"

Record = dict[str, str | float | bytes]


class BadRecordError(ValueError):
    """A record isn't one of RichHF-18K; the message says why."""


def uid_of(filename: str) -> str:
    """Returns the uid in a file name: 'train/<uid>.png' -> '<uid>'."""
    return pathlib.PurePosixPath(filename).stem


@dataclasses.dataclass
class Index:
    """Contents of the labels.

    Attributes:
      inputs: name -> digest of what the labels were read from.
      keywords: split -> uid -> the keyword labels as text, in the records' order.
      filenames: uid -> the record's file name.
      duplicates: records whose file name or uid had occurred before; the first record counts.
      broken_heatmaps: split -> uid -> reason; records left out because a heatmap can't be decoded.
      bad_records: split -> records left out because they can't be read, each with the reason.
      missing_scores: field -> number of records without it.
      zero_overall: file names of records whose overall score is exactly 0.
      zero_is_missing: whether such a score counts as missing.
    """

    inputs: dict[str, str]
    keywords: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    filenames: dict[str, str] = dataclasses.field(default_factory=dict)
    duplicates: list[str] = dataclasses.field(default_factory=list)
    broken_heatmaps: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    bad_records: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    missing_scores: dict[str, int] = dataclasses.field(default_factory=dict)
    zero_overall: list[str] = dataclasses.field(default_factory=list)
    zero_is_missing: bool = False

    @property
    def splits(self) -> dict[str, str]:
        """Mapping uid -> split for every record that needs an image."""
        return {uid: split for split, uids in self.keywords.items() for uid in uids}


def read_tfrecord(path: pathlib.Path) -> Iterator[tuple[str, Record | BadRecordError]]:
    """Yields the records of a published file, each after its name for messages.

    Raises:
      errors.UserError: the file is missing or cut off, or a length in it is garbled.
    """
    _check_is_tfrecord(path)
    with (
        open(path, "rb", opener=reading.regular) as file,
        tqdm.tqdm(
            desc=f"checking {path.name}", total=path.stat().st_size, unit="B", unit_scale=True, disable=None
        ) as bar,
    ):
        for number, data in enumerate(tfrecord.read(file)):
            where = f"{path}: record {number}"
            if isinstance(data, tfrecord.RestLostError):
                raise errors.UserError(
                    f"{where} is cut off or corrupt, and so is the rest. Get the file again, and give the"
                    " same command: images found so far are kept."
                )
            if isinstance(data, tfrecord.RecordError):
                yield where, BadRecordError(str(data))
                continue
            try:
                yield where, parse(data)
            except BadRecordError as error:
                yield where, error
            bar.update(len(data))


def _check_is_tfrecord(path: pathlib.Path) -> None:
    try:
        with open(path, "rb", opener=reading.regular) as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise errors.UserError(f"{path}: {error.strerror}; there must be one file for each split") from error
    if start == LFS_POINTER:
        raise errors.UserError(
            f"{path} is a pointer of Git LFS, not the labels: run `git lfs pull` in that clone"
        )


def parse(data: bytes) -> Record:
    """Parses a serialised tf.train.Example into the fields of RichHF-18K that it has.

    Raises:
      BadRecordError: the data is no tf.train.Example, or a field has another type or several values.
    """
    try:
        features = tfrecord.parse_example(data)
    except tfrecord.RecordError as error:
        raise BadRecordError(f"it is {error}") from error
    record = {}
    texts = (feedback.FILENAME_FIELD, feedback.KEYWORDS_FIELD)
    for field in (*texts, *feedback.SCORE_FIELDS.values(), *feedback.HEATMAP_FIELDS.values()):
        kind = "float_list" if field in feedback.SCORE_FIELDS.values() else "bytes_list"
        found = features[field].WhichOneof("kind") if field in features else None
        if found not in (None, kind):
            raise BadRecordError(f"{field} must be a {kind}, got {found}")
        values = getattr(features[field], kind).value if found else []
        if len(values) > 1:
            raise BadRecordError(f"{field} has {len(values)} values")
        for value in values:
            record[field] = _decoded(value, field) if field in texts else value
    return record


def _decoded(text: bytes, field: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError(f"{field} isn't UTF-8") from error


def load(work_dir: pathlib.Path) -> Index:
    """Reads the index that `prepare` kept in `work_dir`."""
    return Index(**json.loads((work_dir / "labels" / _INDEX).read_text(encoding="utf-8")))


def prepare(
    records: Mapping[str, Iterable[tuple[str, Record | BadRecordError]]],
    inputs: Mapping[str, str],
    work_dir: pathlib.Path,
    zero_is_missing: bool = False,
) -> Index:
    """Checks labels and keeps them in `work_dir`. If they are there already, nothing is read.

    Args:
      records: split -> its records, each after its name for messages.
      inputs: name -> digest of what the records are read from.
      work_dir: folder of the join.
      zero_is_missing: whether an overall score of 0 means that there is none.

    Raises:
      errors.UserError: labels are bad, or `work_dir` holds a join that didn't look for all of these images.
    """
    folder = work_dir / "labels"
    path = folder / _INDEX
    old = load(work_dir) if path.exists() else None
    if old and old.inputs == inputs:
        return old
    writing.make_folder(folder)
    new = Index(dict(inputs), zero_is_missing=zero_is_missing)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for split in SPLITS:
            records_file = pathlib.Path(temporary) / f"{split}.tfrecord"
            consolidate.write_tfrecord(_checked(records[split], split, new), records_file)
        more = len(new.splits.keys() - old.splits.keys()) if old else 0
        if more and any((work_dir / "parts").glob("*.parquet")):
            raise errors.UserError(
                f"{work_dir} holds a join that didn't look for {more} of these labels' images. Delete it to"
                " start anew, or give another --work_dir."
            )
        # The index is deleted first and written last: it never describes other files than these.
        path.unlink(missing_ok=True)
        for split in SPLITS:
            writing.move(pathlib.Path(temporary) / f"{split}.tfrecord", folder / f"{split}.tfrecord")
    write_json(path, dataclasses.asdict(new))
    return new


def _checked(
    records: Iterable[tuple[str, Record | BadRecordError]], split: str, index: Index
) -> Iterator[Record]:
    """Yields the good records, with all fields, and notes the others' problems in the index."""
    keywords = index.keywords.setdefault(split, {})
    broken = index.broken_heatmaps.setdefault(split, {})
    bad = index.bad_records.setdefault(split, [])
    overall = feedback.SCORE_FIELDS[feedback.OVERALL]
    for where, record in records:
        try:
            if isinstance(record, BadRecordError):
                raise record
            filename, text, scores = _texts_and_scores(record)
        except BadRecordError as error:
            bad.append(f"{where}: {error}")
            continue
        uid = uid_of(filename)
        if uid in index.filenames:
            index.duplicates.append(f"{where}: {filename} again (first as {index.filenames[uid]})")
            continue
        index.filenames[uid] = filename
        try:
            maps = {f: images.checked(_bytes(record.get(f))) for f in feedback.HEATMAP_FIELDS.values()}
        except images.ImageError as error:
            broken[uid] = f"{where}: heatmap: {error}"
            continue
        if scores[overall] == 0:
            index.zero_overall.append(filename)
            if index.zero_is_missing:
                scores[overall] = math.nan
        for field in (field for field, score in scores.items() if math.isnan(score)):
            index.missing_scores[field] = index.missing_scores.get(field, 0) + 1
        keywords[uid] = text
        yield {feedback.FILENAME_FIELD: filename, feedback.KEYWORDS_FIELD: text, **scores, **maps}


def _texts_and_scores(record: Record) -> tuple[str, str, dict[str, float]]:
    """Returns file name, keyword labels and scores (NaN where there is none). Raises BadRecordError."""
    filename = record.get(feedback.FILENAME_FIELD)
    if not filename:
        raise BadRecordError(f"it has no {feedback.FILENAME_FIELD}")
    scores = {field: float(record.get(field, math.nan)) for field in feedback.SCORE_FIELDS.values()}
    for field, score in scores.items():
        if not (math.isnan(score) or 0 <= score <= 1):
            raise BadRecordError(f"{field} is {score}, not between 0 and 1")
    return str(filename), str(record.get(feedback.KEYWORDS_FIELD, "")), scores


def _bytes(value: str | float | bytes | None) -> bytes:
    return value if isinstance(value, bytes) else b""


def prepare_tfrecords(labels: pathlib.Path, work_dir: pathlib.Path) -> Index:
    """Prepares the labels of the published files in the folder `labels`.

    Raises:
      errors.UserError: see `prepare` and `read_tfrecord`.
    """
    paths = {split: labels / f"{split}.tfrecord" for split in SPLITS}
    for path in paths.values():
        _check_is_tfrecord(path)
    inputs = {path.name: _digest(path) for path in paths.values()}
    return prepare({split: read_tfrecord(path) for split, path in paths.items()}, inputs, work_dir)


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb", opener=reading.regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, content) -> None:
    """Writes a JSON file; it appears complete or not at all."""
    writing.write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
