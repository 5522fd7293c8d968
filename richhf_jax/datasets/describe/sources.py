"""Reads records from built TFDS data, label TFRecords or raw ratings. Images stay encoded."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tqdm

from richhf_jax import errors, feedback, foreign_text, reading
from richhf_jax.datasets import consolidate, ratings
from richhf_jax.datasets.describe.statistics import Record
from richhf_jax.datasets.rich_hf_18k import labels
from richhf_jax.inputs.record import bounded_lines, reason


def _text(value: bytes | str | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _record(fields: Mapping, name: str) -> Record:
    """Makes a record from RichHF-18K's fields, image and prompt.

    A score is missing (NaN) if the record lacks its field but has another score's.
    """
    scores = {kind: fields.get(field) for kind, field in feedback.SCORE_FIELDS.items()}
    if set(scores.values()) == {None}:
        scores = {}
    heatmaps = {kind: fields[field] for kind, field in feedback.HEATMAP_FIELDS.items() if field in fields}
    return Record(
        name=_text(fields.get(feedback.FILENAME_FIELD)) or name,
        prompt=_text(fields.get(feedback.PROMPT_FIELD)),
        scores={kind: math.nan if score is None else float(score) for kind, score in scores.items()},
        heatmaps=heatmaps,
        labels=_text(fields.get(feedback.KEYWORDS_FIELD)),
        image=fields.get(feedback.IMAGE_FIELD),
    )


def tfds_records(dataset: str, data_dir: str | None, split: str) -> Iterator[Record]:
    """Reads the records of a data set that TFDS has built.

    Args:
      dataset: TFDS's name for it, e.g. 'synthetic_rich_hf' or 'synthetic_rich_hf/subtle'.
      data_dir: folder in which it was built; by default TFDS's own.
      split: 'train', or a part of it as TFDS writes it, 'train[:100]'.

    Raises:
      errors.UserError: the data set isn't there, lacks the split, has nothing to describe or a broken file.
    """
    needed = (feedback.FILENAME_FIELD, feedback.PROMPT_FIELD)
    for number, example in enumerate(_tfds_examples(dataset, data_dir, split, needed)):
        yield _record(example, f"record {number}")


def tfds_captions(dataset: str, data_dir: str | None, split: str) -> Iterator[str]:
    """Reads a data set's captions: its prompts, or the first of each image's captions (COCO's).

    Args:
      dataset: see `tfds_records`.
      data_dir: see `tfds_records`.
      split: see `tfds_records`.

    Raises:
      errors.UserError: see `tfds_records`.
    """
    for example in _tfds_examples(dataset, data_dir, split, (feedback.PROMPT_FIELD, "captions")):
        prompt = example.get(feedback.PROMPT_FIELD)
        yield _text(example["captions"]["text"][0] if prompt is None else prompt) or ""


def _tfds_examples(
    dataset: str, data_dir: str | None, split: str, needed: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    """Reads examples of a data set that has one of the features `needed`; images stay encoded."""
    import tensorflow as tf  # These take seconds; only this function needs them.
    import tensorflow_datasets as tfds

    try:
        # TFDS's decorators hide the parameters of `as_dataset` from type checkers.
        builder: Any = tfds.builder(dataset, data_dir=data_dir, try_gcs=False)
    except ValueError:  # There is no code and no file of it, or no such configuration.
        raise errors.UserError(
            f"{data_dir or 'TFDS'}: there is no data set {dataset}, see --data_dir"
        ) from None
    if not builder.is_prepared():
        raise errors.UserError(f"{builder.data_path}: {dataset} isn't built there, see --data_dir")
    features = builder.info.features
    if not set(needed) & set(features):
        found = foreign_text.for_terminal(", ".join(features))
        raise errors.UserError(f"{dataset} has only {found}; a data set with {' or '.join(needed)} is needed")
    encoded = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    try:
        examples = builder.as_dataset(
            split,
            decoders={name: tfds.decode.SkipDecoding() for name in encoded},
            read_config=tfds.ReadConfig(try_autocache=False),
        )
        total = builder.info.splits[split].num_examples
    except ValueError as error:  # TFDS's message names the splits.
        raise errors.UserError(foreign_text.for_terminal(f"{dataset}: {error}")) from None
    progress = tqdm.tqdm(tfds.as_numpy(examples), total=total, unit=" records", disable=None)
    try:
        yield from progress
    except (tf.errors.DataLossError, tf.errors.NotFoundError) as error:
        message = foreign_text.for_terminal(f"{builder.data_path}: {error.message}")
        raise errors.UserError(f"{message}; build {dataset} again") from None


def label_records(paths: Sequence[pathlib.Path]) -> Iterator[Record]:
    """Reads the records of RichHF-18K's TFRecord files.

    Raises:
      errors.UserError: a file can't be read, or a record is broken.
    """
    for path in paths:
        for where, fields in labels.read_tfrecord(path):
            if isinstance(fields, labels.BadRecordError):
                raise errors.UserError(f"{where}: {fields}")
            yield _record(fields, where)


def raw_records(path: pathlib.Path) -> Iterator[Record]:
    """Reads one consolidated record per image, with its raters' answers; holds all answers in memory.

    Raises:
      errors.UserError: the file can't be read, or a line is bad.
    """
    good = []
    try:
        total = path.stat().st_size
        with (
            open(path, "rb", opener=reading.regular) as file,
            tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress,
        ):
            for number, rating in ratings.read_ratings(_counted(bounded_lines(file), progress)):
                if isinstance(rating, ratings.RatingError):
                    raise errors.UserError(f"{path}:{number}: {rating}")
                good.append(rating)
    except OSError as error:
        raise errors.UserError(f"{path}: {reason(error)}") from None
    for group in tqdm.tqdm(consolidate.group_by_image(good), unit=" images", disable=None):
        record = _record(consolidate.consolidate(group), group[0].image_id)
        yield dataclasses.replace(record, prompt=group[0].prompt, raters=group)


def _counted(lines: Iterator[bytes], progress: tqdm.tqdm) -> Iterator[bytes]:
    for line in lines:
        progress.update(len(line))
        yield line
